"""The end of a run: its counts, its figures, and whether it may call itself finished."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import LedgerEntry, ScoringRun, Shard
from gun_detection.errors import FailureBudgetError, NotFoundError
from gun_detection.scoring.stats import combine
from gun_detection.settings import Settings

_GONE = ("OBJECT_MISSING", "OBJECT_CHANGED", "ARCHIVED", "REQUEST_REFUSED")


@dataclass(frozen=True)
class RunSummary:
    """The counts of a run; `reasons` counts the quarantined by reason code, `stats` are the
    figures of its shards together (see `stats.combine`). Of what is `left_over` no nightly run
    takes what is `by_hand`."""

    run_id: str
    kind: str
    model_id: str
    planned: int
    left_over: int
    by_hand: list[str]
    scored: int
    quarantined: int
    detections: int
    reasons: dict[str, int]
    stats: dict[str, Any] | None


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
    shards = session.scalars(select(Shard.stats).where(Shard.run_id == run_id))
    return RunSummary(
        run_id=run_id,
        kind=row.kind,
        model_id=row.model_id,
        planned=row.planned,
        left_over=row.left_over,
        # Runs of earlier versions do not say.
        by_hand=session.get_one(ScoringRun, run_id).survey.get("by_hand", []),
        scored=row.scored,
        quarantined=row.quarantined,
        detections=row.detections,
        reasons={str(reason): count for reason, count in reasons},
        stats=combine([stats for stats in shards if stats]),
    )


def finish_run(run_id: str, settings: Settings) -> RunSummary:
    """Close a run whose shards are done.

    Raises `FailureBudgetError` when an upload has no outcome, a source could not be listed, or too
    many are in quarantine, of this run or of those of an hour or a day; everything good is kept
    either way.
    """
    with open_session(settings) as session:
        missing = _without_outcome(session, run_id)
        summary = summarize_run(session, run_id)
        unlisted: dict[str, str] = session.get_one(ScoringRun, run_id).survey.get("unlisted", {})
        budget = settings.scoring_failure_budget * (summary.scored + summary.quarantined)
        bad = summary.quarantined
        if summary.kind == "rescore":
            # Pictures of the past may be deleted or archived by now.
            bad -= sum(summary.reasons.get(reason, 0) for reason in _GONE)
        # A handful of bad files among few uploads is no sign of a broken night.
        over = bad > max(budget, settings.scoring_failure_count)
        where = f"of {summary.planned} uploads of run {run_id}"
        if bad and not over and summary.kind == "new":
            worst = _worst(session, summary, settings)
            if worst is not None:
                over, (bad, where) = True, worst
        session.execute(
            update(ScoringRun)
            .where(ScoringRun.id == run_id)
            .values(
                state="failed" if missing or over or unlisted else "finished",
                finished_at=func.now(),
                stats=summary.stats,
                scored=summary.scored,
                quarantined=summary.quarantined,
                detections=summary.detections,
            )
        )
    if missing:
        raise FailureBudgetError(
            f"{missing} of {summary.planned} uploads of run {run_id} have no outcome: "
            "look at its failed shards and trigger the run again",
            reason="UPLOADS_MISSED",
        )
    if unlisted:
        raise FailureBudgetError(
            "all that is known was scored, but not everything could be listed: "
            + "; ".join(f"{address}: {why}" for address, why in unlisted.items()),
            reason="NOT_LISTED",
        )
    if over:
        raise FailureBudgetError(
            f"{bad} {where} are in quarantine (this run's: {summary.reasons}), more than the "
            f"budget of {settings.scoring_failure_budget:.0%}: "
            "look at what was uploaded (`gun-detection quarantine list`)"
        )
    return summary


def _worst(session: Session, summary: RunSummary, settings: Settings) -> tuple[int, str] | None:
    """How many are in quarantine of this run and those that ended in a day, or in an hour, and of
    how many: where they are too many, and nobody was told within an hour."""
    row = session.execute(_TOGETHER, {"run": summary.run_id}).one()
    own = summary.scored + summary.quarantined
    for name, bad, others in (
        ("a day", row.bad_of_day, row.day),
        ("an hour", row.bad_of_hour, row.hour),
    ):
        judged = others + own
        limit = max(settings.scoring_failure_budget * judged, settings.scoring_failure_count)
        if bad > limit and not row.told:
            return bad, f"of {judged} uploads of {name}"
    return None


# Runs of a few uploads each, as the watcher starts them, stay below any count: together they may
# not. A large night that went well must not hide that all has gone wrong since, so an hour counts
# by itself. Where all goes wrong, once an hour is often enough to be told.
_TOGETHER = text(
    """
    WITH run AS (
        SELECT id, state, scored + quarantined AS judged,
               finished_at > now() - interval '1 hour' AS recent
        FROM scoring_run
        WHERE kind = 'new' AND id <> :run AND finished_at > now() - interval '1 day'
    )
    SELECT judged.*, bad.*
    FROM (
        SELECT COALESCE(SUM(judged), 0) AS day,
               COALESCE(SUM(judged) FILTER (WHERE recent), 0) AS hour,
               COALESCE(bool_or(state = 'failed' AND recent), false) AS told
        FROM run
    ) judged, (
        SELECT COUNT(*) AS bad_of_day,
               COUNT(*) FILTER (WHERE created_at > now() - interval '1 hour') AS bad_of_hour
        FROM ledger
        WHERE reason IS NOT NULL AND created_at > now() - interval '1 day'
        AND run_id IN (SELECT id FROM run UNION SELECT :run)
    ) bad
    """
)


def _without_outcome(session: Session, run_id: str) -> int:
    """Uploads without an outcome, and those of unfinished shards that were to be judged anew."""
    count: int = session.execute(
        text(
            """
            SELECT COUNT(*) FROM shard s
            JOIN scoring_run r ON r.id = s.run_id
            CROSS JOIN LATERAL unnest(s.upload_ids) AS u(upload_id)
            WHERE s.run_id = :run AND NOT EXISTS (
                SELECT FROM ledger l
                WHERE l.upload_id = u.upload_id AND l.model_id = r.model_id
                AND NOT (l.stale AND s.finished_at IS NULL)
            )
            """
        ),
        {"run": run_id},
    ).scalar_one()
    return count
