"""Planning a night: what to score of 1,000,000 listed keys, beside a ledger of 10,000,000 rows.

    python benchmarks/planning.py [--ledger N] [--listed N …] [--new PERCENT] [--objects N]

Lists `--objects` real objects of SeaweedFS through our paging, and takes the time of its pages of
1,000 as that of the pages of every listing. Then fills a PostgreSQL, whose commits wait for the
disk, with a ledger row for each known upload, in the order of their times, which is not that of the
keys, and plans a run for each size in a process of its own: of the listed keys one in a hundred has
other bytes than before and `--new` per cent are new. The keys come from a generator instead of a
server, everything else is the real survey and the real run with its shards. Prints the seconds of
both sides, their ratio, the planner's peak memory, and how the time grows with the size.
"""

import argparse
import asyncio
import hashlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import obstore
from durable import durable_database, server_cpu
from obstore.store import S3Store
from pydantic import SecretStr
from sqlalchemy import Connection, text

from embedded.servers import make_bucket, temporary_servers
from gun_detection.database import open_engine, open_session
from gun_detection.database.models import ModelVersion
from gun_detection.scoring.plan import open_run, survey
from gun_detection.scoring.sources import Source
from gun_detection.settings import Settings, load_settings
from gun_detection.storage import Storage, StoredObject

PAGE = 1000
START = datetime(2026, 1, 1, tzinfo=UTC)
MODEL = "mobilenet-v2-fpn-0123456789ab"
# A prime: multiples of it, modulo the number of rows, visit every row and no two neighbours.
STRIDE = 7_368_787


@dataclass(frozen=True)
class Listing:
    """`count` keys of one bucket: one in a hundred changed, `new` in a hundred not known."""

    count: int
    new: int

    @property
    def bucket(self) -> str:
        return f"uploads-{self.count}"

    @property
    def known(self) -> int:
        return self.count * (100 - self.new) // 100

    def objects(self) -> Iterator[StoredObject]:
        """In the order of the keys, as a server lists them."""
        for number in range(self.count):
            changed = "changed " if number % 100 == 0 else ""
            yield StoredObject(
                self.bucket,
                f"site-{number // 100_000:03d}/camera-{number // 1000 % 100:02d}/{number:09d}.jpg",
                200_000,
                hashlib.md5(f"{changed}{number}".encode()).hexdigest(),
                START + timedelta(seconds=number),
            )


class Generated(Storage):
    """A server that holds the keys of one listing."""

    def __init__(self, settings: Settings, listing: Listing) -> None:
        super().__init__(settings)
        self._listing = listing

    def bucket_exists(self, bucket: str) -> bool:
        return True

    def list_objects(self, bucket: str, prefix: str = "") -> Iterator[StoredObject]:
        return self._listing.objects()


