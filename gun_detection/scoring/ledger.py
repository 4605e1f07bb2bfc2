"""The ledger: one outcome per upload and model, written in fenced, idempotent transactions."""

import io
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
from sqlalchemy import func, or_, select, text, update
from sqlalchemy.dialects.postgresql import distinct_on, insert
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import Detection, LedgerEntry, ScoringRun, Shard, Upload
from gun_detection.detector.inference import Detections
from gun_detection.errors import (
    FailureBudgetError,
    NotFoundError,
    ServiceUnavailableError,
    StaleAttemptError,
)
from gun_detection.settings import Settings

logger = logging.getLogger(__name__)

# Reasons that say nothing about a picture: it was deleted or overwritten before it was read.
GONE = ("OBJECT_MISSING", "OBJECT_CHANGED")


@dataclass(frozen=True)
class Lease:
    """The right to write a shard's outcomes, until another attempt takes it over."""

    shard_id: int
    attempt: int
    run_id: str
    model_id: str
    uploads: list[Upload]


@dataclass(frozen=True)
class Outcome:
    """What became of one upload: detections, or the reason for its quarantine."""

    upload_id: int
    sha256: str | None
    detections: Detections | None = None
    reason: str | None = None
    message: str | None = None
    width: int | None = None
    height: int | None = None
    decode_ms: float | None = None
    inference_ms: float | None = None


@dataclass(frozen=True)
class RunSummary:
    """The counts of a run; `reasons` counts the quarantined by reason code."""

    run_id: str
    model_id: str
    planned: int
    left_over: int
    scored: int
    quarantined: int
    detections: int
    reasons: dict[str, int]


def claim_shard(shard_id: int, settings: Settings, *, take_over: bool = False) -> Lease:
    """Take the lease of a shard with what is left to do in it; older attempts are fenced off.

    Raises `ServiceUnavailableError` while another worker holds the lease, unless `take_over`:
    whoever scheduled this attempt knows that the earlier one is dead.
    """
    with open_session(settings) as session:
        shard = session.get(Shard, shard_id, with_for_update=True)
        if shard is None:
            raise NotFoundError(f"there is no shard {shard_id}")
        now = session.scalar(select(func.now()))
        assert now is not None
        if shard.lease_until and shard.lease_until > now and not take_over:
            raise ServiceUnavailableError(
                f"shard {shard_id} is held by attempt {shard.attempt} "
                f"until {shard.lease_until:%H:%M:%S}",
                reason="SHARD_HELD",
            )
        shard.attempt += 1
        shard.lease_until = now + timedelta(seconds=settings.shard_lease_seconds)
        run = session.get_one(ScoringRun, shard.run_id)
        done = select(LedgerEntry.upload_id).where(
            LedgerEntry.model_id == run.model_id,
            LedgerEntry.upload_id.in_(shard.upload_ids),
            or_(LedgerEntry.reason.is_(None), LedgerEntry.reason.not_in(GONE)),
        )
        left = select(Upload).where(Upload.id.in_(shard.upload_ids), Upload.id.not_in(done))
        uploads = list(session.scalars(left.order_by(Upload.id)))
        return Lease(shard.id, shard.attempt, run.id, run.model_id, uploads)


def write_outcomes(lease: Lease, outcomes: Sequence[Outcome], settings: Settings) -> int:
    """Write a batch in one transaction and renew the lease; the number of outcomes written.

    An outcome that exists stays as it is, so writing twice changes nothing; only what was gone
    when it was to be read, and came back, is judged anew.
    Raises `StaleAttemptError` when another attempt took the shard over: nothing is written then.
    """
    with open_session(settings) as session:
        _renew(session, lease, settings)
        rows = [_row(lease, outcome) for outcome in outcomes]
        statement = insert(LedgerEntry).values(rows)
        statement = statement.on_conflict_do_update(
            index_elements=["upload_id", "model_id"],
            set_={name: statement.excluded[name] for name in rows[0]} | {"created_at": func.now()},
            where=LedgerEntry.reason.in_(GONE),
        )
        written = session.execute(statement.returning(LedgerEntry.upload_id, LedgerEntry.id))
        new = {row.upload_id: row.id for row in written}
        _copy_detections(session, [(new[o.upload_id], o) for o in outcomes if o.upload_id in new])
        return len(new)


def finish_shard(lease: Lease, settings: Settings) -> None:
    """Give the lease back; raises `StaleAttemptError` when another attempt holds it."""
    with open_session(settings) as session:
        _renew(session, lease, settings)
        session.execute(
            update(Shard)
            .where(Shard.id == lease.shard_id)
            .values(lease_until=None, finished_at=func.now())
        )


def earlier_detections(
    session: Session, digests: Collection[str], model_id: str
) -> dict[str, tuple[LedgerEntry, Detections]]:
    """What the same model found in the same bytes before, by sha256."""
    entries = session.scalars(
        select(LedgerEntry)
        .where(
            LedgerEntry.sha256.in_(digests),
            LedgerEntry.model_id == model_id,
            LedgerEntry.outcome == "scored",
        )
        .ext(distinct_on(LedgerEntry.sha256))
        .order_by(LedgerEntry.sha256, LedgerEntry.id)
    ).all()
    rows: dict[int, list[tuple[float, ...]]] = {entry.id: [] for entry in entries}
    columns = (Detection.x1, Detection.y1, Detection.x2, Detection.y2, Detection.score)
    for ledger_id, *values in session.execute(
        select(Detection.ledger_id, *columns)
        .where(Detection.ledger_id.in_(rows))
        .order_by(Detection.id)
    ):
        rows[ledger_id].append(tuple(values))
    found = {}
    for entry in entries:
        table = np.array(rows[entry.id], dtype=np.float32).reshape(-1, 5)
        assert entry.sha256 is not None
        found[entry.sha256] = entry, Detections(table[:, :4], table[:, 4])
    return found


