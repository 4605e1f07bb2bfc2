"""Writing outcomes: our COPY and upsert beside SQLAlchemy's bulk insert of the same rows.

    python benchmarks/writing.py [--pictures N] [--boxes N] [--batches N …] [--passes N]

Both write the same ledger rows and detections (20,000 pictures of 5 boxes) into the same server,
whose commits wait for the disk, with the same guarantees: one transaction a batch, in which the
lease is renewed and checked, what exists is left as it is, and uploads no longer wait.
Prints detections a second and CPU seconds of the client and of the server, the best of N passes
that alternate, and the ratios.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from durable import durable_database, server_cpu
from sqlalchemy import delete, insert, text
from sqlalchemy.dialects.postgresql import insert as insert_or_leave

from gun_detection.database import open_session
from gun_detection.database.models import Detection, LedgerEntry, PendingUpload
from gun_detection.detector.detections import Detections
from gun_detection.scoring.leases import Lease, claim_shard, renew
from gun_detection.scoring.ledger import Outcome, write_outcomes
from gun_detection.settings import Settings

Write = Callable[[Lease, Sequence[Outcome], Settings], int]


@dataclass(frozen=True)
class Cost:
    """Seconds of one pass: on the clock, and of the processors of both sides."""

    wall: float
    client: float
    server: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--boxes", type=int, default=5, help="detections of each picture")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 1000])
    parser.add_argument("--passes", type=int, default=3)
    arguments = parser.parse_args()
    writers: dict[str, Write] = {"SQLAlchemy": insert_outcomes, "ours": write_outcomes}
    with durable_database() as settings:
        _prepare(settings)
        for batch in arguments.batches:
            costs: dict[str, list[Cost]] = {name: [] for name in writers}
            for _ in range(arguments.passes):
                for name, write in writers.items():
                    lease = _shard(arguments.pictures, settings)
                    outcomes = _outcomes(lease, arguments.boxes)
                    costs[name].append(_timed(write, lease, outcomes, batch, settings))
                    _check(lease, outcomes, settings)
            _print(costs, arguments.pictures * arguments.boxes, batch)


def insert_outcomes(lease: Lease, outcomes: Sequence[Outcome], settings: Settings) -> int:
    """What SQLAlchemy's documentation advises for many rows, with the guarantees of ours."""
    rows = [
        {
            "upload_id": outcome.upload_id,
            "model_id": lease.model_id,
            "run_id": lease.run_id,
            "shard_id": lease.shard_id,
            "attempt": lease.attempt,
            "outcome": "scored",
            "sha256": outcome.sha256,
            "width": outcome.width,
            "height": outcome.height,
            "decode_ms": outcome.decode_ms,
            "inference_ms": outcome.inference_ms,
            "engine": outcome.engine,
        }
        for outcome in outcomes
    ]
    with open_session(settings) as session:
        renew(session, lease, settings)
        statement = insert_or_leave(LedgerEntry).on_conflict_do_nothing(
            index_elements=["upload_id", "model_id"]
        )
        returned = session.execute(
            statement.returning(LedgerEntry.upload_id, LedgerEntry.id), rows
        ).all()
        ids = {upload_id: ledger_id for upload_id, ledger_id in returned}  # noqa: C416
        boxes = [
            {"ledger_id": ids[outcome.upload_id], "score": score}
            | dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))
            for outcome in outcomes
            if outcome.upload_id in ids and outcome.detections is not None
            for box, score in zip(
                outcome.detections.boxes.tolist(), outcome.detections.scores.tolist(), strict=True
            )
        ]
        if boxes:
            session.execute(insert(Detection), boxes)
        waiting = [outcome.upload_id for outcome in outcomes]
        session.execute(
            delete(PendingUpload)
            .where(PendingUpload.upload_id.in_(waiting))
            .execution_options(synchronize_session=False)
        )
    return len(ids)


def _timed(
    write: Write, lease: Lease, outcomes: list[Outcome], batch: int, settings: Settings
) -> Cost:
    with open_session(settings) as session:
        # Where the last pass ended is no concern of this one.
        session.execute(text("CHECKPOINT"))
    server, client, start = server_cpu(settings), time.process_time(), time.perf_counter()
    for first in range(0, len(outcomes), batch):
        write(lease, outcomes[first : first + batch], settings)
    wall, client = time.perf_counter() - start, time.process_time() - client
    return Cost(wall, client, server_cpu(settings) - server)


