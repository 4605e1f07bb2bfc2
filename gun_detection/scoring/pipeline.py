"""Score one shard: read, decode in a sandbox, infer, write, all at the same time.

Threads take one picture each through reading, decoding and inference. Every stage has as many
slots as pay, and files and pixels have a budget of bytes, so that memory stays flat whatever the
size of the shard. The calling thread writes what is done in batches.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gun_detection.batching import Batcher
from gun_detection.database import open_session
from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import Engine, cores, detect_each, shape_class
from gun_detection.errors import (
    GunDetectionError,
    ImageError,
    ServiceUnavailableError,
    TerminalError,
    TransientError,
)
from gun_detection.images import DOUBTFUL, DecodedImage, DecoderPool
from gun_detection.scoring.budget import Budget
from gun_detection.scoring.delivery import UNREADABLE, Delivery, Reads
from gun_detection.scoring.flow import BATCH, in_batches, in_threads
from gun_detection.scoring.leases import Item, Lease, finish_shard, renew, suspect
from gun_detection.scoring.ledger import Outcome, earlier_outcomes, write_outcomes
from gun_detection.scoring.stats import Meter
from gun_detection.settings import Settings

logger = logging.getLogger(__name__)

_LOOKUPS = 64
# A question to the database costs the same for one picture as for dozens.
_LOOKUP_PAUSE = 0.01
# After a crash so many pictures are looked at one by one: at least as many as were under way.
_CAREFUL = 2 * BATCH
_SMALL = (32, 32)
# Batches for each stream of the engine whose pictures are at hand: of several shapes, so that those
# of one shape fill a batch.
_QUEUED = 4
# Signs of life in the time of a lease, where nothing is written.
_SIGNS = 10
# How long a database that is away is waited for with results in hand.
_WRITE_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)


def score_shard(
    lease: Lease,
    engine: Engine,
    settings: Settings,
    reader: Reads,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Give every upload of the lease an outcome; the figures of the shard (`Meter.stats`).

    `on_progress` hears (done, all of this lease). Raises `TransientError` when a server fails or
    another attempt took over: what was written stays, and the next attempt goes on from there.
    """
    meter = Meter()
    writer = _Writer(lease, settings, meter, on_progress)
    if lease.condemned is not None:
        writer.write([_condemn(lease.condemned, settings, reader)])
    with ExitStack() as stack:
        worker = _Worker(lease, engine, settings, reader, meter, stack, writer.go_on)
        items = iter(lease.items)
        if lease.careful:
            for item in islice(items, _CAREFUL):
                suspect(lease, item, settings)
                if (outcome := worker.outcome(item)) is not None:
                    writer.write([outcome])
        _in_parallel(worker.outcome, items, worker, writer)
        if worker.unread:
            _in_parallel(worker.outcome_at_last, iter(worker.unread), worker, writer)
    stats = meter.stats(engine.name, engine.device)
    finish_shard(lease, settings, stats if lease.items or lease.condemned else None)
    logger.info(
        "shard %d done: %d scored, %d quarantined, %d detections, %.1f s",
        lease.shard_id,
        stats["scored"],
        stats["quarantined"],
        stats["detections"],
        stats["seconds"],
    )
    return stats


def _in_parallel(
    make: Callable[[Item], Outcome | None],
    items: Iterator[Item],
    worker: "_Worker",
    writer: "_Writer",
) -> None:
    for batch in in_batches(in_threads(make, items, worker.threads)):
        writer.write(batch)
        worker.forget(batch)