def summarize_run(session: Session, run_id: str) -> RunSummary:
    """The counts of a run; raises `NotFoundError`."""
    row = session.execute(
        text("SELECT * FROM scoring_summary WHERE run_id = :run"), {"run": run_id}
    ).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no scoring run {run_id!r}")
    reasons = session.execute(
        select(LedgerEntry.reason, func.count())
        .where(LedgerEntry.run_id == run_id, LedgerEntry.reason.is_not(None))
        .group_by(LedgerEntry.reason)
        .order_by(LedgerEntry.reason)
    )
    return RunSummary(
        run_id=run_id,
        model_id=row.model_id,
        planned=row.planned,
        left_over=row.left_over,
        scored=row.scored,
        quarantined=row.quarantined,
        detections=row.detections,
        reasons={str(reason): count for reason, count in reasons},
    )


def finish_run(run_id: str, settings: Settings) -> RunSummary:
    """Close a run whose shards are done.

    Raises `FailureBudgetError` when an upload has no outcome or too many are in quarantine;
    everything good is kept either way.
    """
    with open_session(settings) as session:
        missing = _without_outcome(session, run_id)
        summary = summarize_run(session, run_id)
        budget = settings.scoring_failure_budget * (summary.scored + summary.quarantined)
        # A handful of bad files among few uploads is no sign of a broken night.
        over = summary.quarantined > max(budget, 10)
        session.execute(
            update(ScoringRun)
            .where(ScoringRun.id == run_id)
            .values(state="failed" if missing or over else "finished", finished_at=func.now())
        )
    if missing:
        raise FailureBudgetError(
            f"{missing} of {summary.planned} uploads of run {run_id} have no outcome: "
            "look at its failed shards and trigger the run again"
        )
    if over:
        raise FailureBudgetError(
            f"{summary.quarantined} of {summary.planned} uploads of run {run_id} are in quarantine "
            f"({summary.reasons}), more than the budget of {settings.scoring_failure_budget:.0%}: "
            "look at what was uploaded"
        )
    return summary


def _without_outcome(session: Session, run_id: str) -> int:
    count: int = session.execute(
        text(
            """
            SELECT COUNT(*) FROM shard s
            JOIN scoring_run r ON r.id = s.run_id
            CROSS JOIN LATERAL unnest(s.upload_ids) AS u(upload_id)
            WHERE s.run_id = :run AND NOT EXISTS (
                SELECT FROM ledger l
                WHERE l.upload_id = u.upload_id AND l.model_id = r.model_id
            )
            """
        ),
        {"run": run_id},
    ).scalar_one()
    return count


def _renew(session: Session, lease: Lease, settings: Settings) -> None:
    """Lock the shard's row until the transaction ends, if the lease is still ours."""
    attempt = session.scalar(
        update(Shard)
        .where(Shard.id == lease.shard_id, Shard.attempt == lease.attempt)
        .values(lease_until=func.now() + timedelta(seconds=settings.shard_lease_seconds))
        .returning(Shard.attempt)
    )
    if attempt is None:
        raise StaleAttemptError(
            f"attempt {lease.attempt} no longer holds shard {lease.shard_id}: "
            "a later one took it over, and nothing more is written by this one"
        )


def _row(lease: Lease, outcome: Outcome) -> dict[str, object]:
    return {
        "upload_id": outcome.upload_id,
        "model_id": lease.model_id,
        "run_id": lease.run_id,
        "shard_id": lease.shard_id,
        "attempt": lease.attempt,
        "outcome": "scored" if outcome.reason is None else "quarantined",
        "reason": outcome.reason,
        # PostgreSQL text holds no NUL, and a message may quote hostile bytes.
        "message": outcome.message.replace("\0", "")[:500] if outcome.message else None,
        "sha256": outcome.sha256,
        "width": outcome.width,
        "height": outcome.height,
        "decode_ms": outcome.decode_ms,
        "inference_ms": outcome.inference_ms,
    }


def _copy_detections(session: Session, entries: Sequence[tuple[int, Outcome]]) -> None:
    """COPY, many times faster than inserts, inside the session's transaction."""
    buffer = io.StringIO()
    for ledger_id, outcome in entries:
        if outcome.detections is None:
            continue
        for box, score in zip(outcome.detections.boxes, outcome.detections.scores, strict=True):
            values = [*(repr(float(value)) for value in box), repr(float(score))]
            buffer.write("\t".join([str(ledger_id), *values]) + "\n")
    if not buffer.tell():
        return
    buffer.seek(0)
    columns = ("ledger_id", "x1", "y1", "x2", "y2", "score")
    driver = session.connection().connection.driver_connection
    assert driver is not None
    with driver.cursor() as cursor:
        cursor.copy_from(buffer, Detection.__tablename__, columns=columns)
