"""The ledger: one outcome per upload and model, written in fenced, idempotent transactions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import text
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.copying import copy_arrays
from gun_detection.detector.detections import Detections
from gun_detection.scoring.leases import Lease, renew
from gun_detection.settings import Settings


@dataclass(frozen=True)
class Outcome:
    """What became of one upload: detections, or the reason for its quarantine.

    `width` and `height` are those of the upright picture, in pixels.
    """

    upload_id: int
    sha256: str | None
    detections: Detections | None = None
    reason: str | None = None
    message: str | None = None
    width: int | None = None
    height: int | None = None
    decode_ms: float | None = None
    inference_ms: float | None = None
    engine: str | None = None


def write_outcomes(lease: Lease, outcomes: Sequence[Outcome], settings: Settings) -> int:
    """Write a batch in one transaction and renew the lease; the number of outcomes written.

    An outcome that exists stays as it is, so writing twice changes nothing; only a stale one is
    replaced. Raises `StaleAttemptError` when another attempt took the shard over: nothing is
    written then.
    """
    arguments = {
        "model": lease.model_id,
        "run": lease.run_id,
        "shard": lease.shard_id,
        "attempt": lease.attempt,
        # One value for all rows: as arrays, each of theirs is parsed and planned as an expression.
        "rows": json.dumps([_outcome_row(outcome) for outcome in outcomes]),
    }
    with open_session(settings) as session:
        renew(session, lease, settings)
        ids = {row.upload_id: row.id for row in session.execute(_UPSERT, arguments)}
        written = [
            (ids[outcome.upload_id], outcome.detections)
            for outcome in outcomes
            if outcome.upload_id in ids and outcome.detections is not None
        ]
        if written:
            copy_arrays(session, "detection", _detection_columns(written))
    return len(ids)


def earlier_outcomes(
    session: Session, digests: Sequence[str], model_id: str, run_id: str
) -> dict[str, Outcome]:
    """What the same model found in the same bytes before, by sha256; it cost nothing this time.

    Bytes that two processes died of in the same run kill no others.
    """
    # Where most bytes are the same, the planner would look for those of others in the whole table.
    session.execute(text("SET LOCAL enable_seqscan = off"))
    arguments = {"digests": list(set(digests)), "model": model_id, "run": run_id}
    entries = session.execute(_EARLIER, arguments).all()
    if not entries:
        return {}
    scored = [entry.id for entry in entries if entry.reason is None]
    rows: dict[int, list[tuple[float, ...]]] = {ledger_id: [] for ledger_id in scored}
    for ledger_id, *values in session.execute(_FOUND_EARLIER, {"ids": list(rows)}):
        rows[ledger_id].append(tuple(values))
    outcomes = {}
    for entry in entries:
        if entry.reason is not None:
            outcomes[entry.sha256] = Outcome(
                entry.upload_id, entry.sha256, reason=entry.reason, message=entry.message
            )
            continue
        table = np.array(rows[entry.id], dtype=np.float32).reshape(-1, 5)
        outcomes[entry.sha256] = Outcome(
            upload_id=entry.upload_id,
            sha256=entry.sha256,
            detections=Detections(table[:, :4], table[:, 4]),
            width=entry.width,
            height=entry.height,
            decode_ms=0.0,
            inference_ms=0.0,
            engine=entry.engine,
        )
    return outcomes


# Any will do. The same bytes can be those of millions of uploads, as of a camera without a signal:
# a few are looked at, whatever became of the others.
_EARLIER = text(
    """
    SELECT l.id, l.upload_id, l.sha256, l.width, l.height, l.engine, l.reason, l.message
    FROM unnest(CAST(:digests AS text[])) AS wanted(sha256)
    CROSS JOIN LATERAL (
        SELECT * FROM (
            SELECT * FROM ledger WHERE sha256 = wanted.sha256 AND model_id = :model LIMIT 10
        ) few
        WHERE outcome = 'scored' OR reason = 'CRASHED' AND run_id = :run AND NOT stale
        ORDER BY outcome = 'scored' DESC LIMIT 1
    ) l
    """
)
_FOUND_EARLIER = text(
    """
    SELECT ledger_id, x1, y1, x2, y2, score FROM detection
    WHERE ledger_id = ANY(:ids) ORDER BY id
    """
)
_COLUMNS = {
    "upload_id": "bigint",
    "reason": "text",
    "message": "text",
    "sha256": "text",
    "width": "int",
    "height": "int",
    "decode_ms": "float8",
    "inference_ms": "float8",
    "engine": "text",
}
_NAMES = ", ".join(_COLUMNS)
_TYPED = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())

# In the order of the ids, so that two writers never wait for each other in a circle.
_UPSERT = text(
    f"""
    WITH found AS (
        SELECT * FROM json_to_recordset(CAST(:rows AS json)) AS f({_TYPED}) ORDER BY upload_id
    ), done AS (
        DELETE FROM pending_upload WHERE upload_id = ANY(ARRAY(SELECT upload_id FROM found))
    )
    INSERT INTO ledger AS l (model_id, run_id, shard_id, attempt, outcome, {_NAMES})
    SELECT :model, :run, :shard, :attempt,
           CASE WHEN reason IS NULL THEN 'scored' ELSE 'quarantined' END, {_NAMES}
    FROM found
    ON CONFLICT (upload_id, model_id) DO UPDATE SET
        run_id = excluded.run_id, shard_id = excluded.shard_id, attempt = excluded.attempt,
        outcome = excluded.outcome, reason = excluded.reason, message = excluded.message,
        sha256 = excluded.sha256, width = excluded.width, height = excluded.height,
        decode_ms = excluded.decode_ms, inference_ms = excluded.inference_ms,
        engine = excluded.engine, created_at = now(), stale = false, tries = l.tries + 1
    WHERE l.stale
    RETURNING l.upload_id, l.id
"""
)


def _outcome_row(outcome: Outcome) -> dict[str, object]:
    row = {name: getattr(outcome, name) for name in _COLUMNS}
    # PostgreSQL text holds no NUL, and a message may quote hostile bytes.
    return row | {"message": outcome.message.replace("\0", "")[:500] if outcome.message else None}


def _detection_columns(written: list[tuple[int, Detections]]) -> dict[str, NDArray[Any]]:
    """Columns of the table, for (ledger id, detections): as found, best first."""
    boxes = np.concatenate([found.boxes for _, found in written]).astype(np.float64)
    counts = [len(found.scores) for _, found in written]
    ids = np.repeat(np.array([ledger_id for ledger_id, _ in written], np.int64), counts)
    scores = np.concatenate([found.scores for _, found in written]).astype(np.float64)
    x1, y1, x2, y2 = boxes.T
    return {"ledger_id": ids, "x1": x1, "y1": y1, "x2": x2, "y2": y2, "score": scores}
