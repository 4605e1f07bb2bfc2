"""What was uploaded since it was last told of: so that nobody waits for the night.

Everything is noted in the database before anybody is told, and told again until it is known to
have arrived: what is uploaded while nothing watches is found by the next look.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import text
from sqlalchemy.dialects.postgresql import insert

from gun_detection.database import open_session
from gun_detection.database.models import UploadWatch
from gun_detection.errors import GunDetectionError
from gun_detection.scoring.events import drain
from gun_detection.scoring.inventory import overdue
from gun_detection.scoring.listing import note_uploads
from gun_detection.scoring.sources import Source, load_sources
from gun_detection.settings import Settings
from gun_detection.storage import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class News:
    """`waiting` counts the uploads of each bucket that nobody was told of; `upto` is the last.

    `more`: a queue was left before it was empty, so that the next look is worth the while soon.
    """

    waiting: dict[str, int]
    upto: dict[str, int]
    more: bool = False


def look(settings: Settings) -> News | None:
    """List the watched sources, or read their queues; None where there is nothing new.

    A source with an inventory and no queue is not watched. Without a champion there is nothing
    to score with, and nobody is told.
    """
    storage = Storage(settings)
    watched = [s for s in load_sources(settings) if s.queue or (s.watch and s.inventory is None)]
    queues: set[str] = set()
    # Why a look failed, by what was looked at.
    looked: dict[str, str | None] = {}
    more = False
    for source in watched:
        if source.queue in queues:
            continue
        place = source.queue or f"s3://{source.bucket}/{source.prefix}"
        looked[place] = None
        try:
            if source.queue is not None:
                queues.add(source.queue)
                sharing = [s for s in watched if s.queue == source.queue]
                more |= drain(sharing, source.queue, settings)
            else:
                note_uploads(source, settings, storage, wait=False)
        except GunDetectionError as error:
            # One bucket that is away must not hide the uploads of the others; and who lists it
            # at this moment notes what is there.
            if error.reason != "LISTING_HELD":
                logger.warning("looking for uploads in %s: %s", source.bucket, error.message)
                looked[place] = error.message
        except Exception as error:
            logger.exception("looking for uploads in %s", source.bucket)
            looked[place] = repr(error)
    with open_session(settings) as session:
        session.execute(text(_NO_LONGER_WATCHED), {"places": list(looked)})
        if looked:
            places = [{"source": place, "message": why} for place, why in sorted(looked.items())]
            session.execute(text(_LOOKED), places)
        rows = session.execute(text(_UNTOLD), {"buckets": [s.bucket for s in watched]}).all()
    if not rows and not more:
        return None
    waiting = {row.bucket: row.waiting for row in rows}
    return News(waiting, {row.bucket: row.upto for row in rows}, more)


def find_silent(sources: list[Source], settings: Settings, storage: Storage) -> dict[str, str]:
    """Of which of these sources nobody hears any more, and why: their queue, which is read, cannot
    be, or their inventories have stopped coming.

    An inventory that cannot be read at all is left to who lists it.
    """
    silent: dict[str, str] = {}
    every = load_sources(settings)
    for queue in sorted({source.queue for source in sources if source.queue}):
        try:
            drain([source for source in every if source.queue == queue], queue, settings)
        except Exception as error:
            logger.exception("reading the queue %s", queue)
            silent[queue] = str(error)
    for source in sources:
        if source.inventory is not None:
            with suppress(GunDetectionError):
                why = overdue(storage, source.inventory, datetime.now(UTC))
                if why is not None:
                    silent[f"s3://{source.bucket}/{source.prefix}"] = why
    return silent


def told(news: News, settings: Settings) -> None:
    """Note that these news have arrived where they are acted upon."""
    with open_session(settings) as session:
        for bucket, upload_id in news.upto.items():
            statement = insert(UploadWatch).values(bucket=bucket, upload_id=upload_id)
            session.execute(
                statement.on_conflict_do_update(
                    index_elements=["bucket"], set_={"upload_id": statement.excluded.upload_id}
                )
            )


_NO_LONGER_WATCHED = "DELETE FROM source_look WHERE NOT source = ANY(CAST(:places AS text[]))"
_LOOKED = """
    INSERT INTO source_look AS s (source, looked_at, message)
    VALUES (:source, CASE WHEN CAST(:message AS text) IS NULL THEN now() END, :message)
    ON CONFLICT (source) DO UPDATE SET
        looked_at = COALESCE(excluded.looked_at, s.looked_at), message = excluded.message
"""

# What a run has taken on already is no news. Grouping takes them out in one pass, whatever
# PostgreSQL expects: NOT IN, and a join, may go through all of the ids for each upload.
_UNTOLD = """
    SELECT u.bucket, COUNT(*) AS waiting, MAX(u.id) AS upto
    FROM (
        SELECT id, MAX(bucket) AS bucket
        FROM (
            SELECT upload_id AS id, bucket, false AS taken FROM pending_upload
            WHERE wanted AND bucket = ANY(:buckets)
            AND EXISTS (SELECT FROM current_champion)
            UNION ALL
            SELECT unnest(s.upload_ids), NULL, true
            FROM shard s JOIN scoring_run r ON r.id = s.run_id WHERE r.state = 'open'
        ) every GROUP BY id HAVING NOT bool_or(taken)
    ) u LEFT JOIN upload_watch w ON w.bucket = u.bucket
    GROUP BY u.bucket, w.upload_id HAVING MAX(u.id) > COALESCE(w.upload_id, 0)
    ORDER BY u.bucket
"""
