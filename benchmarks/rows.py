"""How much room an upload takes in PostgreSQL, from its listing to its detections.

    python benchmarks/rows.py [--pictures N] [--boxes N] [--rounds N]

Notes N uploads and scores them with outcomes of `--boxes` detections through the real functions, in
rounds, each followed by the vacuum that the server does by itself sooner or later. Prints bytes for
each upload by table, with its indexes, those of a detection, and the write-ahead log, which is what
replicas and archives take.
"""

import argparse
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import numpy as np
from durable import durable_database
from sqlalchemy import insert, text

from gun_detection.database import open_engine, open_session
from gun_detection.database.models import ModelVersion, ScoringRun, Shard
from gun_detection.detector.detections import Detections
from gun_detection.scoring.leases import Lease, claim_shard, finish_shard
from gun_detection.scoring.ledger import Outcome, write_outcomes
from gun_detection.scoring.listing import note_objects
from gun_detection.settings import Settings
from gun_detection.storage import StoredObject

BUCKET, MODEL, BATCH = "uploads", "mobilenet-v2-fpn-0123456789ab", 64
TABLES = ("upload", "pending_upload", "ledger", "detection", "shard")
START = datetime(2026, 1, 1, tzinfo=UTC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--boxes", type=int, default=5, help="detections of each picture")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    each = arguments.pictures // arguments.rounds
    with durable_database() as settings:
        _prepare(settings)
        log = _position(settings)
        for number in range(arguments.rounds):
            note_objects(BUCKET, _objects(number * each, each), settings)
            _score(number, arguments.boxes, settings)
            _vacuum(settings)
        log = _position(settings) - log
        _print(each * arguments.rounds, arguments.boxes, log, settings)


def _prepare(settings: Settings) -> None:
    with open_session(settings) as session:
        session.add(
            ModelVersion(
                id=MODEL,
                architecture="mobilenet_v2_fpn",
                config={},
                config_hash="",
                code_version="",
                weights_key="",
                weights_sha256="",
                threshold=0.5,
                training={},
            )
        )
        session.flush()
        session.add(
            ScoringRun(
                id="airflow:score_uploads:scheduled__2026-01-01T03:00:00+00:00",
                model_id=MODEL,
                bucket=BUCKET,
                prefix="",
                threshold=0.5,
                planned=0,
                left_over=0,
            )
        )


def _objects(first: int, count: int) -> Iterator[StoredObject]:
    random = np.random.default_rng(first)
    for number in range(first, first + count):
        key = f"site-{number % 40:03d}/camera-{number % 97:02d}/{number:012d}.jpg"
        moment = START + timedelta(seconds=number)
        yield StoredObject(BUCKET, key, 200_000, random.bytes(16).hex(), moment)


def _score(number: int, boxes: int, settings: Settings) -> None:
    with open_session(settings) as session:
        run_id = session.execute(text("SELECT id FROM scoring_run")).scalar_one()
        pending = session.scalars(text("SELECT upload_id FROM pending_upload ORDER BY 1")).all()
        shard_id = session.execute(
            insert(Shard)
            .values(run_id=run_id, number=number, upload_ids=list(pending))
            .returning(Shard.id)
        ).scalar_one()
    lease = claim_shard(shard_id, settings)
    outcomes = _outcomes(lease, boxes)
    for first in range(0, len(outcomes), BATCH):
        write_outcomes(lease, outcomes[first : first + BATCH], settings)
    finish_shard(lease, settings)


def _outcomes(lease: Lease, boxes: int) -> list[Outcome]:
    random = np.random.default_rng(lease.shard_id)
    found = []
    for item in lease.items:
        corners = random.uniform(0, 500, (boxes, 2)).astype(np.float32)
        sides = random.uniform(5, 100, (boxes, 2)).astype(np.float32)
        scores = random.uniform(0.05, 1, boxes).astype(np.float32)
        found.append(
            Outcome(
                item.id,
                random.bytes(32).hex(),
                Detections(np.hstack([corners, corners + sides]), scores),
                width=640,
                height=480,
                decode_ms=round(random.uniform(2, 9), 3),
                inference_ms=round(random.uniform(50, 90), 3),
                engine="openvino-int8",
            )
        )
    return found


def _vacuum(settings: Settings) -> None:
    with open_engine(settings).connect() as connection:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.execute(text(f"VACUUM ANALYZE {', '.join(TABLES)}"))


def _position(settings: Settings) -> int:
    """Bytes of write-ahead log since the server was made."""
    with open_session(settings) as session:
        return int(session.scalar(text("SELECT pg_current_wal_lsn() - '0/0'")) or 0)


def _print(pictures: int, boxes: int, log: int, settings: Settings) -> None:
    sizes = "SELECT pg_total_relation_size(:name) AS whole, pg_indexes_size(:name) AS indexes"
    whole = 0
    print(f"{pictures:,} uploads of {boxes} detections, bytes an upload")
    with open_session(settings) as session:
        for name in TABLES:
            row = session.execute(text(sizes), {"name": name}).one()
            whole += row.whole
            print(
                f"{name:10s}{row.whole / pictures:8.0f}   of which indexes "
                f"{row.indexes / pictures:.0f}"
            )
            if name == "detection":
                print(f"           {row.whole / pictures / boxes:7.0f}   a detection")
    print(f"together  {whole / pictures:8.0f}\nlog       {log / pictures:8.0f}")


if __name__ == "__main__":
    main()