def _prepare(settings: Settings) -> None:
    with open_session(settings) as session:
        for statement in (
            "INSERT INTO model_version (id, architecture, config, config_hash, code_version, "
            "weights_key, weights_sha256, threshold, training) "
            "VALUES ('mobilenet-v2-fpn-0123456789ab', 'a', '{}', 'c', 'v', 'k', 's', 0.5, '{}')",
            "INSERT INTO scoring_run (id, model_id, bucket, prefix, threshold, planned, left_over) "
            "VALUES (repeat('r', 32), 'mobilenet-v2-fpn-0123456789ab', 'uploads', '', 0.5, 0, 0)",
        ):
            session.execute(text(statement))


def _shard(pictures: int, settings: Settings) -> Lease:
    """A lease over new uploads."""
    statement = """
        WITH noted AS (
            INSERT INTO upload (bucket, key, etag, size, uploaded_at)
            SELECT 'uploads', gen_random_uuid() || '.jpg', md5(n::text), 200000, now()
            FROM generate_series(1, :pictures) n RETURNING id, bucket, key, size, uploaded_at
        ), waiting AS (
            INSERT INTO pending_upload (upload_id, bucket, key, size, uploaded_at)
            SELECT * FROM noted
        )
        INSERT INTO shard (run_id, number, upload_ids)
        SELECT repeat('r', 32), (SELECT COUNT(*) FROM shard), array_agg(id ORDER BY id) FROM noted
        RETURNING id
    """
    with open_session(settings) as session:
        shard_id = session.execute(text(statement), {"pictures": pictures}).scalar_one()
    with open_session(settings) as session:
        session.execute(text("ANALYZE upload, pending_upload"))
    return claim_shard(shard_id, settings)


def _outcomes(lease: Lease, boxes: int) -> list[Outcome]:
    random = np.random.default_rng(lease.shard_id)
    found = []
    for item in lease.items:
        corners = random.uniform(0, 500, (boxes, 2)).astype(np.float32)
        sides = random.uniform(5, 100, (boxes, 2)).astype(np.float32)
        scores = -np.sort(-random.uniform(0.05, 1, boxes)).astype(np.float32)
        found.append(
            Outcome(
                item.id,
                random.bytes(32).hex(),
                Detections(np.hstack([corners, corners + sides]), scores),
                width=640,
                height=480,
                decode_ms=float(random.uniform(2, 9)),
                inference_ms=float(random.uniform(50, 90)),
                engine="eager",
            )
        )
    return found


def _check(lease: Lease, outcomes: list[Outcome], settings: Settings) -> None:
    """Both left what they were to leave."""
    statement = """
        SELECT COUNT(*), SUM(boxes), (SELECT COUNT(*) FROM pending_upload) FROM (
            SELECT l.id, COUNT(*) AS boxes FROM ledger l JOIN detection d ON d.ledger_id = l.id
            WHERE l.shard_id = :shard GROUP BY l.id
        ) written
    """
    boxes = sum(len(o.detections.scores) for o in outcomes if o.detections is not None)
    with open_session(settings) as session:
        found = tuple(session.execute(text(statement), {"shard": lease.shard_id}).one())
    assert found == (len(outcomes), boxes, 0), found


def _print(costs: dict[str, list[Cost]], rows: int, batch: int) -> None:
    print(f"\n{rows:,} detections in batches of {batch} pictures")
    best = {name: min(many, key=lambda cost: cost.wall) for name, many in costs.items()}
    for name, cost in best.items():
        print(
            f"{name:10s} {rows / cost.wall:9,.0f} detections/s   {cost.wall:5.2f} s   CPU: "
            f"client {cost.client:5.2f} s, server {cost.server:5.2f} s"
        )
    theirs, ours = best["SQLAlchemy"], best["ours"]
    print(
        f"ratio      {theirs.wall / ours.wall:9.1f} on the clock   CPU: client "
        f"{theirs.client / ours.client:.1f}, client and server "
        f"{(theirs.client + theirs.server) / (ours.client + ours.server):.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
