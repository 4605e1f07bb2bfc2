"""What people see of scoring: how fresh it is, what each run did, and what could not be scored.

Made from the database alone: the Airflow API server shows these pages, without the packages of the
detector.
"""

from itertools import groupby
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from gun_detection.database.models import ScoringRun
from gun_detection.errors import NotFoundError
from gun_detection.pages import environment
from gun_detection.scoring.stats import STAGES, combine
from gun_detection.scoring.words import duration

_RUNS = 100
_NEWEST = 100
_KEYS_BY_REASON = 50
# A night has passed over what waits for longer.
_LATE = 24 * 3600
_STATES = {"open": "wait", "finished": "good", "failed": "bad"}
_KINDS = {"new": "new uploads", "rescore": "history"}

_TEMPLATES = environment("gun_detection.scoring")
_TEMPLATES.globals |= {"colours": _STATES, "kinds": _KINDS}
_TEMPLATES.filters |= {"duration": duration}


def scoring_page(session: Session) -> str:
    """Freshness, sources that nobody sees, the last runs, and the quarantine of all of them."""
    fresh = _rows(session, "SELECT * FROM scoring_freshness ORDER BY oldest_seconds DESC, bucket")
    quarantine = _rows(session, _QUARANTINE, newest=_NEWEST)
    return _TEMPLATES.get_template("scoring.html").render(
        fresh=fresh,
        unscored=sum(row.unscored for row in fresh),
        late=bool(fresh) and fresh[0].oldest_seconds > _LATE,
        unseen=_rows(session, "SELECT * FROM unseen_sources ORDER BY source"),
        runs=_rows(session, _LAST_RUNS, limit=_RUNS),
        reasons=[(row.reason, row.total) for row in quarantine if row.first],
        newest=[row for row in quarantine if row.place <= _NEWEST],
        quarantined=sum(row.total for row in quarantine if row.first),
    )


def run_page(session: Session, run_id: str) -> str:
    """The page of a scoring run; one that is open asks the browser to load it again.

    Raises `NotFoundError`.
    """
    run = session.get(ScoringRun, run_id)
    if run is None:
        raise NotFoundError(f"there is no scoring run {run_id}")
    [summary] = _rows(session, _SUMMARY, run=run_id)
    shards = [_shard(row) for row in _rows(session, _SHARDS, run=run_id)]
    stats = combine([shard["stats"] for shard in shards if shard["stats"]])
    done = summary.scored + summary.quarantined
    rate = done / summary.seconds if summary.seconds else 0.0
    return _TEMPLATES.get_template("run.html").render(
        run=run,
        summary=summary,
        survey=run.survey,
        done=done,
        rate=rate,
        left=(run.planned - done) / rate if rate else None,
        stats=stats,
        stages=_stages(stats) if stats else [],
        shards=shards,
        finished=sum(shard["finished"] for shard in shards),
        reasons=_reasons(session, run_id),
    )


def scored_page(session: Session, run_id: str) -> str:
    """The page of the scoring run of a DAG run; says so where it scored nothing."""
    if session.get(ScoringRun, run_id) is not None:
        return run_page(session, run_id)
    return _TEMPLATES.get_template("nothing.html").render()


