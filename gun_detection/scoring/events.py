"""What a queue tells of uploads: events of S3, noted before their messages are deleted."""

import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_plus

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from gun_detection.errors import ServiceUnavailableError
from gun_detection.scoring.listing import note_objects
from gun_detection.scoring.sources import Source
from gun_detection.settings import Settings
from gun_detection.storage import StoredObject

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

logger = logging.getLogger(__name__)

# A queue is left after so long, as the other buckets and those who wait for news have their turn.
_DRAIN_SECONDS = 20.0
# By queue the buckets that were being listed when a message about them was received.
_in_vain: dict[str, set[str]] = {}


@dataclass(frozen=True)
class _Event:
    """An object that was uploaded, or `restored` from an archive.

    `at` orders the uploads of one key: by time, which may be in whole seconds, then by S3's
    sequencer. Of two of these the shorter is filled up with zeros at its right, as strings are.
    """

    item: StoredObject
    at: tuple[datetime, str]
    restored: bool


def drain(sources: list[Source], queue: str, settings: Settings) -> bool:
    """Read the queue of these sources until it is empty, or the time is up: then True.

    A message is deleted once its uploads are noted. One about a bucket that is being listed comes
    back after its visibility timeout; from the first of these on the queue is left alone, until the
    bucket is listed. Raises `ServiceUnavailableError` where the queue cannot be read, or was left
    alone (LISTING_HELD): nobody knows then what it holds.
    """
    until = time.monotonic() + _DRAIN_SECONDS
    latest: dict[tuple[str, str], tuple[datetime, str]] = {}
    buckets = {source.bucket for source in sources}
    held = _note({bucket: [] for bucket in buckets}, settings)
    # A message that is received in vain a few times may end in a dead-letter queue, and no queue
    # gives out only those of one bucket.
    in_vain = _in_vain.setdefault(queue, set())
    in_vain &= held
    if in_vain or held == buckets:
        raise _left_alone(queue)
    secret = settings.s3_secret_access_key
    client: SQSClient = boto3.client(
        "sqs",
        region_name=_region(queue) or settings.s3_region,
        endpoint_url=_origin(queue),
        aws_access_key_id=settings.s3_access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
    )
    try:
        while not in_vain:
            answer = client.receive_message(QueueUrl=queue, MaxNumberOfMessages=10)
            messages = answer.get("Messages", [])
            if not messages:
                break
            events: list[_Event] = []
            told_of: dict[str, set[str]] = {}
            for message in messages:
                found = list(_events(message["Body"], sources))
                told_of[message["ReceiptHandle"]] = {event.item.bucket for event in found}
                events += found
            in_vain |= _note(_newest(events, latest), settings)
            noted = [handle for handle, names in told_of.items() if not names & in_vain]
            if noted:
                client.delete_message_batch(
                    QueueUrl=queue,
                    Entries=[
                        {"Id": str(number), "ReceiptHandle": handle}
                        for number, handle in enumerate(noted)
                    ],
                )
            if time.monotonic() > until and not in_vain:
                return True
    except (BotoCoreError, ClientError) as error:
        raise ServiceUnavailableError(f"the queue {queue} cannot be read: {error}") from error
    if in_vain:
        raise _left_alone(queue)
    return False


def _left_alone(queue: str) -> ServiceUnavailableError:
    return ServiceUnavailableError(
        f"a bucket of the queue {queue} is being listed by somebody else", reason="LISTING_HELD"
    )


def _newest(
    events: list[_Event], latest: dict[tuple[str, str], tuple[datetime, str]]
) -> dict[str, list[_Event]]:
    """Of each object the last upload, by bucket, unless a later one is among the `latest`; and
    whatever was restored."""
    found: dict[str, list[_Event]] = {}
    for event in sorted(events, key=lambda event: event.at, reverse=True):
        place = event.item.bucket, event.item.key
        if not event.restored:
            if event.at < latest.get(place, event.at):
                continue
            latest[place] = event.at
        found.setdefault(event.item.bucket, []).append(event)
    return found


def _note(events: dict[str, list[_Event]], settings: Settings) -> set[str]:
    """Note what was uploaded; the buckets that are being listed, of which nothing was noted."""
    held = set()
    for bucket, some in events.items():
        uploaded, restored = (
            [event.item for event in some if event.restored is kind] for kind in (False, True)
        )
        try:
            note_objects(bucket, uploaded, settings, restored)
        except ServiceUnavailableError as error:
            if error.reason != "LISTING_HELD":
                raise
            held.add(bucket)
    return held


def _region(queue: str) -> str | None:
    """The region that a queue of AWS has in its name: requests are signed for it."""
    found = re.fullmatch(r"https://sqs\.([a-z0-9-]+)\.amazonaws\.com(\.cn)?", _origin(queue))
    return found[1] if found else None


def _origin(queue: str) -> str:
    scheme, _, rest = queue.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def _events(body: str, sources: list[Source]) -> Iterator[_Event]:
    """What an S3 event says was uploaded or restored, also by way of SNS or EventBridge.

    A message that is something else is logged and let go: the nightly listing finds what it may
    have meant.
    """
    try:
        content = json.loads(body)
        if isinstance(content.get("Message"), str):
            content = json.loads(content["Message"])
        for event in _told(content):
            if any(_belongs(event.item, source) for source in sources):
                yield event
    except _NO_EVENT as error:
        logger.warning("a message of %s is no S3 event (%r): %.200s", sources[0].queue, error, body)


# What comes of values of other types, infinite sizes and brackets without end, too.
_NO_EVENT = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def _told(content: dict[str, Any]) -> Iterator[_Event]:
    """What an event says was uploaded or restored; raises `ValueError` for what is none of S3.

    Structure: Amazon S3 User Guide, "Event message structure", version 2, and "EventBridge event
    message structure".
    """
    kind = str(content.get("detail-type", ""))
    if "Records" in content:
        for record in content["Records"]:
            name = record["eventName"].removeprefix("s3:")
            if name.startswith("ObjectCreated:") or name == _RESTORED:
                described = record["s3"]["object"]
                key, etag = unquote_plus(described["key"]), described.get("eTag", "")
                yield _event(record["s3"], key, etag, record["eventTime"], name == _RESTORED)
    elif kind in ("Object Created", _BRIDGED):
        # Here the key is as it is.
        described = content["detail"]["object"]
        etag = described.get("etag", "")
        yield _event(content["detail"], described["key"], etag, content["time"], kind == _BRIDGED)
    elif not kind.startswith("Object ") and content.get("Event") != "s3:TestEvent":
        raise ValueError("neither Records nor a detail-type of S3")


_RESTORED = "ObjectRestore:Completed"
_BRIDGED = "Object Restore Completed"


def _event(event: dict[str, Any], key: str, etag: str, at: str, restored: bool) -> _Event:
    """An event about one object; its structures name bucket and size alike."""
    described = event["object"]
    time = datetime.fromisoformat(at)
    # In UTC: PostgreSQL does not know every offset that Python does.
    time = time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    size = int(described.get("size", 0))
    item = StoredObject(event["bucket"]["name"], key, size, str(etag), time)
    item.check()
    if "\0" in item.key:
        raise ValueError("a key with a NUL, which no request can name")
    return _Event(item, (time, str(described.get("sequencer", "")).upper()), restored)


def _belongs(item: StoredObject, source: Source) -> bool:
    folder = item.key.endswith("/") and item.size == 0
    return not folder and source.covers(item.bucket, item.key)
