"""What is to be scored: everything listed that the ledger has no outcome for."""

import logging
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from sqlalchemy import exists, func, or_, select
from sqlalchemy.dialects.postgresql import distinct_on, insert
from sqlalchemy.orm import Session

from gun_detection.database.models import LedgerEntry, ModelVersion, ScoringRun, Shard, Upload
from gun_detection.errors import NotFoundError
from gun_detection.scoring.ledger import GONE
from gun_detection.settings import Settings
from gun_detection.storage import Storage, StoredObject

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Plan:
    """A run with its shards. `planned` counts its uploads, `left_over` those that wait for the
    next one."""

    run_id: str
    model_id: str
    threshold: float
    planned: int
    left_over: int
    shard_ids: list[int]


def plan_run(
    model: ModelVersion,
    settings: Settings,
    storage: Storage,
    session: Session,
    *,
    bucket: str | None = None,
    prefix: str = "",
    threshold: float | None = None,
    run_id: str | None = None,
) -> Plan:
    """List a bucket and open a run over what `model` has not scored, oldest upload first.

    Planning again with the same `run_id` gives the plan that was made before.
    Raises `NotFoundError` for a bucket that is not there.
    """
    bucket = bucket or settings.uploads_bucket
    run_id = run_id or uuid.uuid4().hex
    known = session.get(ScoringRun, run_id)
    if known is not None:
        return _recall(session, known)
    if not storage.bucket_exists(bucket):
        raise NotFoundError(f"the bucket {bucket!r} does not exist: create it, or name another one")
    listed = _record_uploads(session, storage.list_objects(bucket, prefix))
    waiting = _unscored(session, bucket, prefix, model.id)
    planned = waiting[: settings.shard_images * settings.max_shards]
    run = ScoringRun(
        id=run_id,
        model_id=model.id,
        bucket=bucket,
        prefix=prefix,
        threshold=model.threshold if threshold is None else threshold,
        planned=len(planned),
        left_over=len(waiting) - len(planned),
    )
    session.add(run)
    session.flush()
    shards = [
        Shard(run_id=run_id, number=number, upload_ids=ids)
        for number, ids in enumerate(_batches(planned, settings.shard_images))
    ]
    session.add_all(shards)
    session.flush()
    logger.info(
        "%d objects listed, %d planned in %d shards for %s, %d left over",
        listed,
        run.planned,
        len(shards),
        model.id,
        run.left_over,
    )
    return _plan(run, [shard.id for shard in shards])


def _batches(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _recall(session: Session, run: ScoringRun) -> Plan:
    shards = session.scalars(select(Shard.id).where(Shard.run_id == run.id).order_by(Shard.number))
    return _plan(run, list(shards))


def _plan(run: ScoringRun, shard_ids: list[int]) -> Plan:
    return Plan(run.id, run.model_id, run.threshold, run.planned, run.left_over, shard_ids)


def _record_uploads(session: Session, objects: Iterable[StoredObject]) -> int:
    """Note every object version that was listed; the number of objects."""
    count = 0
    for page in _batches(objects, 1000):
        rows = [
            {
                "bucket": item.bucket,
                "key": item.key,
                "etag": item.etag,
                "size": item.size,
                "uploaded_at": item.last_modified,
            }
            for item in page
        ]
        statement = insert(Upload).values(rows)
        # Overwritten bytes that were restored have a new time, too.
        again = {"last_seen_at": func.now(), "uploaded_at": statement.excluded.uploaded_at}
        session.execute(
            statement.on_conflict_do_update(index_elements=["bucket", "key", "etag"], set_=again)
        )
        count += len(page)
    return count


def _unscored(session: Session, bucket: str, prefix: str, model_id: str) -> list[int]:
    outcome = exists().where(
        LedgerEntry.upload_id == Upload.id,
        LedgerEntry.model_id == model_id,
        # What was gone when it was to be read and is listed again has no true outcome yet.
        or_(
            LedgerEntry.reason.is_(None),
            LedgerEntry.reason.not_in(GONE),
            LedgerEntry.created_at >= Upload.last_seen_at,
        ),
    )
    # Versions that were overwritten since are gone: only the one that was last listed can be read.
    newest = (
        select(Upload.id)
        .where(Upload.bucket == bucket, Upload.key.startswith(prefix, autoescape=True))
        .ext(distinct_on(Upload.key))
        .order_by(Upload.key, Upload.last_seen_at.desc(), Upload.id.desc())
        .subquery()
    )
    rows = session.scalars(
        select(Upload.id)
        .where(Upload.id.in_(select(newest.c.id)), ~outcome)
        .order_by(Upload.uploaded_at, Upload.id)
    )
    return list(rows)
