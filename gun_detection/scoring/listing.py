"""What a bucket holds, noted in the database: which uploads are new, changed or there again."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice

from sqlalchemy import select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from gun_detection.database import open_engine, open_session
from gun_detection.database.copying import copy_rows
from gun_detection.database.models import SourceListing
from gun_detection.errors import ServiceUnavailableError
from gun_detection.scoring.inventory import locate, read_inventory
from gun_detection.scoring.pending import judged_anew
from gun_detection.scoring.sources import Source
from gun_detection.settings import Settings
from gun_detection.storage import Storage, StoredObject

logger = logging.getLogger(__name__)

# So much younger may be what an inventory does not show yet: it is made over hours.
_LAG = timedelta(days=1)
# Rows of one transaction: large enough for COPY to pay, small enough for memory to stay flat.
_CHUNK = 20_000
_LOCK = 0x67756E6C


@dataclass
class Listed:
    """Counts of one listing: objects of interest, and among them the versions that were not
    known (`new` keys, `changed` bytes under a known key) or came back (`returned`)."""

    objects: int = 0
    left_out: int = 0
    new: int = 0
    changed: int = 0
    returned: int = 0


def note_uploads(source: Source, settings: Settings, storage: Storage, *, wait: bool) -> Listed:
    """List a source and note every upload in it.

    Whoever lists a bucket does so alone, so that an older listing never overtakes a newer one;
    without `wait` a listing that is under way raises `ServiceUnavailableError` (LISTING_HELD).
    """
    counts = Listed()
    with _alone(source.bucket, settings, wait=wait):
        began, made_at = datetime.now(UTC), None
        live = source.inventory is None
        if source.inventory is not None:
            where, made_at = locate(storage, source.inventory)
            source = source.model_copy(update={"inventory": where})
        wanted = _wanted(_objects(source, settings, storage), source, counts)
        while chunk := list(islice(wanted, _CHUNK)):
            with open_session(settings) as session:
                _note(session, source.bucket, chunk, counts, live=live, made_at=made_at)
        if source.partitions is not None:
            _note_listing(source, began, settings)
    logger.info(
        "s3://%s/%s: %d objects, %d of them new, %d changed, %d there again, %d left out",
        source.bucket,
        source.prefix,
        counts.objects,
        counts.new,
        counts.changed,
        counts.returned,
        counts.left_out,
    )
    return counts


def note_objects(
    bucket: str,
    objects: Iterable[StoredObject],
    settings: Settings,
    restored: Sequence[StoredObject] = (),
) -> Listed:
    """Note uploads that somebody told of, as a queue of events does.

    What was `restored` from an archive has the bytes that it had: it is judged anew where it could
    not be had before. Raises `ServiceUnavailableError` (LISTING_HELD) while the bucket is being
    listed.
    """
    counts = Listed()
    remaining = iter(objects)
    with _alone(bucket, settings, wait=False):
        while chunk := list(islice(remaining, _CHUNK)):
            counts.objects += len(chunk)
            with open_session(settings) as session:
                _note(session, bucket, chunk, counts, live=False)
        if restored:
            arguments = {
                "bucket": bucket,
                "keys": [item.key for item in restored],
                "etags": [item.etag for item in restored],
            }
            with open_session(settings) as session:
                counts.returned += session.execute(_RESTORED, arguments).scalar_one()
    return counts


def sort_out(session: Session, chosen: list[Source], configured: list[Source]) -> None:
    """Of the uploads that wait, note which are wanted: those of the `chosen` sources, and others
    only as long as a `configured` one covers them.

    What a source no longer covers would wait for ever, and hide what really is late.
    """
    sources = [*chosen, *configured]
    waiting = session.execute(_WAITING, execution_options={"yield_per": _CHUNK})
    for rows in waiting.partitions():
        changed: dict[bool, list[int]] = {True: [], False: []}
        for row in rows:
            wanted = any(source.covers(row.bucket, row.key) for source in sources)
            if wanted != row.wanted:
                changed[wanted].append(row.upload_id)
        for wanted, ids in changed.items():
            if ids:
                session.execute(_WANTED, {"wanted": wanted, "ids": ids})
                said = "wanted again" if wanted else "not wanted by any source any more"
                logger.info("%d uploads that wait are %s", len(ids), said)


_WAITING = text("SELECT upload_id, bucket, key, wanted FROM pending_upload")
# What is held has its outcome written, and waits no longer. To wait for it while others wait for
# this could go round in a circle.
_WANTED = text(
    """
    UPDATE pending_upload SET wanted = :wanted WHERE upload_id IN (
        SELECT upload_id FROM pending_upload WHERE upload_id = ANY(CAST(:ids AS bigint[]))
        FOR UPDATE SKIP LOCKED
    )
    """
)


def _objects(source: Source, settings: Settings, storage: Storage) -> Iterator[StoredObject]:
    if source.inventory is not None:
        listed = read_inventory(storage, source.inventory, bucket=source.bucket)
        return (item for item in listed if item.key.startswith(source.prefix))
    now, last = datetime.now(UTC), None
    if source.partitions is not None:
        with open_session(settings) as session:
            last = session.scalar(
                select(SourceListing.listed_at).where(
                    SourceListing.bucket == source.bucket, SourceListing.prefix == source.prefix
                )
            )
    return (
        item
        for prefix in source.prefixes(now, last)
        for item in storage.list_objects(source.bucket, prefix)
    )


def _note_listing(source: Source, began: datetime, settings: Settings) -> None:
    """Note that the source was listed whole: after an outage it goes on from there."""
    statement = insert(SourceListing).values(
        bucket=source.bucket, prefix=source.prefix, listed_at=began
    )
    with open_session(settings) as session:
        session.execute(
            statement.on_conflict_do_update(
                index_elements=["bucket", "prefix"], set_={"listed_at": began}
            )
        )


def _wanted(
    objects: Iterable[StoredObject], source: Source, counts: Listed
) -> Iterator[StoredObject]:
    for item in objects:
        if "\0" in item.key:
            # No request can name it, and PostgreSQL cannot hold it.
            logger.warning("left out %r: a key with a NUL cannot be read", item.key)
        elif source.wants(item.key):
            counts.objects += 1
            yield item
            continue
        counts.left_out += 1


@contextmanager
def _alone(bucket: str, settings: Settings, *, wait: bool) -> Iterator[None]:
    """Hold the lock of a bucket's listing; it goes with the connection when this process dies."""
    name = "pg_advisory_lock" if wait else "pg_try_advisory_lock"
    arguments = {"lock": _LOCK, "bucket": bucket}
    with open_engine(settings).connect() as connection:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        got = connection.scalar(text(f"SELECT {name}(:lock, hashtext(:bucket))"), arguments)
        if got is False:
            raise ServiceUnavailableError(
                f"{bucket} is being listed by somebody else", reason="LISTING_HELD"
            )
        try:
            yield
        finally:
            connection.execute(
                text("SELECT pg_advisory_unlock(:lock, hashtext(:bucket))"), arguments
            )


