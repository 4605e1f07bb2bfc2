"""What was uploaded since it was last told of: so that nobody waits for the night.

Everything is noted in the database before anybody is told, and told again until it is known to
have arrived: what is uploaded while nothing watches is found by the next look.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_plus

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from sqlalchemy import text
from sqlalchemy.dialects.postgresql import insert

from gun_detection.database import open_session
from gun_detection.database.models import UploadWatch
from gun_detection.errors import GunDetectionError, ServiceUnavailableError
from gun_detection.scoring.listing import note_objects, note_uploads
from gun_detection.scoring.sources import Source, load_sources
from gun_detection.settings import Settings
from gun_detection.storage import Storage, StoredObject

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

logger = logging.getLogger(__name__)


# Bytes of a key in S3.
_LONGEST = 1024


@dataclass(frozen=True)
class News:
    """`waiting` counts the uploads of each bucket that nobody was told of; `upto` is the last."""

    waiting: dict[str, int]
    upto: dict[str, int]


def look(settings: Settings) -> News | None:
    """List the watched sources, or read their queues; None where there is nothing new.

    A source with an inventory and no queue is not watched. Without a champion there is nothing
    to score with, and nobody is told.
    """
    storage = Storage(settings)
    watched = [s for s in load_sources(settings) if s.queue or (s.watch and s.inventory is None)]
    queues: set[str] = set()
    for source in watched:
        if source.queue in queues:
            continue
        try:
            if source.queue is not None:
                queues.add(source.queue)
                _drain([s for s in watched if s.queue == source.queue], source.queue, settings)
            else:
                note_uploads(source, settings, storage, wait=False)
        except GunDetectionError as error:
            # One bucket that is away must not hide the uploads of the others; and who lists it
            # at this moment notes what is there.
            level = logging.DEBUG if error.reason == "LISTING_HELD" else logging.WARNING
            logger.log(level, "looking for uploads in %s: %s", source.bucket, error.message)
        except Exception:
            logger.exception("looking for uploads in %s", source.bucket)
    with open_session(settings) as session:
        rows = session.execute(text(_UNTOLD), {"buckets": [s.bucket for s in watched]}).all()
    if not rows:
        return None
    return News({row.bucket: row.waiting for row in rows}, {row.bucket: row.upto for row in rows})


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


# What a run has taken on already is no news.
_UNTOLD = """
    SELECT u.bucket, COUNT(*) AS waiting, MAX(u.id) AS upto
    FROM upload u LEFT JOIN upload_watch w ON w.bucket = u.bucket
    WHERE u.pending AND u.wanted AND u.bucket = ANY(:buckets)
    AND EXISTS (SELECT FROM current_champion)
    AND u.id NOT IN (
        SELECT unnest(s.upload_ids) FROM shard s JOIN scoring_run r ON r.id = s.run_id
        WHERE r.state = 'open'
    )
    GROUP BY u.bucket, w.upload_id HAVING MAX(u.id) > COALESCE(w.upload_id, 0)
    ORDER BY u.bucket
"""


def _drain(sources: list[Source], queue: str, settings: Settings) -> None:
    """Read the queue of these sources until it is empty; a message is deleted once its uploads are
    noted."""
    secret = settings.s3_secret_access_key
    client: SQSClient = boto3.client(
        "sqs",
        region_name=settings.s3_region,
        endpoint_url=_origin(queue),
        aws_access_key_id=settings.s3_access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
    )
    try:
        while messages := client.receive_message(QueueUrl=queue, MaxNumberOfMessages=10).get(
            "Messages", []
        ):
            objects: dict[str, list[StoredObject]] = {}
            for message in messages:
                for item in _uploads(message["Body"], sources):
                    objects.setdefault(item.bucket, []).append(item)
            for bucket, some in objects.items():
                note_objects(bucket, some, settings)
            client.delete_message_batch(
                QueueUrl=queue,
                Entries=[
                    {"Id": str(number), "ReceiptHandle": message["ReceiptHandle"]}
                    for number, message in enumerate(messages)
                ],
            )
    except (BotoCoreError, ClientError) as error:
        raise ServiceUnavailableError(f"the queue {queue} cannot be read: {error}") from error


def _origin(queue: str) -> str:
    scheme, _, rest = queue.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def _uploads(body: str, sources: list[Source]) -> Iterator[StoredObject]:
    """The created objects of an S3 event notification, also one that came by way of SNS.

    Structure: Amazon S3 User Guide, "Event message structure", version 2. A message that is
    something else is logged and let go: the nightly listing finds what it may have meant.
    """
    try:
        content = json.loads(body)
        if isinstance(content.get("Message"), str):
            content = json.loads(content["Message"])
        for record in content.get("Records", []):
            item = _upload(record)
            made = record["eventName"].startswith("ObjectCreated:")
            if made and any(_belongs(item, source) for source in sources):
                yield item
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("a message of %s is no S3 event (%r): %.200s", sources[0].queue, error, body)


def _upload(record: dict[str, Any]) -> StoredObject:
    described = record["s3"]["object"]
    item = StoredObject(
        record["s3"]["bucket"]["name"],
        unquote_plus(described["key"]),
        int(described.get("size", 0)),
        str(described.get("eTag", "")),
        datetime.fromisoformat(record["eventTime"]),
    )
    for text_of in (item.key, item.etag):
        # What PostgreSQL cannot hold; encoding refuses halves of surrogate pairs.
        if "\0" in text_of or len(text_of.encode()) > _LONGEST:
            raise ValueError("a key or an ETag that no object has")
    if not 0 <= item.size < 2**63:
        raise ValueError("a size that no object has")
    return item


def _belongs(item: StoredObject, source: Source) -> bool:
    folder = item.key.endswith("/") and item.size == 0
    return not folder and source.covers(item.bucket, item.key)
