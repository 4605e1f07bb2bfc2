"""Good pictures are scored whatever else goes wrong: servers, machines, buckets, late messages."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from gun_detection.database import open_session
from gun_detection.database.models import ModelVersion
from gun_detection.errors import (
    FailureBudgetError,
    GunDetectionError,
    ImageError,
    ServiceUnavailableError,
    SettingsError,
    TerminalError,
)
from gun_detection.images import DecoderPool, Reason
from gun_detection.release.champion import promote
from gun_detection.release.registry import publish
from gun_detection.scoring import delivery, pipeline
from gun_detection.scoring.leases import claim_shard, give_up
from gun_detection.scoring.pages import run_page
from gun_detection.scoring.pipeline import score_shard
from gun_detection.scoring.plan import Plan
from gun_detection.scoring.runs import finish_run
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model
from tests.scoring.conftest import count, outcomes, picture, rows, score_all, upload
from tests.scoring.simulated import Simulated

Planned = Callable[..., Plan]


class Refusing(Storage):
    """Raises the error for keys that the test names; for all of them by default."""

    def __init__(
        self, settings: Settings, error: GunDetectionError, keys: set[str] | None = None
    ) -> None:
        super().__init__(settings)
        self.error, self.keys = error, keys

    def get(self, bucket: str, key: str, **options: Any) -> bytes:
        if self.keys is None or key in self.keys:
            raise self.error
        return super().get(bucket, key, **options)


def later(settings: Settings, hours: int = 13) -> None:
    """All that is in the ledger was written so long ago."""
    with open_session(settings) as session:
        session.execute(_AGE, {"hours": hours})


_AGE = text("UPDATE ledger SET created_at = created_at - make_interval(hours => :hours)")
DENIED = SettingsError("access denied", reason="ACCESS_DENIED")
AWAY = ServiceUnavailableError("the S3 server answered InternalError")


@pytest.mark.parametrize(("error", "reason"), [(DENIED, "ACCESS_DENIED"), (AWAY, "UNREADABLE")])
def test_an_object_that_is_not_delivered_keeps_no_other_waiting(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    error: GunDetectionError,
    reason: str,
) -> None:
    upload(storage, settings, a=picture())
    upload(storage, settings, **{f"b{number}": picture(1 + number) for number in range(8)})
    made = plan()
    score_all(made, settings, Refusing(settings, error, {"a.jpg"}), engine)
    found = outcomes(settings)
    assert found.pop("a") == reason
    assert set(found.values()) == {"scored"}
    assert plan().planned == 0, "not every minute"
    for night in range(4):
        later(settings)
        storage.put(settings.uploads_bucket, "other.jpg", picture(100 + night))
        made = plan()
        assert made.planned == 2, "every night, as long as it takes"
        score_all(made, settings, Refusing(settings, error, {"a.jpg"}), engine)
    later(settings)
    score_all(plan(), settings, storage, engine)
    assert outcomes(settings)["a"] == "scored"


@pytest.mark.parametrize("error", [DENIED, AWAY])
def test_a_server_that_delivers_nothing_gives_no_outcome(
    plan: Planned, settings: Settings, storage: Storage, error: GunDetectionError
) -> None:
    upload(storage, settings, **{f"b{number}": picture(number) for number in range(3)})
    [shard] = plan().shard_ids
    with pytest.raises(type(error)):
        score_shard(claim_shard(shard, settings), Simulated(), settings, Refusing(settings, error))
    assert count(settings, "ledger") == 0


def test_a_server_that_goes_away_ends_the_shard_soon(
    plan: Planned, settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "_MOST_FAILED", 5)
    asked: list[str] = []

    class Away(Storage):
        def get(self, bucket: str, key: str, **options: Any) -> bytes:
            asked.append(key)
            raise AWAY

    few = settings.model_copy(update={"readers": 1})
    upload(storage, settings, **{f"b{number:02}": picture(number) for number in range(40)})
    [shard] = plan(settings=few.model_copy(update={"shard_images": 1000})).shard_ids
    with pytest.raises(ServiceUnavailableError):
        score_shard(claim_shard(shard, few), Simulated(), few, Away(few))
    assert len(asked) < 20


def test_whether_a_server_went_away_is_asked_once(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery, "_MOST_FAILED", 2)
    asked: list[str] = []
    delivered = threading.Event()

    class Leaving(Storage):
        def get(self, bucket: str, key: str, **options: Any) -> bytes:
            asked.append(key)
            if key == "b00.jpg" and not delivered.is_set():
                delivered.set()
                return super().get(bucket, key, **options)
            delivered.wait(60)
            # Many threads fail at the same time.
            time.sleep(0.2)
            raise AWAY

    upload(storage, settings, **{f"b{number:02}": picture(number) for number in range(40)})
    [shard] = plan(settings=settings.model_copy(update={"shard_images": 1000})).shard_ids
    with pytest.raises(ServiceUnavailableError):
        score_shard(claim_shard(shard, settings), engine, settings, Leaving(settings))
    assert len(asked) - len(set(asked)) <= 3, "one asks for all of them"


def test_many_objects_that_fail_for_good_keep_nothing_behind_them_waiting(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery, "_MOST_FAILED", 3)
    one_by_one = settings.model_copy(update={"readers": 1})
    names = [f"b{number:02}" for number in range(20)]
    upload(storage, settings, **{name: picture(seed) for seed, name in enumerate(names)})
    lost = Refusing(settings, AWAY, {f"{name}.jpg" for name in names[:16]})
    score_all(plan(), one_by_one, lost, engine)
    expected = ["UNREADABLE"] * 16 + ["scored"] * 4
    assert outcomes(settings) == dict(zip(names, expected, strict=True))


@pytest.mark.parametrize(("error", "reason"), [(DENIED, "ACCESS_DENIED"), (AWAY, "UNREADABLE")])
def test_a_shard_of_nothing_but_such_objects_has_outcomes_where_others_are_delivered(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    error: GunDetectionError,
    reason: str,
) -> None:
    monkeypatch.setattr(delivery, "_MOST_FAILED", 3)
    upload(storage, settings, **{f"a{number}": picture(number) for number in range(8)})
    score_all(plan(), settings, storage, engine)
    names = [f"b{number}" for number in range(8)]
    upload(storage, settings, **{name: picture(8 + seed) for seed, name in enumerate(names)})
    made = plan()
    [shard] = made.shard_ids
    lease = claim_shard(shard, settings)
    with pytest.raises(type(error)):
        score_shard(lease, engine, settings, Refusing(settings, error))
    assert count(settings, "ledger") == 8, "the whole bucket"
    give_up(lease, settings)
    # Among them those that were scored last.
    refused = {f"{name}.jpg" for name in (*names, "a6", "a7")}
    score_all(made, settings, Refusing(settings, error, refused), engine)
    found = outcomes(settings)
    assert {found[name] for name in names} == {reason}
    assert finish_run(made.run_id, settings).quarantined == 8


@pytest.mark.parametrize("error", [DENIED, AWAY])
def test_what_was_tried_in_vain_uses_up_no_cap(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    error: GunDetectionError,
) -> None:
    upload(storage, settings, **{f"a{number}": picture(number) for number in range(3)})
    capped = settings.model_copy(update={"run_images": 3})
    lease = claim_shard(plan(settings=capped).shard_ids[0], settings)
    with pytest.raises(type(error)):
        score_shard(lease, engine, settings, Refusing(settings, error))
    give_up(lease, settings)
    upload(storage, settings, **{f"b{number}": picture(3 + number) for number in range(2)})
    made = plan(settings=capped)
    assert (made.planned, made.left_over) == (3, 2)
    items = claim_shard(made.shard_ids[0], settings).items
    assert [item.key for item in items[:2]] == ["b0.jpg", "b1.jpg"]
    score_all(plan(), settings, storage, engine)
    assert list(outcomes(settings).values()) == ["scored"] * 5
    assert rows(settings, "SELECT COUNT(*) FROM upload WHERE deferred") == [(0,)]


@pytest.mark.parametrize("error", [DENIED, AWAY])
def test_a_server_that_goes_away_at_the_end_blames_no_object(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    error: GunDetectionError,
) -> None:
    """Fewer than would end a shard in its midst."""
    one_by_one = settings.model_copy(update={"readers": 1})

    class Leaving(Storage):
        left = 6

        def get(self, bucket: str, key: str, **options: Any) -> bytes:
            if not self.left:
                raise error
            self.left -= 1
            return super().get(bucket, key, **options)

    upload(storage, settings, **{f"b{number}": picture(number) for number in range(9)})
    made = plan()
    [shard] = made.shard_ids
    lease = claim_shard(shard, one_by_one)
    with pytest.raises(type(error)):
        score_shard(lease, engine, one_by_one, Leaving(settings))
    assert list(outcomes(settings).values()) == ["scored"] * 6
    give_up(lease, settings)
    score_all(made, settings, storage, engine)
    assert list(outcomes(settings).values()) == ["scored"] * 9


def test_a_decoder_that_died_once_is_tried_again(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    died: list[int] = []
    decode = DecoderPool.decode

    def once(pool: DecoderPool, data: bytes, **options: Any) -> Any:
        if not died:
            died.append(1)
            raise ImageError("killed from outside", reason=Reason.DECODER_CRASHED)
        return decode(pool, data, **options)

    monkeypatch.setattr(DecoderPool, "decode", once)
    upload(storage, settings, a=picture())
    score_all(plan(), settings, storage, engine)
    assert outcomes(settings) == {"a": "scored"}


def test_a_machine_without_memory_for_any_picture_blames_none(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, **{f"b{number}": picture(number) for number in range(3)})
    [shard] = plan().shard_ids
    with pytest.raises(ServiceUnavailableError) as caught:
        score_shard(claim_shard(shard, settings), Simulated(most=1), settings, storage)
    assert caught.value.reason == "NO_MEMORY"
    assert count(settings, "ledger") == 0


def test_what_a_machine_may_have_done_is_judged_again_a_few_times(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture(width=200), words=b"words")
    full = Simulated(most=64 * 48 * 3)
    for planned in (2, 1, 1):
        made = plan()
        assert made.planned == planned
        score_all(made, settings, storage, full)
        assert outcomes(settings) == {"a": "OUT_OF_MEMORY", "words": "NOT_IMAGE"}
        later(settings)
    assert plan().planned == 0, "three times are enough"


def test_pictures_under_way_are_all_that_is_remembered(
    plan: Planned,
    engine: Simulated,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers: list[Any] = []
    made = pipeline._Worker

    def remember(*arguments: Any) -> Any:
        workers.append(made(*arguments))
        return workers[-1]

    monkeypatch.setattr(pipeline, "_Worker", remember)
    upload(storage, settings, **{f"b{number}": picture(number) for number in range(9)}, x=b"no")
    score_all(plan(), settings, storage, engine)
    assert len(outcomes(settings)) == 10
    assert all(worker._by_bytes == {} for worker in workers)


def test_what_was_found_in_a_picture_that_is_gone_stays_in_the_views(
    plan: Planned, settings: Settings, storage: Storage, engine: Simulated
) -> None:
    names = [f"b{number:02}" for number in range(14)]
    upload(storage, settings, **{name: picture(seed) for seed, name in enumerate(names)})
    score_all(plan(), settings, storage, engine)
    found = rows(settings, "SELECT key, x1, score FROM current_detections ORDER BY detection_id")
    assert found
    newer = champion_after(settings, storage)
    for name in names:
        storage.delete(settings.uploads_bucket, f"{name}.jpg")
    made = plan(kind="rescore", model=newer)
    score_all(made, settings, storage, engine)
    summary = finish_run(made.run_id, settings)
    assert summary.reasons == {"OBJECT_MISSING": 14}, "more than the budget, and no failure"
    view = "SELECT key, x1, score FROM current_detections ORDER BY detection_id"
    assert rows(settings, view) == found
    assert count(settings, "quarantine") == 0
    assert plan(kind="rescore", model=newer).planned == 0


@pytest.mark.parametrize("reason", ["ARCHIVED", "ACCESS_DENIED", "OUT_OF_MEMORY"])
def test_what_was_found_in_a_picture_that_the_champion_cannot_look_at_stays_in_the_views(
    plan: Planned, settings: Settings, storage: Storage, engine: Simulated, reason: str
) -> None:
    upload(storage, settings, a=picture(1), b=picture(2))
    score_all(plan(), settings, storage, engine)
    found = rows(settings, "SELECT key, x1 FROM current_detections ORDER BY detection_id")
    assert {key for key, _ in found} == {"a.jpg"}, "the other one holds none"
    newer = champion_after(settings, storage)
    refusing = Refusing(settings, TerminalError("no", reason=reason), {"a.jpg"})
    score_all(plan(kind="rescore", model=newer), settings, refusing, engine)
    view = "SELECT key, by_champion FROM current_outcomes ORDER BY key"
    assert rows(settings, view) == [("a.jpg", False), ("b.jpg", True)]
    view = "SELECT DISTINCT key FROM current_detections ORDER BY key"
    assert rows(settings, view) == [("a.jpg",)]
    # Why the champion has nothing to say is to be seen, too.
    assert rows(settings, "SELECT key, reason FROM quarantine") == [("a.jpg", reason)]


def test_pictures_of_the_past_that_were_archived_are_no_failure(
    plan: Planned, settings: Settings, storage: Storage, engine: Simulated
) -> None:
    names = {f"b{seed:02}": picture(seed) for seed in range(14)}
    upload(storage, settings, **names)
    score_all(plan(), settings, storage, engine)
    made = plan(kind="rescore", model=champion_after(settings, storage))
    score_all(made, settings, Refusing(settings, TerminalError("no", reason="ARCHIVED")), engine)
    assert finish_run(made.run_id, settings).reasons == {"ARCHIVED": 14}


def test_what_waited_to_be_judged_anew_is_when_its_model_is_champion_again(
    plan: Planned,
    champion: ModelVersion,
    settings: Settings,
    storage: Storage,
    engine: Simulated,
) -> None:
    upload(storage, settings, a=picture(1), b=picture(2))
    score_all(plan(), settings, Refusing(settings, DENIED, {"a.jpg"}), engine)
    newer = champion_after(settings, storage)
    later(settings)
    score_all(plan(model=newer), settings, storage, engine)
    found = rows(settings, "SELECT x1 FROM current_detections ORDER BY detection_id")
    assert found
    with open_session(settings) as session:
        promote(session, champion.id, actor="tester", reason="the other one is worse")
    # Until then it is what the other model found that counts.
    assert rows(settings, "SELECT x1 FROM current_detections ORDER BY detection_id") == found
    assert count(settings, "outdated_uploads") == 1
    made = plan(kind="rescore")
    assert made.planned == 1
    score_all(made, settings, storage, engine)
    view = "SELECT DISTINCT outcome, by_champion FROM current_outcomes"
    assert rows(settings, view) == [("scored", True)]
    assert plan(kind="rescore").planned == 0


def champion_after(settings: Settings, storage: Storage) -> ModelVersion:
    with open_session(settings) as session:
        newer = publish(random_model(1), settings, storage, session)
    with open_session(settings) as session:
        promote(session, newer.id, actor="tester", reason="a test")
    return newer


def test_what_the_model_has_judged_before_waits_no_longer(
    plan: Planned, settings: Settings, storage: Storage, engine: Simulated
) -> None:
    upload(storage, settings, a=picture())
    score_all(plan(), settings, storage, engine)
    with open_session(settings) as session:
        session.execute(_PENDING)
    made = plan()
    assert made.planned == 1
    score_all(made, settings, storage, engine)
    assert count(settings, "unscored_uploads") == 0
    assert plan().planned == 0


_PENDING = text("UPDATE upload SET pending = true")


def test_a_bucket_that_cannot_be_listed_keeps_no_other_waiting(
    plan: Planned, settings: Settings, storage: Storage, engine: Simulated, tmp_path: Path
) -> None:
    path = tmp_path / "sources.yaml"
    path.write_text(f"buckets: [{{bucket: gone-bucket}}, {{bucket: {settings.uploads_bucket}}}]")
    upload(storage, settings, a=picture())
    made = plan(settings=settings.model_copy(update={"sources_file": path}))
    score_all(made, settings, storage, engine)
    assert outcomes(settings) == {"a": "scored"}
    with pytest.raises(FailureBudgetError, match="gone-bucket") as caught:
        finish_run(made.run_id, settings)
    assert caught.value.reason == "NOT_LISTED"
    with open_session(settings) as session:
        page = run_page(session, made.run_id)
    assert "not listed" in page
    assert "gone-bucket" in page
    assert rows(settings, "SELECT state FROM scoring_run") == [("failed",)]


def test_runs_that_nobody_works_at_are_closed(
    plan: Planned, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture())
    abandoned, held = plan(run_id="abandoned"), plan(run_id="held")
    claim_shard(held.shard_ids[0], settings)
    plan(run_id="today")
    states = "SELECT id, state FROM scoring_run ORDER BY id"
    assert {state for _, state in rows(settings, states)} == {"open"}
    with open_session(settings) as session:
        session.execute(_OLD_RUNS)
    plan(run_id="tomorrow")
    assert rows(settings, states) == [
        ("abandoned", "failed"),
        ("held", "open"),
        ("today", "failed"),
        ("tomorrow", "open"),
    ]
    assert abandoned.planned == 1


_OLD_RUNS = text("UPDATE scoring_run SET created_at = created_at - interval '2 days'")


def test_what_no_source_covers_any_more_is_not_waited_for(
    plan: Planned, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    path = tmp_path / "sources.yaml"
    configured = settings.model_copy(update={"sources_file": path})
    bucket = settings.uploads_bucket

    def planned(source: str, **scope: Any) -> int:
        path.write_text(f"buckets: [{{{source}}}]")
        return plan(settings=configured, **scope).planned

    everything = f"bucket: {bucket}"
    upload(storage, settings, **{"a/1": b"1", "a/2": b"2", "b/1": b"3"})
    assert planned(everything) == 3
    assert planned(f"{everything}, exclude: ['*/2.jpg']") == 2
    assert planned(f"{everything}, prefix: b/") == 1
    assert count(settings, "unscored_uploads") == 1
    assert planned(f"{everything}, prefix: b/", bucket=bucket, prefix="a/") == 2, "by hand"
    storage.ensure_bucket("another-bucket")
    assert planned("bucket: another-bucket") == 0
    assert count(settings, "scoring_freshness") == 0
    assert planned(everything) == 3, "nothing of it was forgotten"