def _note(
    session: Session,
    bucket: str,
    chunk: list[StoredObject],
    counts: Listed,
    *,
    live: bool,
    made_at: datetime | None = None,
) -> None:
    """Bring the table up to what this part of a listing shows.

    What is not `live`, an inventory or an event, shows how things were at its time, and may come
    late, or again: it changes nothing about what is known to be newer. An inventory that was
    `made_at` some time shows how things were then, however old its objects: a version may be gone
    that lay over an older one, or a delete marker.
    """
    session.execute(_LISTED)
    columns = ("key", "etag", "size", "uploaded_at")
    rows = ((item.key, item.etag, item.size, item.last_modified) for item in chunk)
    copy_rows(session, "listed", columns, rows)
    session.execute(_SEEN, {"bucket": bucket})
    shown = {"shown": made_at - _LAG if made_at is not None else None}
    if not live:
        session.execute(_PASS_OVER_OLD, shown)
    found = session.execute(_COUNTS).one()
    for statement in (_SEEN_LATER, _SUPERSEDE, _NO_LONGER_PENDING, _INSERT, _RESTORE):
        session.execute(statement, {"bucket": bucket} if statement is _INSERT else {})
    there_again = session.execute(_THERE_AGAIN, {"live": live} | shown).scalar_one()
    counts.new += found.new
    counts.changed += found.changed
    counts.returned += found.returned + there_again


_LISTED = text(
    """
    CREATE TEMP TABLE listed (key text, etag text, size bigint, uploaded_at timestamptz)
    ON COMMIT DROP
    """
)

# What is current under the listed keys, and which version the listing shows. A subquery with a
# limit, and an array of ids below, are looked up one by one whatever PostgreSQL expects of a join,
# which may be to read all of a table for each part of a listing.
_SEEN = text(
    """
    CREATE TEMP TABLE seen ON COMMIT DROP AS
    SELECT DISTINCT ON (l.key) l.*, c.id AS current_id, c.uploaded_at AS known_at, c.first_seen_at,
           CASE WHEN c.etag = l.etag THEN c.id ELSE (
               SELECT u.id FROM upload u
               WHERE u.bucket = :bucket AND u.key = l.key AND u.etag = l.etag
           ) END AS known_id
    FROM listed l LEFT JOIN LATERAL (
        SELECT id, etag, uploaded_at, first_seen_at FROM upload
        WHERE bucket = :bucket AND key = l.key AND current LIMIT 1
    ) c ON true
    ORDER BY l.key, l.uploaded_at DESC
    """
)

