"""What was uploaded since it was last told of: so that nobody waits for the night.

Everything is noted in the database before anybody is told, and told again until it is known to
have arrived: what is uploaded while nothing watches is found by the next look.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import func, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

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
    """`waiting` counts the uploads of each bucket with some that nobody was told of, or that a run
    failed to score; `upto` is the last of them.

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
    watched = _watched(load_sources(settings))
    # Whether each place was looked at, and why the look failed, if it did.
    looked: dict[str, tuple[bool, str | None]] = {}
    more = False
    for place, sources in watched.items():
        [source, *_] = sources
        looked[place] = True, None
        try:
            if source.queue is not None:
                more |= drain(sources, source.queue, settings)
            else:
                note_uploads(source, settings, storage, wait=False)
        except GunDetectionError as error:
            # One bucket that is away must not hide the uploads of the others. Who lists it at this
            # moment notes what is there, unless it is nobody any more, or takes for ever; its queue
            # waits for that.
            if error.reason == "LISTING_HELD":
                looked[place] = False, None
            else:
                logger.warning("looking for uploads in %s: %s", source.bucket, error.message)
                looked[place] = False, error.message
        except Exception as error:
            logger.exception("looking for uploads in %s", source.bucket)
            looked[place] = False, repr(error)
    buckets = sorted({source.bucket for sources in watched.values() for source in sources})
    with open_session(settings) as session:
        session.execute(_NO_LONGER_WATCHED, {"places": list(looked)})
        if looked:
            places = [
                {"source": place, "seen": seen, "message": why}
                for place, (seen, why) in sorted(looked.items())
            ]
            session.execute(_LOOKED, places)
        rows = session.execute(text(_UNTOLD), {"buckets": buckets}).all()
    if not rows and not more:
        return None
    waiting = {row.bucket: row.waiting for row in rows}
    return News(waiting, {row.bucket: row.upto for row in rows}, more)


def expect_looks(settings: Settings, session: Session) -> None:
    """Have what is watched known to be unseen where nobody has looked at it in an hour.

    Looks say so themselves once they began; where the watcher never ran, there would be none.
    """
    # Otherwise nobody is to look between the nights.
    places = sorted(_watched(load_sources(settings))) if settings.watch_seconds else []
    session.execute(_NO_LONGER_WATCHED, {"places": places})
    if places:
        session.execute(_EXPECTED, [{"source": place} for place in places])


def _watched(sources: list[Source]) -> dict[str, list[Source]]:
    """The sources that are watched, by the place at which one looks for their uploads: the address
    of a source, or of the queue that it shares with others."""
    watched: dict[str, list[Source]] = {}
    for source in sources:
        if source.queue or (source.watch and source.inventory is None):
            place = source.queue or f"s3://{source.bucket}/{source.prefix}"
            watched.setdefault(place, []).append(source)
    return watched


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
            # While somebody lists a bucket, a queue waits, and is read later.
            if isinstance(error, GunDetectionError) and error.reason == "LISTING_HELD":
                continue
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
            statement = insert(UploadWatch).values(
                bucket=bucket, upload_id=upload_id, told_at=func.now()
            )
            # What failed is told of again, and may be older than all that was told of.
            upto = func.greatest(UploadWatch.upload_id, statement.excluded.upload_id)
            session.execute(
                statement.on_conflict_do_update(
                    index_elements=["bucket"], set_={"upload_id": upto, "told_at": func.now()}
                )
            )


_NO_LONGER_WATCHED = text("DELETE FROM source_look WHERE NOT source = ANY(CAST(:places AS text[]))")
_EXPECTED = text(
    "INSERT INTO source_look (source, looked_at) VALUES (:source, now()) ON CONFLICT DO NOTHING"
)
# Where another holds the listing, time runs on from the last look, or from now on.
_LOOKED = text(
    """
    INSERT INTO source_look AS s (source, looked_at, message)
    VALUES (:source, CASE WHEN CAST(:message AS text) IS NULL THEN now() END, :message)
    ON CONFLICT (source) DO UPDATE SET
        looked_at = CASE WHEN :seen THEN excluded.looked_at
                         ELSE COALESCE(s.looked_at, excluded.looked_at) END,
        message = excluded.message
    """
)

# What a run has taken on already is no news; what it left without an outcome is again, once in an
# hour, as the run may have met an outage that is over, until four runs of a day have failed to:
# that does not mend itself. What no run took on waits for its turn: caps are budgets. Grouping
# finds each in one pass, whatever PostgreSQL expects: NOT IN, and a join, may go through all of
# the ids for each upload.
_UNTOLD = """
    SELECT u.bucket, COUNT(*) AS waiting, MAX(u.id) AS upto
    FROM (
        SELECT id, MAX(bucket) AS bucket,
               MAX(stage) = 1 AND COUNT(*) FILTER (WHERE stage = 1) <= 3 AS failed
        FROM (
            SELECT upload_id AS id, bucket, 0 AS stage FROM pending_upload
            WHERE wanted AND bucket = ANY(:buckets)
            AND EXISTS (SELECT FROM current_champion)
            UNION ALL
            SELECT unnest(s.upload_ids), NULL, 1
            FROM shard s JOIN scoring_run r ON r.id = s.run_id
            WHERE r.state <> 'open' AND r.finished_at > now() - interval '1 day'
            AND s.finished_at IS NULL
            UNION ALL
            SELECT unnest(s.upload_ids), NULL, 2
            FROM shard s JOIN scoring_run r ON r.id = s.run_id WHERE r.state = 'open'
        ) every GROUP BY id HAVING MAX(stage) < 2 AND MAX(bucket) IS NOT NULL
    ) u LEFT JOIN upload_watch w ON w.bucket = u.bucket
    GROUP BY u.bucket, w.upload_id, w.told_at
    HAVING MAX(u.id) > COALESCE(w.upload_id, 0)
        OR bool_or(u.failed) AND COALESCE(w.told_at < now() - interval '1 hour', true)
    ORDER BY u.bucket
"""
