"""Plan, ledger and pipeline together, on the real servers."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import Detection, LedgerEntry, ModelVersion, ScoringRun
from gun_detection.detector.inference import Detections, Predictor
from gun_detection.errors import (
    FailureBudgetError,
    NotFoundError,
    ServiceUnavailableError,
    StaleAttemptError,
)
from gun_detection.release.registry import load_model, promote
from gun_detection.scoring.ledger import (
    Lease,
    Outcome,
    claim_shard,
    finish_run,
    finish_shard,
    write_outcomes,
)
from gun_detection.scoring.pipeline import score_shard
from gun_detection.scoring.plan import Plan, plan_run
from gun_detection.settings import Settings
from gun_detection.storage import Storage

BOX = np.array([[1, 2, 30, 40]], np.float32)


def picture(seed: int = 0, width: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def champion(publish_model: Callable[[int], ModelVersion], session: Session) -> ModelVersion:
    model = publish_model(0)
    promote(session, model.id, actor="tester", reason="a test")
    session.commit()
    return model


@pytest.fixture
def plan(champion: ModelVersion, settings: Settings, storage: Storage) -> Callable[..., Plan]:
    def make(**arguments: object) -> Plan:
        with open_session(settings) as session:
            return plan_run(champion, settings, storage, session, **arguments)  # type: ignore[arg-type]

    return make


class Counting(Predictor):
    """Counts the pictures that it is asked about."""

    def __init__(self, model: ModelVersion, settings: Settings, storage: Storage) -> None:
        super().__init__(load_model(model, settings, storage), torch.device("cpu"), 0.0)
        self.pictures = 0

    def __call__(self, images: list[np.ndarray]) -> list[Detections]:  # type: ignore[override]
        self.pictures += len(images)
        return super().__call__(images)


@pytest.fixture
def predictor(champion: ModelVersion, settings: Settings, storage: Storage) -> Counting:
    return Counting(champion, settings, storage)


def upload(storage: Storage, settings: Settings, **pictures: bytes) -> None:
    for name, data in pictures.items():
        storage.put(settings.uploads_bucket, f"{name}.jpg", data)


def outcomes(settings: Settings) -> dict[str, str]:
    with open_session(settings) as session:
        rows = session.execute(text("SELECT key, outcome, reason FROM current_outcomes"))
        return {row.key.removesuffix(".jpg"): row.reason or row.outcome for row in rows}


def score_all(made: Plan, settings: Settings, storage: Storage, predictor: Predictor) -> None:
    for shard_id in made.shard_ids:
        score_shard(claim_shard(shard_id, settings), predictor, settings, storage)


def test_every_upload_has_one_outcome_and_the_next_run_has_nothing_to_do(
    plan: Callable[..., Plan], predictor: Counting, settings: Settings, storage: Storage
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
    score_all(made, settings, storage, predictor)
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


def test_the_same_bytes_are_inferred_once_and_recorded_for_both(
    plan: Callable[..., Plan], predictor: Counting, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture(), b=picture())
    score_all(plan(), settings, storage, predictor)
    assert predictor.pictures == 1
    with open_session(settings) as session:
        counts = session.execute(
            select(LedgerEntry.upload_id, func.count(Detection.id))
            .outerjoin(Detection, Detection.ledger_id == LedgerEntry.id)
            .group_by(LedgerEntry.upload_id)
        ).all()
    assert len(counts) == 2
    assert counts[0][1] == counts[1][1] > 0


def test_an_overwritten_key_is_a_new_upload(
    plan: Callable[..., Plan], predictor: Counting, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=b"not a picture")
    score_all(plan(), settings, storage, predictor)
    assert outcomes(settings) == {"a": "NOT_IMAGE"}
    upload(storage, settings, a=picture())
    made = plan()
    assert made.planned == 1
    score_all(made, settings, storage, predictor)
    assert outcomes(settings) == {"a": "scored"}


def test_restored_bytes_are_the_newest_version_again(
    plan: Callable[..., Plan], predictor: Counting, settings: Settings, storage: Storage
) -> None:
    first = picture()
    for data in (first, b"not a picture", first):
        upload(storage, settings, a=data)
        score_all(plan(), settings, storage, predictor)
    assert outcomes(settings) == {"a": "scored"}
    assert predictor.pictures == 1


def test_what_was_deleted_before_it_was_read_and_comes_back_is_scored(
    plan: Callable[..., Plan], predictor: Counting, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture())
    made = plan()
    storage.delete(settings.uploads_bucket, "a.jpg")
    score_all(made, settings, storage, predictor)
    assert outcomes(settings) == {"a": "OBJECT_MISSING"}
    assert plan().planned == 0, "what is gone is not looked for every night"
    upload(storage, settings, a=picture())
    score_all(plan(), settings, storage, predictor)
    assert outcomes(settings) == {"a": "scored"}


def test_the_oldest_come_first_and_the_rest_wait(
    champion: ModelVersion, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, **{f"n{number}": b"x" for number in range(5)})
    small = settings.model_copy(update={"shard_images": 1, "max_shards": 3})
    with open_session(settings) as session:
        made = plan_run(champion, small, storage, session)
    assert (made.planned, made.left_over, len(made.shard_ids)) == (3, 2, 3)


def test_planning_a_run_again_gives_the_plan_that_was_made(
    plan: Callable[..., Plan], settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=b"x")
    first = plan(run_id="night")
    upload(storage, settings, b=b"x")
    again = plan(run_id="night")
    assert again.shard_ids == first.shard_ids
    assert again.planned == 1


def test_a_prefix_is_taken_literally(
    plan: Callable[..., Plan], settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, **{"a%/x": b"1", "ab/x": b"2", "a_/x": b"3"})
    assert plan(prefix="a%/").planned == 1
    assert plan(prefix="a_/").planned == 1


def test_a_missing_bucket_is_named(plan: Callable[..., Plan]) -> None:
    with pytest.raises(NotFoundError, match="no-such-bucket"):
        plan(bucket="no-such-bucket")


@pytest.fixture
def leased(plan: Callable[..., Plan], settings: Settings, storage: Storage) -> Lease:
    upload(storage, settings, a=picture(), b=picture(1))
    return claim_shard(plan().shard_ids[0], settings)


def found(lease: Lease) -> list[Outcome]:
    score = np.array([0.9], np.float32)
    return [Outcome(item.id, "0" * 64, Detections(BOX, score)) for item in lease.uploads]


def count(settings: Settings, table: str) -> int:
    with open_session(settings) as session:
        return int(session.execute(text(f"SELECT COUNT(*) FROM {table}")).scalar_one())


def test_writing_twice_changes_nothing(leased: Lease, settings: Settings) -> None:
    assert write_outcomes(leased, found(leased), settings) == 2
    assert write_outcomes(leased, found(leased), settings) == 0
    assert (count(settings, "ledger"), count(settings, "detection")) == (2, 2)


def test_a_zombie_writes_nothing_after_its_shard_was_taken_over(
    leased: Lease, settings: Settings
) -> None:
    with pytest.raises(ServiceUnavailableError) as held:
        claim_shard(leased.shard_id, settings)
    assert held.value.reason == "SHARD_HELD"
    later = claim_shard(leased.shard_id, settings, take_over=True)
    assert later.attempt == leased.attempt + 1
    for late in (
        lambda: write_outcomes(leased, found(leased), settings),
        lambda: finish_shard(leased, settings),
    ):
        with pytest.raises(StaleAttemptError):
            late()
    assert count(settings, "ledger") == 0
    assert write_outcomes(later, found(later), settings) == 2


def test_the_next_attempt_does_only_what_is_left(leased: Lease, settings: Settings) -> None:
    write_outcomes(leased, found(leased)[:1], settings)
    later = claim_shard(leased.shard_id, settings, take_over=True)
    assert [item.id for item in later.uploads] == [leased.uploads[1].id]


def test_a_batch_is_written_whole_or_not_at_all(leased: Lease, settings: Settings) -> None:
    good, bad = found(leased)
    turned = Detections(BOX[:, [2, 3, 0, 1]], np.array([0.9], np.float32))
    with pytest.raises(Exception, match="ck_detection_box"):
        write_outcomes(leased, [good, replace(bad, detections=turned)], settings)
    assert (count(settings, "ledger"), count(settings, "detection")) == (0, 0)


def test_hostile_text_is_stored_as_text(leased: Lease, settings: Settings) -> None:
    message = "a\0b\t\\N'); DROP TABLE ledger; --" + "x" * 1000
    first = leased.uploads[0].id
    write_outcomes(leased, [Outcome(first, None, reason="CORRUPT", message=message)], settings)
    with open_session(settings) as session:
        stored = session.scalar(select(LedgerEntry.message))
    assert stored is not None
    assert stored.startswith("ab\t\\N'); DROP TABLE")
    assert len(stored) == 500


def test_a_run_with_uploads_left_undone_fails_loudly(leased: Lease, settings: Settings) -> None:
    write_outcomes(leased, found(leased)[:1], settings)
    with pytest.raises(FailureBudgetError, match="1 of 2 uploads"):
        finish_run(leased.run_id, settings)
    with open_session(settings) as session:
        assert session.scalar(select(ScoringRun.state)) == "failed"


def test_a_run_with_too_many_bad_pictures_fails_and_keeps_the_good(
    plan: Callable[..., Plan], predictor: Counting, settings: Settings, storage: Storage
) -> None:
    bad = {f"bad{number}": b"bad %d" % number for number in range(12)}
    upload(storage, settings, good=picture(), **bad)
    made = plan()
    score_all(made, settings, storage, predictor)
    with pytest.raises(FailureBudgetError, match="12 of 13 uploads"):
        finish_run(made.run_id, settings)
    assert outcomes(settings)["good"] == "scored"


def test_a_detection_is_unreviewed_until_somebody_says_otherwise(
    leased: Lease, settings: Settings
) -> None:
    write_outcomes(leased, found(leased), settings)
    with open_session(settings) as session:
        session.execute(
            text(
                "INSERT INTO review (detection_id, verdict, reviewer) "
                "SELECT MIN(id), 'rejected', 'ann' FROM detection"
            )
        )
    with open_session(settings) as session:
        states = session.execute(
            text("SELECT review_state, reviewer FROM current_detections ORDER BY detection_id")
        ).all()
    assert [tuple(row) for row in states] == [("rejected", "ann"), ("unreviewed", None)]


def test_a_server_that_fails_is_not_an_outcome(
    plan: Callable[..., Plan], predictor: Counting, settings: Settings, storage: Storage
) -> None:
    upload(storage, settings, a=picture())
    lease = claim_shard(plan().shard_ids[0], settings)
    broken = Storage(settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:9"}))
    with pytest.raises(ServiceUnavailableError):
        score_shard(lease, predictor, settings, broken)
    assert outcomes(settings) == {}
