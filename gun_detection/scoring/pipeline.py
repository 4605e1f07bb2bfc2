"""Score one shard: read, decode in a sandbox, infer, write; one bad picture never stops it."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

from gun_detection.database import open_session
from gun_detection.database.models import LedgerEntry, Upload
from gun_detection.detector.inference import Detections, Predictor
from gun_detection.errors import GunDetectionError, ImageError
from gun_detection.images import SandboxedDecoder
from gun_detection.scoring.ledger import (
    GONE,
    Lease,
    Outcome,
    earlier_detections,
    finish_shard,
    write_outcomes,
)
from gun_detection.settings import Settings
from gun_detection.storage import Storage

logger = logging.getLogger(__name__)

_BATCH = 16
_READERS = 8
# Between the listing and the reading an object can be deleted, overwritten (its new version is
# another upload, found by the next listing) or turn out too large: outcomes, not failures.
_UNREADABLE = {*GONE, "TOO_LARGE"}


@dataclass(frozen=True)
class ShardResult:
    """The outcomes that this attempt wrote."""

    scored: int
    quarantined: int
    detections: int
    seconds: float


def score_shard(
    lease: Lease,
    predictor: Predictor,
    settings: Settings,
    storage: Storage,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShardResult:
    """Give every upload of the lease an outcome; `on_progress` hears (done, all of this lease).

    Raises `TransientError` when a server fails or another attempt took over: what was written
    stays, and the next attempt goes on from there.
    """
    start = time.monotonic()
    total, done = len(lease.uploads), 0
    scored = quarantined = detections = 0
    with SandboxedDecoder(settings) as decoder:
        worker = _Worker(lease, decoder, predictor, settings)
        for batch in _batches(lease.uploads, settings, storage):
            outcomes = worker.outcomes(batch)
            write_outcomes(lease, outcomes, settings)
            done += len(outcomes)
            scored += sum(outcome.reason is None for outcome in outcomes)
            quarantined += sum(outcome.reason is not None for outcome in outcomes)
            detections += sum(len(o.detections.scores) for o in outcomes if o.detections)
            on_progress(done, total)
    finish_shard(lease, settings)
    result = ShardResult(scored, quarantined, detections, round(time.monotonic() - start, 2))
    logger.info(
        "shard %d done: %d scored, %d quarantined, %d detections, %.1f s",
        lease.shard_id,
        scored,
        quarantined,
        detections,
        result.seconds,
    )
    return result


def _batches(
    uploads: list[Upload], settings: Settings, storage: Storage
) -> Iterator[list[tuple[Upload, "Future[bytes]"]]]:
    """Batches whose bytes are read by threads, one batch ahead: memory stays flat."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="read") as pool:

        def start(position: int) -> list[tuple[Upload, Future[bytes]]]:
            part = uploads[position : position + _BATCH]
            return [(upload, pool.submit(_read, upload, settings, storage)) for upload in part]

        following = start(0)
        for position in range(_BATCH, len(uploads) + _BATCH, _BATCH):
            batch, following = following, start(position)
            yield batch


def _read(upload: Upload, settings: Settings, storage: Storage) -> bytes:
    return storage.get(
        upload.bucket, upload.key, max_bytes=settings.max_image_bytes, etag=upload.etag
    )


@dataclass(frozen=True)
class _Worker:
    """What turns the bytes of an upload into its outcome."""

    lease: Lease
    decoder: SandboxedDecoder
    predictor: Predictor
    settings: Settings

    def outcomes(self, batch: list[tuple[Upload, "Future[bytes]"]]) -> list[Outcome]:
        """One for each upload; bytes that this model has seen before are inferred once."""
        read = [_Read.of(upload, future) for upload, future in batch]
        digests = {item.sha256 for item in read if item.sha256}
        with open_session(self.settings) as session:
            known = earlier_detections(session, digests, self.lease.model_id)
        by_bytes = {sha256: _repeated(entry, found) for sha256, (entry, found) in known.items()}
        return [self._outcome(item, by_bytes) for item in read]

    def _outcome(self, item: "_Read", by_bytes: dict[str, Outcome]) -> Outcome:
        if item.error is not None:
            return _quarantine(item.upload, None, item.error)
        if item.sha256 in by_bytes:
            return replace(by_bytes[item.sha256], upload_id=item.upload.id)
        start = time.perf_counter()
        try:
            pixels = self.decoder.decode(item.data).pixels
        except ImageError as error:
            return _quarantine(item.upload, item.sha256, error)
        decoded = time.perf_counter()
        [found] = self.predictor([pixels])
        outcome = Outcome(
            upload_id=item.upload.id,
            sha256=item.sha256,
            detections=found,
            width=pixels.shape[1],
            height=pixels.shape[0],
            decode_ms=(decoded - start) * 1000,
            inference_ms=(time.perf_counter() - decoded) * 1000,
        )
        by_bytes[item.sha256] = replace(outcome, decode_ms=0.0, inference_ms=0.0)
        return outcome


@dataclass(frozen=True)
class _Read:
    """The bytes of an upload with their sha256, or why they could not be read."""

    upload: Upload
    data: bytes = b""
    sha256: str = ""
    error: GunDetectionError | None = None

    @classmethod
    def of(cls, upload: Upload, future: "Future[bytes]") -> Self:
        try:
            data = future.result()
        except GunDetectionError as error:
            if error.reason not in _UNREADABLE:
                raise
            return cls(upload, error=error)
        return cls(upload, data, hashlib.sha256(data).hexdigest())


def _repeated(entry: LedgerEntry, found: Detections) -> Outcome:
    """The outcome of bytes that were scored before, under whatever key."""
    return Outcome(
        upload_id=entry.upload_id,
        sha256=entry.sha256,
        detections=found,
        width=entry.width,
        height=entry.height,
        decode_ms=0.0,
        inference_ms=0.0,
    )


def _quarantine(upload: Upload, sha256: str | None, error: GunDetectionError) -> Outcome:
    logger.warning("quarantined %r: %s (%s)", upload.key, error.reason, error.message)
    return Outcome(upload.id, sha256, reason=error.reason, message=error.message)