@dataclass(frozen=True)
class Cost:
    """Of one plan: seconds of the survey and of opening the run, CPU seconds of the planner and of
    PostgreSQL, peak memory of the planner in MiB."""

    survey: float
    opening: float
    client: float
    server: float
    memory: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ledger", type=int, default=10_000_000)
    parser.add_argument("--listed", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--new", type=int, default=9, metavar="PERCENT")
    parser.add_argument("--objects", type=int, default=20_000)
    arguments = parser.parse_args()
    listings = [Listing(count, arguments.new) for count in arguments.listed]
    page = list_really(arguments.objects)
    with durable_database() as settings:
        start = time.perf_counter()
        fill(listings, arguments.ledger, settings)
        seconds = time.perf_counter() - start
        print(f"{arguments.ledger:,} ledger rows made in {seconds:.0f} s\n", flush=True)
        costs = [_apart(listing, settings) for listing in listings]
    _print(listings, costs, page)


def list_really(objects: int) -> float:
    """Seconds of a page of a listing."""
    with temporary_servers() as servers:
        os.environ |= servers.variables("postgres", "data", "uploads")
        settings = load_settings()
        storage = Storage(settings)
        make_bucket(storage, settings.uploads_bucket)
        asyncio.run(_put(objects, settings))
        start, cpu = time.perf_counter(), time.process_time()
        found = sum(1 for _ in storage.list_objects(settings.uploads_bucket))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert found == objects
    pages = -(-objects // PAGE)
    print(
        f"{objects:,} objects listed in {seconds:.2f} s, {pages} pages of {PAGE:,}: "
        f"{1000 * seconds / pages:.0f} ms a page, of which {1000 * cpu / pages:.0f} ms are CPU of "
        "the client"
    )
    return seconds / pages


async def _put(objects: int, settings: Settings) -> None:
    assert settings.s3_secret_access_key is not None
    store = S3Store(
        settings.uploads_bucket,
        endpoint=settings.s3_endpoint_url,
        region=settings.s3_region,
        access_key_id=settings.s3_access_key_id,
        secret_access_key=settings.s3_secret_access_key.get_secret_value(),
        client_options={"allow_http": True},
    )
    limit = asyncio.Semaphore(32)

    async def put(key: str) -> None:
        async with limit:
            await obstore.put_async(store, key, b"x", use_multipart=False)

    await asyncio.gather(*(put(item.key) for item in Listing(objects, 0).objects()))


def fill(listings: list[Listing], rows: int, settings: Settings) -> None:
    """A ledger of so many rows: the known keys of the listings, and for the rest an archive."""
    parts, first = [], 0
    for listing in listings:
        parts.append(f"('{listing.bucket}', {first}, {first + listing.known}, {listing.new})")
        first += listing.known
    assert first <= rows, f"a ledger of {rows:,} rows has no room for {first:,} known keys"
    assert rows % STRIDE
    with open_engine(settings).connect() as connection:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        # Only while this is made: few checkpoints, no foreign keys, indexes afterwards.
        connection.execute(text("ALTER SYSTEM SET max_wal_size = '8GB'"))
        connection.execute(text("SELECT pg_reload_conf()"))
        connection.execute(text("SET session_replication_role = replica"))
        connection.execute(text("SET maintenance_work_mem = '1GB'"))
        definitions = _drop_indexes(connection)
        connection.execute(text(_RUN), {"model": MODEL})
        uploads = {"rows": rows, "stride": STRIDE, "start": START}
        connection.execute(text(_UPLOADS.format(listings=", ".join(parts))), uploads)
        connection.execute(text(_LEDGER), {"model": MODEL})
        for statement in (
            *definitions,
            "SELECT setval(pg_get_serial_sequence('upload', 'id'), MAX(id)) FROM upload",
            "VACUUM ANALYZE upload",
            "VACUUM ANALYZE ledger",
            "ALTER SYSTEM RESET max_wal_size",
            "SELECT pg_reload_conf()",
            "CHECKPOINT",
        ):
            connection.execute(text(statement))
    open_engine(settings).dispose()


def _drop_indexes(connection: Connection) -> list[str]:
    """What makes them again: all but the primary keys."""
    definitions = []
    for row in connection.execute(text(_CONSTRAINTS)).all():
        connection.execute(text(f"ALTER TABLE {row.owner} DROP CONSTRAINT {row.name}"))
        definitions.append(f"ALTER TABLE {row.owner} ADD CONSTRAINT {row.name} {row.definition}")
    for row in connection.execute(text(_INDEXES)).all():
        connection.execute(text(f"DROP INDEX {row.name}"))
        definitions.append(row.definition)
    return definitions


_CONSTRAINTS = """
    SELECT conrelid::regclass AS owner, conname AS name, pg_get_constraintdef(oid) AS definition
    FROM pg_constraint
    WHERE conrelid IN ('upload'::regclass, 'ledger'::regclass) AND contype = 'u'
"""

_INDEXES = """
    SELECT indexrelid::regclass AS name, pg_get_indexdef(indexrelid) AS definition
    FROM pg_index
    WHERE indrelid IN ('upload'::regclass, 'ledger'::regclass) AND NOT indisprimary
"""

_RUN = """
    WITH model AS (
        INSERT INTO model_version (id, architecture, config, config_hash, code_version,
                                   weights_key, weights_sha256, threshold, training)
        VALUES (:model, 'a', '{}', 'c', 'v', 'k', 's', 0.5, '{}') RETURNING id
    ), run AS (
        INSERT INTO scoring_run (id, model_id, bucket, prefix, threshold, planned, left_over, state)
        SELECT 'before', id, '', '', 0.5, 0, 0, 'finished' FROM model RETURNING id
    )
    INSERT INTO shard (run_id, number, upload_ids) SELECT id, 0, '{}' FROM run
"""

# Row after row as time went by; `n` is where the key of a row stands in the order of the keys.
_UPLOADS = """
    INSERT INTO upload (id, bucket, key, etag, size, uploaded_at)
    OVERRIDING SYSTEM VALUE
    SELECT i + 1, COALESCE(bucket, 'archive'),
           'site-' || to_char(m / 100000, 'FM000') || '/camera-' || to_char(m / 1000 % 100, 'FM00')
           || '/' || to_char(m, 'FM000000000') || '.jpg',
           md5(m::text), 200000, CAST(:start AS timestamptz) + i * interval '1 second'
    FROM (
        SELECT i, bucket, CASE
            WHEN bucket IS NULL THEN n
            WHEN (n - first) % (100 - new) = 0 THEN (n - first) / (100 - new) * 100
            ELSE (n - first) / (100 - new) * 100 + (n - first) % (100 - new) + new
        END AS m
        FROM (SELECT i, i * :stride % :rows AS n FROM generate_series(0::bigint, :rows - 1) i) r
        LEFT JOIN (VALUES {listings}) AS l (bucket, first, after, new)
        ON n >= first AND n < after
    ) numbered
"""

_LEDGER = """
    INSERT INTO ledger (upload_id, model_id, run_id, shard_id, attempt, outcome, reason, sha256,
                        width, height, decode_ms, inference_ms, engine)
    SELECT id, :model, 'before', 1, 1,
           CASE WHEN id % 100 = 0 THEN 'quarantined' ELSE 'scored' END,
           CASE WHEN id % 100 = 0 THEN 'CORRUPT' END, etag || md5(id::text),
           640, 480, 5.25, 70.125, 'openvino-int8'
    FROM upload ORDER BY id
"""


def _apart(listing: Listing, settings: Settings) -> Cost:
    """What a plan costs, in a process of its own."""
    assert settings.database_url is not None
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(plan, (listing, settings.database_url.get_secret_value()))


def plan(listing: Listing, url: str) -> Cost:
    changes = {"database_url": SecretStr(url), "run_images": listing.count}
    settings = load_settings().model_copy(update=changes)
    sources = [Source(bucket=listing.bucket)]
    storage = Generated(settings, listing)
    with open_session(settings) as session:
        model = session.get_one(ModelVersion, MODEL)
    server, client, start = server_cpu(settings), time.process_time(), time.perf_counter()
    found = survey("new", model, sources, settings, storage)
    middle = time.perf_counter()
    with open_session(settings) as session:
        made = open_run(found, model, sources, settings, session)
    end, client = time.perf_counter(), time.process_time() - client
    new, changed = listing.count * listing.new // 100, listing.count // 100
    counted = (found.listed, found.new, found.changed, found.planned, made.planned)
    assert counted == (listing.count, new, changed, new + changed, new + changed), counted
    return Cost(middle - start, end - middle, client, server_cpu(settings) - server, _peak())


def _peak() -> float:
    """MiB; `ru_maxrss` would count the parent's, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def _print(listings: list[Listing], costs: list[Cost], page: float) -> None:
    print("    listed  listing   survey  opening  ratio  CPU: planner, server  peak memory")
    for listing, cost in zip(listings, costs, strict=True):
        seconds = listing.count / PAGE * page
        print(
            f"{listing.count:10,}{seconds:7.1f} s{cost.survey:7.1f} s{cost.opening:7.1f} s"
            f"{seconds / (cost.survey + cost.opening):7.1f}"
            f"{cost.client:12.1f} s{cost.server:6.1f} s{cost.memory:9.0f} MiB"
        )
    first, last = costs[0], costs[-1]
    seconds = (last.survey + last.opening) / (first.survey + first.opening)
    cpu = (last.client + last.server) / (first.client + first.server)
    print(
        f"{listings[-1].count / listings[0].count:.1f} times the keys take {seconds:.1f} times the "
        f"seconds and {cpu:.1f} times the CPU seconds"
    )


if __name__ == "__main__":
    main()