# What was first seen after an inventory was made is not in it, however old that may be: what is
# copied from one bucket to another can keep its time.
_PASS_OVER_OLD = text(
    """
    DELETE FROM seen WHERE known_id IS DISTINCT FROM current_id
    AND GREATEST(
        uploaded_at,
        CASE WHEN first_seen_at < :shown THEN CAST(:shown AS timestamptz) END
    ) < known_at
    """
)

# The same bytes put once more: what was put between the two times, and is told of late, is old.
_SEEN_LATER = text(
    """
    UPDATE upload SET uploaded_at = s.uploaded_at FROM seen s
    WHERE s.known_id = upload.id AND id = ANY(ARRAY(
        SELECT known_id FROM seen WHERE known_id = current_id AND uploaded_at > known_at
    ))
    """
)

_COUNTS = text(
    """
    SELECT COUNT(*) FILTER (WHERE known_id IS NULL AND current_id IS NULL) AS new,
           COUNT(*) FILTER (WHERE known_id IS DISTINCT FROM current_id
                            AND current_id IS NOT NULL) AS changed,
           COUNT(*) FILTER (WHERE known_id IS NOT NULL AND current_id IS NULL) AS returned
    FROM seen
    """
)

_SUPERSEDE = text(
    """
    UPDATE upload SET current = false
    WHERE id = ANY(ARRAY(SELECT current_id FROM seen WHERE current_id IS DISTINCT FROM known_id))
    """
)

# A statement of its own sees what others added until the upload was locked.
_NO_LONGER_PENDING = text(
    """
    DELETE FROM pending_upload
    WHERE upload_id = ANY(ARRAY(
        SELECT current_id FROM seen WHERE current_id IS DISTINCT FROM known_id
    ))
    """
)

_INSERT = text(
    """
    WITH noted AS (
        INSERT INTO upload (bucket, key, etag, size, uploaded_at)
        SELECT :bucket, key, etag, size, uploaded_at FROM seen
        WHERE known_id IS NULL ORDER BY uploaded_at, key
        RETURNING id, bucket, key, size, uploaded_at
    )
    INSERT INTO pending_upload (upload_id, bucket, key, size, uploaded_at, waits_since)
    SELECT *, uploaded_at FROM noted
    """
)

# Bytes that were overwritten and are back: they keep the outcome that they have.
_RESTORE = text(
    """
    WITH restored AS (
        UPDATE upload SET current = true, uploaded_at = s.uploaded_at
        FROM seen s WHERE s.known_id = upload.id
        AND id = ANY(ARRAY(SELECT known_id FROM seen WHERE known_id IS DISTINCT FROM current_id))
        RETURNING id, bucket, upload.key, upload.size, upload.uploaded_at
    )
    INSERT INTO pending_upload (upload_id, bucket, key, size, uploaded_at, waits_since, deferred)
    SELECT r.*, r.uploaded_at, EXISTS (SELECT FROM ledger l WHERE l.upload_id = r.id)
    FROM restored r
    WHERE NOT EXISTS (SELECT FROM ledger l WHERE l.upload_id = r.id AND NOT l.stale)
    ON CONFLICT DO NOTHING
    """
)

# What was gone when it was to be read, and is listed again, has no true outcome yet. An outcome is
# written a while after the picture was missed, by another clock than that of the uploads. What was
# listed before it was gone may be looked at once more for that: its next outcome is later.
_THERE_AGAIN = judged_anew(
    """
    l.upload_id = ANY(ARRAY(SELECT known_id FROM seen))
    AND l.reason IN ('OBJECT_MISSING', 'OBJECT_CHANGED') AND NOT l.stale
    AND (CAST(:live AS boolean) OR EXISTS (
        SELECT FROM seen s
        WHERE s.known_id = l.upload_id
        AND GREATEST(s.uploaded_at, CAST(:shown AS timestamptz))
            > l.created_at - interval '15 minutes'
    ))
    """
)

# Of a key that was overwritten, an older version may be restored.
_RESTORED = judged_anew(
    """
    l.upload_id = ANY(ARRAY(
        SELECT (
            SELECT id FROM upload
            WHERE bucket = :bucket AND key = r.key AND current AND etag = r.etag LIMIT 1
        ) FROM unnest(CAST(:keys AS text[]), CAST(:etags AS text[])) AS r(key, etag)
    )) AND l.reason IN ('ARCHIVED', 'REQUEST_REFUSED') AND NOT l.stale
    """
)