class _Writer:
    """Writes batches, and waits a while for a database that is away."""

    def __init__(
        self,
        lease: Lease,
        settings: Settings,
        meter: Meter,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._lease, self._settings, self._meter = lease, settings, meter
        self._on_progress = on_progress
        self._done = 0
        self._total = len(lease.items) + (lease.condemned is not None)
        self._heard, self._lock = time.monotonic(), threading.Lock()

    def write(self, outcomes: list[Outcome]) -> None:
        with self._meter.stage("write"):
            self._write(outcomes)
        self._meter.count(
            scored=sum(outcome.reason is None for outcome in outcomes),
            quarantined=sum(outcome.reason is not None for outcome in outcomes),
            detections=sum(len(o.detections.scores) for o in outcomes if o.detections),
        )
        self._done += len(outcomes)
        self._on_progress(self._done, self._total)

    def go_on(self) -> None:
        """Say that the work goes on, and renew the lease, where nothing is written for a while.

        Objects that a server fails to deliver, one after another, can take longer than a lease.
        Called by many threads.
        """
        with self._lock:
            if time.monotonic() - self._heard < self._settings.shard_lease_seconds / _SIGNS:
                return
            self._heard = time.monotonic()
        self._on_progress(self._done, self._total)
        try:
            with open_session(self._settings) as session:
                renew(session, self._lease, self._settings)
        except ServiceUnavailableError as error:
            logger.warning("%s; the lease is renewed later", error.message)

    def _write(self, outcomes: list[Outcome]) -> None:
        for pause in _WRITE_PAUSES:
            try:
                write_outcomes(self._lease, outcomes, self._settings)
            except ServiceUnavailableError as error:
                logger.warning("%s; trying again in %g s", error.message, pause)
                time.sleep(pause)
            else:
                return
        write_outcomes(self._lease, outcomes, self._settings)


class _Worker:
    """What turns an upload into its outcome; its methods are called by many threads."""

    def __init__(
        self,
        lease: Lease,
        engine: Engine,
        settings: Settings,
        reader: Reads,
        meter: Meter,
        stack: ExitStack,
        go_on: Callable[[], None],
    ) -> None:
        self._lease, self._engine, self._settings = lease, engine, settings
        self._go_on = go_on
        self._delivery, self._meter = Delivery(lease, settings, reader), meter
        decoders = max(2, cores())
        self.threads = settings.readers + decoders + _QUEUED * engine.streams * engine.batch
        half = settings.memory_mb * 2**20 // 2
        self._files, self._pixels = Budget(half), Budget(max(half, _full_batches(engine)))
        self._reading = threading.Semaphore(settings.readers)
        self._decoding = threading.Semaphore(decoders)
        self._decoders = stack.enter_context(DecoderPool(settings, decoders))
        self._infer = stack.enter_context(
            Batcher(
                self._found, engine.batch, engine.streams, lambda pixels: shape_class(pixels.shape)
            )
        )
        self._known = stack.enter_context(Batcher(self._earlier, _LOOKUPS, pause=_LOOKUP_PAUSE))
        # Of what is not written yet; what is, `_earlier` finds.
        self._by_bytes: dict[str, Future[Outcome]] = {}
        # What `outcome` set aside.
        self.unread: list[Item] = []
        self._lock = threading.Lock()

    def forget(self, outcomes: list[Outcome]) -> None:
        """Keep no more of these than the database does."""
        with self._lock:
            for outcome in outcomes:
                if outcome.sha256 is not None:
                    self._by_bytes.pop(outcome.sha256, None)

    def outcome(self, item: Item) -> Outcome | None:
        """The outcome of one upload; the same bytes are looked at once.

        None for an object that the server does not deliver: it is set aside and keeps none of the
        others waiting. Raises the server's error when that goes on, and others do not come either.
        """
        try:
            return self._outcome(item)
        except _NotDelivered as failed:
            with self._lock:
                self.unread.append(item)
            if self._delivery.doubtful and not self._delivery.goes_on(time.monotonic()):
                raise failed.error from None
            self._go_on()
            return None

    def outcome_at_last(self, item: Item) -> Outcome:
        """The outcome of one that was set aside.

        Raises the server's error where it is the server that went away, or its access.
        """
        try:
            return self._outcome(item)
        except _NotDelivered as failed:
            error = failed.error
            if not self._delivery.goes_on(time.monotonic()):
                raise error from None
            reason = "UNREADABLE" if isinstance(error, TransientError) else error.reason
            return _quarantine(item, None, TerminalError(error.message, reason=reason))

    def _outcome(self, item: Item) -> Outcome:
        start = time.monotonic()
        with self._files.hold(item.size):
            try:
                with self._meter.stage("read", self._reading):
                    data = self._delivery.get(item)
            except GunDetectionError as error:
                if error.reason not in UNREADABLE:
                    raise _NotDelivered(error) from error
                return _quarantine(item, None, error)
            self._meter.count(bytes=len(data))
            sha256 = hashlib.sha256(data).hexdigest()
            with self._lock:
                before = self._by_bytes.get(sha256)
                mine: Future[Outcome] = Future()
                if before is None:
                    self._by_bytes[sha256] = mine
            if before is not None:
                self._meter.count(repeated=1)
                return replace(before.result(), upload_id=item.id, decode_ms=0.0, inference_ms=0.0)
            try:
                made = self._new(item, data, sha256)
            except BaseException as error:
                mine.set_exception(error)
                raise
            mine.set_result(made)
        self._meter.picture(f"s3://{item.bucket}/{item.key}", time.monotonic() - start)
        return made

    def _new(self, item: Item, data: bytes, sha256: str) -> Outcome:
        known = self._known(sha256)
        if known is not None:
            self._meter.count(repeated=1)
            return replace(known, upload_id=item.id)
        began = time.perf_counter()
        with ExitStack() as held:
            try:
                with self._meter.stage("decode", self._decoding):
                    image = self._decode(data)
                    held.enter_context(self._pixels.hold(image.pixels.nbytes))
                decoded = time.perf_counter()
                found, milliseconds = self._look_at(image.pixels)
            except ImageError as error:
                return _quarantine(item, sha256, error)
            self._meter.add("infer", waiting=time.perf_counter() - decoded)
        if found is None:
            self._demand_memory()
            return _quarantine(item, sha256, _too_much(image))
        # Boxes are in pixels of the whole picture, of which a smaller one may have been looked at.
        height, width = image.pixels.shape[:2]
        return Outcome(
            upload_id=item.id,
            sha256=sha256,
            detections=found.resized((width, height), (image.width, image.height)),
            width=image.width,
            height=image.height,
            decode_ms=round((decoded - began) * 1000, 3),
            inference_ms=milliseconds,
            engine=self._engine.name,
        )

    def _look_at(self, pixels: NDArray[np.uint8]) -> tuple[Detections | None, float]:
        found, milliseconds = self._infer(pixels)
        if isinstance(found, ImageError):
            raise found
        return found, milliseconds

    def _decode(self, data: bytes) -> DecodedImage:
        """Once more, where it is not certain that the picture is to blame."""
        fit = self._engine.input_size
        try:
            return self._decoders.decode(data, fit=fit)
        except ImageError as error:
            if error.reason not in DOUBTFUL:
                raise
        return self._decoders.decode(data, fit=fit)

    def _demand_memory(self) -> None:
        """Raise `ServiceUnavailableError` where there is too little memory for any picture."""
        found, _ = self._infer(np.zeros((*_SMALL, 3), np.uint8))
        if found is None:
            raise ServiceUnavailableError(
                f"{self._engine.device} has not even the memory for a picture of "
                f"{_SMALL[0]}x{_SMALL[1]} pixels: see what else uses it",
                reason="NO_MEMORY",
            )

    def _found(
        self, images: list[NDArray[np.uint8]]
    ) -> list[tuple[Detections | ImageError | None, float]]:
        answers = detect_each(self._engine, images)
        seconds = sum(milliseconds for _, milliseconds in answers) / 1000
        # Who asked for a picture counts all of its time here as waiting.
        self._meter.add("infer", working=seconds, waiting=-seconds * len(images))
        return answers

    def _earlier(self, digests: list[str]) -> list[Outcome | None]:
        with open_session(self._settings) as session:
            known = earlier_outcomes(session, digests, self._lease.model_id, self._lease.run_id)
        return [known.get(sha256) for sha256 in digests]


def _full_batches(engine: Engine) -> int:
    """Bytes of pixels to be at hand where the engine looks at several pictures at once.

    Those of its batches and of all that are queued, in its own input size. Large pictures have up
    to four times the pixels of that, as they are decoded to a whole part of their size: there is
    room for a quarter as many then, whatever the size of the shard.
    """
    if engine.batch == 1:
        return 0
    shorter, longest = engine.input_size
    return (1 + _QUEUED) * engine.streams * engine.batch * 3 * shorter * longest


class _NotDelivered(Exception):  # noqa: N818
    """A server did not deliver an object."""

    def __init__(self, error: GunDetectionError) -> None:
        super().__init__(error.message)
        self.error = error


def _condemn(item: Item, settings: Settings, reader: Reads) -> Outcome:
    """The outcome of a picture that two processes died of; its bytes are read, not looked at."""
    error = ImageError(
        "the scoring process died twice while it looked at this picture alone", reason="CRASHED"
    )
    try:
        data = reader.get(item.bucket, item.key, max_bytes=settings.max_image_bytes, etag=item.etag)
    except GunDetectionError as unreadable:
        if isinstance(unreadable, TransientError) and unreadable.reason not in UNREADABLE:
            raise
        return _quarantine(item, None, error)
    return _quarantine(item, hashlib.sha256(data).hexdigest(), error)


def _too_much(image: DecodedImage) -> ImageError:
    return ImageError(
        f"a picture of {image.width}x{image.height} pixels needs more memory than there is",
        reason="OUT_OF_MEMORY",
    )


def _quarantine(item: Item, sha256: str | None, error: GunDetectionError) -> Outcome:
    logger.warning("quarantined %r: %s (%s)", item.key, error.reason, error.message)
    return Outcome(item.id, sha256, reason=error.reason, message=error.message)