_SUMMARY = """
    SELECT *, EXTRACT(EPOCH FROM COALESCE(finished_at, now()) - created_at)::float AS seconds,
           (SELECT EXTRACT(EPOCH FROM now() - MAX(created_at))::float
            FROM ledger WHERE run_id = :run) AS silent
    FROM scoring_summary WHERE run_id = :run
"""
_SHARDS = """
    SELECT s.number, cardinality(s.upload_ids) AS pictures, s.bytes, s.attempt, s.crashes,
           s.lease_until, EXTRACT(EPOCH FROM s.lease_until - now())::float AS lease_seconds,
           s.finished_at, s.stats,
           COALESCE(l.done, 0) AS done
    FROM shard s LEFT JOIN (
        SELECT shard_id, COUNT(*) AS done FROM ledger WHERE run_id = :run GROUP BY shard_id
    ) l ON l.shard_id = s.id
    WHERE s.run_id = :run ORDER BY s.number
"""
_REASONS = """
    SELECT l.reason, l.total, l.message, u.bucket, u.key
    FROM (
        SELECT reason, message, upload_id, COUNT(*) OVER (PARTITION BY reason) AS total,
               ROW_NUMBER() OVER (PARTITION BY reason ORDER BY id) AS place
        FROM ledger WHERE run_id = :run AND reason IS NOT NULL
    ) l JOIN upload u ON u.id = l.upload_id
    WHERE l.place <= :keys ORDER BY l.total DESC, l.reason, l.place
"""
# Only what has not ended is counted, and not by the view `scoring_summary`, which looks for the
# detections of each outcome apart.
_LAST_RUNS = """
    WITH shown AS (
        SELECT *, EXTRACT(EPOCH FROM COALESCE(finished_at, now()) - created_at)::float AS seconds
        FROM scoring_run ORDER BY created_at DESC, id LIMIT :limit
    ), uncounted AS (
        SELECT id, threshold FROM shown WHERE scored IS NULL
    ), counted AS (
        SELECT l.run_id, COUNT(*) FILTER (WHERE l.outcome = 'scored') AS scored,
               COUNT(*) FILTER (WHERE l.outcome = 'quarantined') AS quarantined
        FROM ledger l WHERE l.run_id = ANY(ARRAY(SELECT id FROM uncounted)) GROUP BY l.run_id
    ), found AS (
        SELECT l.run_id, COUNT(*) AS detections
        FROM ledger l JOIN uncounted s ON s.id = l.run_id
        JOIN detection d ON d.ledger_id = l.id AND d.score >= s.threshold
        WHERE l.run_id = ANY(ARRAY(SELECT id FROM uncounted)) GROUP BY l.run_id
    )
    SELECT s.id AS run_id, s.created_at, s.kind, s.state, s.model_id, s.planned, s.left_over,
           s.seconds, COALESCE(s.scored, c.scored, 0) AS scored,
           COALESCE(s.quarantined, c.quarantined, 0) AS quarantined,
           COALESCE(s.detections, f.detections, 0) AS detections
    FROM shown s LEFT JOIN counted c ON c.run_id = s.id LEFT JOIN found f ON f.run_id = s.id
    ORDER BY s.created_at DESC, s.id
"""
_QUARANTINE = """
    SELECT * FROM (
        SELECT bucket, key, reason, message, tries, scored_at, run_id,
               COUNT(*) OVER (PARTITION BY reason) AS total,
               ROW_NUMBER() OVER (PARTITION BY reason ORDER BY ledger_id) = 1 AS first,
               ROW_NUMBER() OVER (ORDER BY scored_at DESC, ledger_id DESC) AS place
        FROM quarantine
    ) q WHERE first OR place <= :newest ORDER BY place
"""


def _rows(session: Session, statement: str, **arguments: Any) -> list[Row[Any]]:
    return list(session.execute(text(statement), arguments).all())


def _reasons(session: Session, run_id: str) -> list[tuple[str, int, list[Row[Any]]]]:
    """(reason, how many, the first of them) of what a run quarantined, the most frequent first."""
    rows = _rows(session, _REASONS, run=run_id, keys=_KEYS_BY_REASON)
    grouped = groupby(rows, key=lambda row: (row.reason, row.total))
    return [(reason, total, list(group)) for (reason, total), group in grouped]


def _stages(stats: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds of each stage with the widths of its bars in percent, and how many pictures were at
    work and in its queue on average."""
    seconds = max(stats["seconds"], 1e-9)
    working, waiting = stats["working"], stats["waiting"]
    longest = max(working[name] + waiting[name] for name in STAGES) or 1.0
    return [
        {
            "name": name,
            "working": working[name],
            "waiting": waiting[name],
            "at_work": working[name] / seconds,
            "queue": waiting[name] / seconds,
            "work_width": 100 * working[name] / longest,
            "wait_width": 100 * waiting[name] / longest,
        }
        for name in STAGES
    ]


def _shard(row: Row[Any]) -> dict[str, Any]:
    """A shard with its state in words."""
    if row.finished_at is not None:
        state, colour = "finished", "good"
    elif row.lease_until is None:
        state, colour = "waiting", "dim"
    elif row.lease_seconds > 0:
        state, colour = f"held until {row.lease_until:%H:%M:%S}", "wait"
    else:
        state, colour = f"lease lapsed {duration(-row.lease_seconds)} ago", "bad"
    stats = row.stats or {"pictures": 0, "seconds": 0.0, "engines": [], "devices": []}
    return {
        **row._mapping,
        "finished": row.finished_at is not None,
        "state": state,
        "colour": colour,
        "rate": stats["pictures"] / stats["seconds"] if stats["seconds"] else None,
        "engine": ", ".join(stats["engines"] + stats["devices"]),
    }
