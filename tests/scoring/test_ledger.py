"""Leases and the ledger: fenced, idempotent, nothing twice and nothing lost."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from sqlalchemy import text

from gun_detection.database import open_session
from gun_detection.detector.detections import Detections
from gun_detection.errors import FailureBudgetError, ServiceUnavailableError, StaleAttemptError
from gun_detection.scoring.leases import Lease, claim_shard, finish_shard, give_up, suspect
from gun_detection.scoring.ledger import Outcome, write_outcomes
from gun_detection.scoring.plan import Plan
from gun_detection.scoring.runs import finish_run
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.scoring.conftest import count, picture, rows, upload

BOX = np.array([[1, 2, 30, 40]], np.float32)


@pytest.fixture
def leased(plan: Callable[..., Plan], settings: Settings, storage: Storage) -> Lease:
    upload(storage, settings, a=picture(), b=picture(1))
    return claim_shard(plan().shard_ids[0], settings)


def found(lease: Lease) -> list[Outcome]:
    score = np.array([0.9], np.float32)
    return [Outcome(item.id, "0" * 64, Detections(BOX, score)) for item in lease.items]


def test_writing_twice_changes_nothing(leased: Lease, settings: Settings) -> None:
    assert write_outcomes(leased, found(leased), settings) == 2
    assert write_outcomes(leased, found(leased), settings) == 0
    assert (count(settings, "ledger"), count(settings, "detection")) == (2, 2)
    assert count(settings, "unscored_uploads") == 0


def test_detections_are_stored_as_found_best_first(leased: Lease, settings: Settings) -> None:
    boxes = np.array([[0.1, 0.2, 30.3, 40.4], [5, 6, 7, 8]], np.float32)
    scores = np.array([0.9, 1 / 3], np.float32)
    first = leased.items[0].id
    write_outcomes(leased, [Outcome(first, None, Detections(boxes, scores))], settings)
    stored = np.array(rows(settings, "SELECT x1, y1, x2, y2, score FROM detection ORDER BY id"))
    assert np.array_equal(stored.astype(np.float32), np.column_stack([boxes, scores]))


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
        lambda: suspect(leased, leased.items[0], settings),
        lambda: give_up(leased, settings),
        lambda: finish_shard(leased, settings),
    ):
        with pytest.raises(StaleAttemptError):
            late()
    assert count(settings, "ledger") == 0
    assert write_outcomes(later, found(later), settings) == 2


def test_a_lease_that_ran_out_can_be_taken(leased: Lease, settings: Settings) -> None:
    with open_session(settings) as session:
        session.execute(text("UPDATE shard SET lease_until = now() - interval '1 second'"))
    assert claim_shard(leased.shard_id, settings).attempt == leased.attempt + 1


def test_the_next_attempt_does_only_what_is_left(leased: Lease, settings: Settings) -> None:
    write_outcomes(leased, found(leased)[:1], settings)
    later = claim_shard(leased.shard_id, settings, take_over=True)
    assert [item.id for item in later.items] == [leased.items[1].id]


def test_a_batch_is_written_whole_or_not_at_all(leased: Lease, settings: Settings) -> None:
    good, bad = found(leased)
    turned = Detections(BOX[:, [2, 3, 0, 1]], np.array([0.9], np.float32))
    with pytest.raises(Exception, match="ck_detection_box"):
        write_outcomes(leased, [good, replace(bad, detections=turned)], settings)
    assert (count(settings, "ledger"), count(settings, "detection")) == (0, 0)
    assert count(settings, "unscored_uploads") == 2


def test_hostile_text_is_stored_as_text(leased: Lease, settings: Settings) -> None:
    message = "a\0b\t\\N'); DROP TABLE ledger; --\r\n" + "x" * 1000
    first = leased.items[0].id
    write_outcomes(leased, [Outcome(first, None, reason="CORRUPT", message=message)], settings)
    [(stored,)] = rows(settings, "SELECT message FROM ledger")
    assert stored.startswith("ab\t\\N'); DROP TABLE ledger; --\r\n")
    assert len(stored) == 500


def test_only_a_stale_outcome_is_replaced(leased: Lease, settings: Settings) -> None:
    first, second = leased.items
    bad = [Outcome(item.id, None, reason="OBJECT_MISSING") for item in (first, second)]
    write_outcomes(leased, bad, settings)
    with open_session(settings) as session:
        session.execute(
            text("UPDATE ledger SET stale = true WHERE upload_id = :id"), {"id": first.id}
        )
    later = claim_shard(leased.shard_id, settings, take_over=True)
    assert [item.id for item in later.items] == [first.id]
    assert write_outcomes(later, found(leased), settings) == 1
    assert rows(settings, "SELECT outcome, tries, stale FROM ledger ORDER BY upload_id") == [
        ("scored", 2, False),
        ("quarantined", 1, False),
    ]
    assert count(settings, "detection") == 1


def test_a_killed_attempt_is_followed_by_a_careful_one(leased: Lease, settings: Settings) -> None:
    assert not leased.careful
    assert claim_shard(leased.shard_id, settings, take_over=True).careful


def test_an_attempt_that_gave_up_is_no_crash(leased: Lease, settings: Settings) -> None:
    give_up(leased, settings)
    assert not claim_shard(leased.shard_id, settings).careful


def test_the_picture_that_two_attempts_died_of_is_condemned(
    leased: Lease, settings: Settings
) -> None:
    poison = leased.items[1]
    second = claim_shard(leased.shard_id, settings, take_over=True)
    suspect(second, poison, settings)
    third = claim_shard(leased.shard_id, settings, take_over=True)
    assert third.condemned is None
    assert third.items[0] == poison, "what was suspected is looked at first"
    suspect(third, poison, settings)
    fourth = claim_shard(leased.shard_id, settings, take_over=True)
    assert fourth.condemned == poison
    assert fourth.items == [leased.items[0]]


def test_deaths_at_different_pictures_condemn_none(leased: Lease, settings: Settings) -> None:
    lease = leased
    for number in range(6):
        lease = claim_shard(leased.shard_id, settings, take_over=True)
        assert lease.condemned is None
        suspect(lease, leased.items[number % 2], settings)


def test_a_suspect_with_an_outcome_is_innocent(leased: Lease, settings: Settings) -> None:
    lease = claim_shard(leased.shard_id, settings, take_over=True)
    suspect(lease, lease.items[0], settings)
    write_outcomes(lease, found(lease)[:1], settings)
    for _ in range(3):
        lease = claim_shard(leased.shard_id, settings, take_over=True)
        assert lease.condemned is None


def test_a_run_with_uploads_left_undone_fails_loudly(leased: Lease, settings: Settings) -> None:
    write_outcomes(leased, found(leased)[:1], settings)
    with pytest.raises(FailureBudgetError, match="1 of 2 uploads") as caught:
        finish_run(leased.run_id, settings)
    assert caught.value.reason == "UPLOADS_MISSED"
    assert rows(settings, "SELECT state FROM scoring_run") == [("failed",)]


def test_a_retry_that_did_not_happen_is_no_outcome(leased: Lease, settings: Settings) -> None:
    write_outcomes(leased, found(leased), settings)
    finish_run(leased.run_id, settings)
    with open_session(settings) as session:
        session.execute(text("UPDATE ledger SET stale = true"))
    with pytest.raises(FailureBudgetError, match="2 of 2 uploads"):
        finish_run(leased.run_id, settings)
    finish_shard(claim_shard(leased.shard_id, settings, take_over=True), settings)
    finish_run(leased.run_id, settings)


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
    states = rows(
        settings, "SELECT review_state, reviewer FROM current_detections ORDER BY detection_id"
    )
    assert states == [("rejected", "ann"), ("unreviewed", None)]
