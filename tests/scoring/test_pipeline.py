"""Shards through the whole pipeline, on the real servers."""

import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gun_detection.batching import Batcher
from gun_detection.database import open_session
from gun_detection.detector.detections import Detections
from gun_detection.errors import FailureBudgetError, ImageError, ServiceUnavailableError
from gun_detection.reading import Reader
from gun_detection.release.champion import promote
from gun_detection.release.packages import open_engine
from gun_detection.release.registry import publish
from gun_detection.scoring import pipeline
from gun_detection.scoring.leases import claim_shard, suspect
from gun_detection.scoring.pipeline import score_shard
from gun_detection.scoring.plan import Plan
from gun_detection.scoring.runs import RunSummary, finish_run
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.bad_pictures import CASES, LIMITS
from tests.conftest import random_model
from tests.scoring.conftest import count, outcomes, picture, rows, score_all, upload, wait_all
from tests.scoring.simulated import Simulated

Planned = Callable[..., Plan]


def test_every_upload_has_one_outcome_and_the_next_run_has_nothing_to_do(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    good = picture()
    upload(
        storage,
        settings,
        good=good,
        copy=good,
        other=picture(1),
        cut=good[: len(good) // 2],
        words=b"not a picture",
        empty=b"",
        tiny=picture(width=4),
    )
    made = plan()
    assert (made.planned, made.left_over) == (7, 0)
    score_all(made, settings, storage, engine)
    summary = finish_run(made.run_id, settings)
    assert outcomes(settings) == {
        "good": "scored",
        "copy": "scored",
        "other": "scored",
        "cut": "TRUNCATED",
        "words": "NOT_IMAGE",
        "empty": "EMPTY",
        "tiny": "TOO_SMALL",
    }
    assert (summary.scored, summary.quarantined) == (3, 4)
    again = plan()
    assert (again.planned, again.shard_ids) == (0, [])
    assert finish_run(again.run_id, settings).planned == 0


def test_a_real_detector_scores_with_the_reference_engine(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    with open_session(settings) as session:
        champion = publish(random_model(1), settings, storage, session)
        promote(session, champion.id, actor="tester", reason="a test")
    upload(storage, settings, **{f"n{seed}": picture(seed) for seed in range(3)})
    loose = settings.model_copy(update={"score_floor": 0.0})
    score_all(plan(), settings, storage, open_engine(champion, loose, storage))
    assert set(outcomes(settings).values()) == {"scored"}
    assert rows(settings, "SELECT DISTINCT engine FROM ledger") == [("eager",)]
    assert count(settings, "detection") > 0


def test_the_table_of_bad_pictures_gives_the_outcomes_that_it_says(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    cases = [case for case in CASES if not case.not_in_bucket]
    for case in cases:
        storage.put(settings.uploads_bucket, case.key, case.make())
    made = plan()
    assert made.planned == len(cases)
    score_all(made, settings.model_copy(update=LIMITS), storage, engine)
    stored = {
        key: (reason, (width, height))
        for key, reason, width, height in rows(
            settings, "SELECT key, reason, width, height FROM current_outcomes"
        )
    }
    assert stored == {case.key: (case.reason, case.size or (None, None)) for case in cases}


def test_the_same_bytes_are_inferred_once_and_recorded_for_all(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, **{f"n{number}": picture(3) for number in range(20)})
    score_all(plan(), settings, storage, engine)
    upload(storage, settings, later=picture(3))
    score_all(plan(), settings, storage, engine)
    assert engine.pictures == 1
    counts = rows(
        settings,
        "SELECT COUNT(d.id) FROM ledger l LEFT JOIN detection d ON d.ledger_id = l.id "
        "GROUP BY l.id",
    )
    assert len(counts) == 21
    assert len(set(counts)) == 1


def test_an_overwritten_key_is_a_new_upload(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=b"not a picture")
    score_all(plan(), settings, storage, engine)
    assert outcomes(settings) == {"a": "NOT_IMAGE"}
    upload(storage, settings, a=picture())
    made = plan()
    assert made.planned == 1
    score_all(made, settings, storage, engine)
    assert outcomes(settings) == {"a": "scored"}


def test_restored_bytes_keep_their_outcome(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    first = picture()
    for data in (first, b"not a picture", first):
        upload(storage, settings, a=data)
        score_all(plan(), settings, storage, engine)
    assert outcomes(settings) == {"a": "scored"}
    assert engine.pictures == 1


@pytest.mark.parametrize(
    ("disturb", "reason"),
    [
        (lambda storage, bucket: storage.delete(bucket, "a.jpg"), "OBJECT_MISSING"),
        (lambda storage, bucket: storage.put(bucket, "a.jpg", b"other"), "OBJECT_CHANGED"),
    ],
)
def test_what_was_gone_before_it_was_read_and_comes_back_is_scored(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    disturb: Callable[[Storage, str], None],
    reason: str,
) -> None:
    upload(storage, settings, a=picture())
    made = plan()
    disturb(storage, settings.uploads_bucket)
    score_all(made, settings, storage, engine)
    assert outcomes(settings) == {"a": reason}
    storage.delete(settings.uploads_bucket, "a.jpg")
    assert plan().planned == 0, "what is gone is not looked for every night"
    upload(storage, settings, a=picture())
    score_all(plan(), settings, storage, engine)
    assert outcomes(settings) == {"a": "scored"}
    assert rows(settings, "SELECT tries FROM ledger WHERE outcome = 'scored'") == [(2,)]


def test_large_pictures_are_decoded_small_and_their_boxes_are_whole(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    pixels = np.zeros((2400, 3200, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 1, 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=100, subsampling=0)
    upload(storage, settings, large=buffer.getvalue())
    engine = Simulated()
    seen: list[tuple[int, ...]] = []
    real = engine.__call__

    class Watching(Simulated):
        def __call__(self, images):  # type: ignore[no-untyped-def]
            seen.extend(image.shape for image in images)
            return real(images)

    score_all(plan(), settings, storage, Watching())
    assert seen[0][0] < 2400
    assert rows(settings, "SELECT width, height FROM ledger") == [(3200, 2400)]
    assert rows(settings, "SELECT x1, y1, x2, y2 FROM detection") == [(0, 0, 3200, 2400)]


def test_a_batch_that_is_too_much_is_halved_and_one_that_alone_is_is_quarantined(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, **{f"n{seed}": picture(seed) for seed in range(12)})
    upload(storage, settings, huge=picture(99, width=96))
    engine = Simulated(batch=8, streams=1, seconds=0.01, most=64 * 48 * 3 * 2)
    score_all(plan(), settings, storage, engine)
    reasons = outcomes(settings)
    assert reasons.pop("huge") == "scored"
    assert set(reasons.values()) == {"scored"}
    upload(storage, settings, huge=picture(98, width=200))
    score_all(plan(), settings, storage, engine)
    assert outcomes(settings)["huge"] == "OUT_OF_MEMORY"


class Gathering(Simulated):
    """Answers a batch once there are pictures for another beside those of all streams."""

    def __init__(self, pictures: int, *, batch: int, streams: int) -> None:
        super().__init__(batch=batch, streams=streams)
        self._coming, self._asked, self._changed = pictures, 0, threading.Condition()

    def ask(self) -> None:
        with self._changed:
            self._asked += 1
            self._changed.notify_all()

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        answers = super().__call__(images)
        with self._changed:
            # Where there is no room for so many, it goes on with what there is.
            self._changed.wait_for(self._enough, timeout=30)
            # One at a time: what is at hand is for one batch.
            self._coming -= len(images)
            self._asked -= len(images)
        return answers

    def _enough(self) -> bool:
        return self._asked >= min(self._coming, (self.streams + 1) * self.batch)


@pytest.fixture
def gather(monkeypatch: pytest.MonkeyPatch) -> Callable[[Gathering], Gathering]:
    """The engine hears of every picture that is to be looked at."""

    def tell(engine: Gathering) -> Gathering:
        class Telling(Batcher[Any, Any]):
            def submit(self, ask: Any) -> Future[Any]:
                answer = super().submit(ask)
                if isinstance(ask, np.ndarray):
                    engine.ask()
                return answer

        monkeypatch.setattr(pipeline, "Batcher", Telling)
        return engine

    return tell


class Broken(Gathering):
    """Computes no numbers for the larger pictures, and so none for their batch."""

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        answers = super().__call__(images)
        if any(image.shape[1] == 65 for image in images):
            raise ImageError("no number", reason="NOT_FINITE")
        return answers


def test_a_picture_without_numbers_takes_no_other_of_its_batch_along(
    plan: Planned,
    settings: Settings,
    storage: Storage,
    gather: Callable[[Gathering], Gathering],
) -> None:
    upload(storage, settings, **{f"n{seed}": picture(seed) for seed in range(12)})
    upload(storage, settings, broken=picture(99, width=65))
    engine = gather(Broken(13, batch=8, streams=1))
    score_all(plan(), settings, storage, engine)
    reasons = outcomes(settings)
    assert reasons.pop("broken") == "NOT_FINITE"
    assert set(reasons.values()) == {"scored"}
    assert max(engine.batches) > 1


def test_batches_grow_with_the_load(
    plan: Planned,
    settings: Settings,
    storage: Storage,
    gather: Callable[[Gathering], Gathering],
) -> None:
    upload(storage, settings, **{f"n{seed}": picture(seed) for seed in range(40)})
    engine = gather(Gathering(40, batch=8, streams=1))
    score_all(plan(), settings, storage, engine)
    assert 1 < max(engine.batches) <= 8
    assert sum(engine.batches) == 40


def test_large_pictures_fill_batches(
    plan: Planned,
    settings: Settings,
    storage: Storage,
    gather: Callable[[Gathering], Gathering],
) -> None:
    engine = gather(Gathering(64, batch=16, streams=2))
    buffer = io.BytesIO()
    Image.new("RGB", (4032, 3024)).save(buffer, "JPEG")
    # What follows the end of a picture makes bytes of its own.
    copies = {f"n{number}": buffer.getvalue() + bytes([number]) for number in range(64)}
    upload(storage, settings, **copies)
    score_all(plan(), settings, storage, engine)
    assert engine.pictures == 64
    # Without the first of each stream, when little is decoded, and the last of all.
    full = engine.batches[2:-1]
    assert sum(full) / len(full) == 16


def test_a_careful_attempt_looks_at_pictures_one_by_one_then_goes_on(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "_CAREFUL", 3)
    upload(storage, settings, **{f"n{seed}": picture(seed) for seed in range(6)})
    [shard] = plan().shard_ids
    claim_shard(shard, settings)
    noted: list[int] = []
    monkeypatch.setattr(
        pipeline, "suspect", lambda lease, item, s: noted.append(item.id) or suspect(lease, item, s)
    )
    lease = claim_shard(shard, settings, take_over=True)
    score_shard(lease, engine, settings, storage)
    assert noted == [item.id for item in lease.items[:3]]
    assert set(outcomes(settings).values()) == {"scored"}


def test_the_condemned_is_quarantined_and_never_looked_at(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture(), b=picture(1))
    [shard] = plan().shard_ids
    poison = claim_shard(shard, settings).items[0]
    for _ in range(2):
        suspect(claim_shard(shard, settings, take_over=True), poison, settings)
    score_shard(claim_shard(shard, settings, take_over=True), engine, settings, storage)
    assert sorted(outcomes(settings).values()) == ["CRASHED", "scored"]
    assert engine.pictures == 1
    assert rows(settings, "SELECT COUNT(*) FROM ledger WHERE sha256 IS NULL") == [(0,)]


def test_progress_counts_every_picture(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, **{f"n{seed}": picture(seed) for seed in range(70)})
    heard: list[tuple[int, int]] = []
    [shard] = plan().shard_ids
    stats = score_shard(
        claim_shard(shard, settings), engine, settings, storage, lambda *x: heard.append(x)
    )
    assert heard[-1] == (70, 70)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert (stats["pictures"], stats["scored"], stats["engines"]) == (70, 70, ["simulated"])
    assert len(stats["slowest"]) == 5
    assert all(stats["working"][name] > 0 for name in ("read", "decode", "infer", "write"))


def test_figures_of_a_run_are_those_of_its_shards_together(
    plan: Planned, engine: Simulated, small: Settings, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, **{f"n{seed}": picture(seed) for seed in range(5)})
    made = plan(settings=small)
    assert len(made.shard_ids) == 3
    score_all(made, settings, storage, engine)
    summary = finish_run(made.run_id, settings)
    assert summary.stats is not None
    assert summary.stats["pictures"] == 5
    assert summary.stats["bytes"] == sum(len(picture(seed)) for seed in range(5))


def test_a_run_with_too_many_bad_pictures_fails_and_keeps_the_good(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, good=picture(), **{f"bad{n}": b"bad %d" % n for n in range(12)})
    made = plan()
    score_all(made, settings, storage, engine)
    with pytest.raises(FailureBudgetError, match="12 of 13 uploads"):
        finish_run(made.run_id, settings)
    assert outcomes(settings)["good"] == "scored"
    lenient = settings.model_copy(update={"scoring_failure_count": 12})
    finish_run(made.run_id, lenient)


@pytest.fixture
def bad_run(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> Callable[[int], RunSummary]:
    """A run by its number, over six files that are no pictures."""

    def run(number: int) -> RunSummary:
        bad = {f"{number}-{n}": b"bad %d %d" % (number, n) for n in range(6)}
        upload(storage, settings, **bad)
        made = plan()
        score_all(made, settings, storage, engine)
        return finish_run(made.run_id, settings)

    return run


def test_small_runs_that_all_go_wrong_fail_together_once_an_hour(
    bad_run: Callable[[int], RunSummary],
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
) -> None:
    bad_run(0)
    with pytest.raises(FailureBudgetError, match="12 of 12 uploads of a day"):
        bad_run(1)
    bad_run(2)
    rows(settings, "UPDATE scoring_run SET finished_at = now() - interval '2 hours' RETURNING id")
    upload(storage, settings, good=picture())
    made = plan()
    score_all(made, settings, storage, engine)
    assert finish_run(made.run_id, settings).quarantined == 0, "a good run fails for no others"
    with pytest.raises(FailureBudgetError, match="24 of 25 uploads of a day"):
        bad_run(3)


def test_a_large_good_night_does_not_hide_that_all_goes_wrong_since(
    bad_run: Callable[[int], RunSummary],
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
) -> None:
    upload(storage, settings, good=picture())
    night = plan()
    score_all(night, settings, storage, engine)
    finish_run(night.run_id, settings)
    rows(
        settings,
        "UPDATE scoring_run SET scored = 100000, finished_at = now() - interval '5 hours' "
        "RETURNING id",
    )
    bad_run(0)
    with pytest.raises(FailureBudgetError, match="12 of 12 uploads of an hour"):
        bad_run(1)
    bad_run(2)


def test_bad_pictures_of_a_run_that_goes_on_are_no_failure_of_a_small_one(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, **{f"n{n}": b"bad %d" % n for n in range(12)})
    score_all(plan(run_id="night"), settings, storage, engine)
    upload(storage, settings, bad=b"bad")
    made = plan()
    score_all(made, settings, storage, engine)
    assert finish_run(made.run_id, settings).quarantined == 1


def test_what_is_judged_several_times_a_day_counts_once(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, **{f"n{n}": b"bad %d" % n for n in range(6)})
    for _ in range(3):
        made = plan()
        assert made.planned == 6
        score_all(made, settings, storage, engine)
        finish_run(made.run_id, settings)
        rows(settings, "UPDATE ledger SET stale = true RETURNING id")
        wait_all(settings)


def test_a_server_that_fails_is_not_an_outcome(
    plan: Planned, engine: Simulated, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture(), b=picture(1))
    lease = claim_shard(plan().shard_ids[0], settings)
    away = settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:9"})
    before = threading.active_count()
    with pytest.raises(ServiceUnavailableError):
        score_shard(lease, engine, settings, Reader(away, seconds=3))
    assert outcomes(settings) == {}
    # Of those that others left some may end meanwhile.
    assert threading.active_count() <= before


def test_an_unexpected_error_of_the_engine_ends_the_shard(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    class Broken(Simulated):
        def __call__(self, images):  # type: ignore[no-untyped-def]
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    upload(storage, settings, **{f"n{seed}": picture(seed) for seed in range(4)})
    [shard] = plan().shard_ids
    with pytest.raises(RuntimeError, match="illegal memory access"):
        score_shard(claim_shard(shard, settings), Broken(), settings, storage)
    assert outcomes(settings) == {}
