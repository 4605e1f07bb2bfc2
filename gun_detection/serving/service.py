"""The service itself, without HTTP: who may ask, how much, and what becomes of a picture."""

import asyncio
import hashlib
import logging
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from gun_detection.errors import (
    GunDetectionError,
    ServiceUnavailableError,
    SettingsError,
    TerminalError,
)
from gun_detection.images import DecodeLimits, read_header
from gun_detection.serving.answers import BatchItem, Detection, Failure, Prediction
from gun_detection.serving.keys import Key, KeyRing
from gun_detection.serving.limits import RateLimit
from gun_detection.serving.metrics import DETECTIONS, PICTURES
from gun_detection.serving.models import ModelKeeper, ServedModel
from gun_detection.serving.pictures import Looked, Pictures, Slots
from gun_detection.serving.refusals import Refusal, busy, refusal_of
from gun_detection.settings import Settings
from gun_detection.storage import Storage

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# How a stored key ends: the formats that are read.
STORED_KINDS = ("jpeg", "png", "webp", "bmp")
# A server that hangs keeps the others waiting for so long, and its threads a little longer.
_STORE_SECONDS = 10.0
_STORE_THREADS = 8


class Service:
    """What the routes need; one for each process."""

    def __init__(self, settings: Settings, folder: Path | None) -> None:
        self.settings = settings
        self.keys = KeyRing(settings)
        self.limit = RateLimit(settings, folder)
        self.models = ModelKeeper(settings)
        self.slots = Slots(settings.serve_queue)
        self._pictures = Pictures(settings)
        self._limits = DecodeLimits.from_settings(settings)
        self._storage = (
            None
            if settings.serve_store == "never"
            else Storage(settings, attempts=2, silence=_STORE_SECONDS / 2)
        )
        self._storing = ThreadPoolExecutor(_STORE_THREADS, thread_name_prefix="store")

    async def start(self) -> None:
        await self.models.start()

    async def stop(self) -> None:
        await self.models.stop()
        self._pictures.close()
        self._storing.shutdown(wait=False, cancel_futures=True)
        self.limit.close()

    def admit(self, key: str | None, scope: str) -> Key | None:
        """Who asks; None is anybody. Raises `Refusal`: 401 without a valid key, 403 without scope.

        Nobody may `store` without a key.
        """
        if key is None:
            if self.settings.serve_anonymous and scope != "store":
                return None
            raise _unauthorized("an API key is needed: send it as Authorization: Bearer KEY")
        try:
            found = self.keys.find(key)
        except SettingsError as error:
            logger.error("API keys: %s", error.message)
            raise busy("the API keys cannot be read now: try again", 30, error.reason) from None
        if found is None:
            raise _unauthorized("this API key is not valid, or not any more")
        if scope not in found.scopes:
            raise Refusal(403, "SCOPE", f"the API key {found.name} may not do this: {scope}")
        return found

    async def answer(
        self,
        served: ServedModel,
        data: bytes,
        threshold: float,
        *,
        store: bool,
        draw: bool = False,
    ) -> tuple[Prediction, bytes | None]:
        """(what is seen in a picture, PNG with the boxes in it if that is asked for).

        In the time that there is; raises `Refusal`.
        """
        drawn = None
        try:
            async with asyncio.timeout(self.settings.serve_timeout):
                looked = await self._pictures.look(served, data)
                stored_as = await self._store(data) if store else None
                if draw:
                    drawn = await self._pictures.overlay(data, looked, threshold, served.card.model)
        except TimeoutError:
            seconds = self.settings.serve_timeout
            refusal = busy(f"no answer within {seconds:g} s: try again", 10, "TIMEOUT")
        except GunDetectionError as error:
            refusal = refusal_of(error)
        except Refusal as error:
            refusal = error
        else:
            PICTURES.labels("looked at").inc()
            return _predicted(served, looked, threshold, stored_as), drawn
        PICTURES.labels(refusal.reason).inc()
        raise refusal

    async def batch_item(
        self, served: ServedModel, name: str, data: bytes, threshold: float, store: bool
    ) -> BatchItem:
        """A picture of a batch; one that cannot be used fails alone."""
        try:
            prediction, _ = await self.answer(served, data, threshold, store=store)
        except Refusal as refusal:
            return BatchItem(name=name, error=Failure(reason=refusal.reason, message=str(refusal)))
        return BatchItem(name=name, prediction=prediction)

    def threshold(self, served: ServedModel, asked: float | None) -> float:
        """Below the score that is kept there is nothing to answer."""
        card = served.card
        return card.threshold if asked is None else max(asked, card.score_floor)

    def wants_stored(self, asked: bool) -> bool:
        """Whether pictures of this request are stored; raises `Refusal` if they never are."""
        if asked and self.settings.serve_store == "never":
            raise Refusal(403, "NOT_STORED", "this service stores no pictures")
        return asked or self.settings.serve_store == "always"

    async def _store(self, data: bytes) -> str:
        """Put a picture where scoring finds it; the same one, once a day. Raises `Refusal`."""
        try:
            async with asyncio.timeout(_STORE_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(
                    self._storing, self._put, data
                )
        except TimeoutError:
            trouble: GunDetectionError = ServiceUnavailableError(
                f"it took longer than {_STORE_SECONDS:g} s"
            )
        except GunDetectionError as error:
            trouble = error
        logger.error("a picture could not be stored: %s", trouble.message)
        message = "the picture could not be stored"
        if isinstance(trouble, TerminalError):
            # No rights, or no bucket: that does not pass by itself.
            raise Refusal(503, trouble.reason, f"{message}: ask the service's operator")
        raise busy(f"{message}: try again", 10, trouble.reason)

    def _put(self, data: bytes) -> str:
        assert self._storage is not None, "whether pictures are stored was asked before"
        kind = read_header(data, self._limits).format.lower()
        bucket = self.settings.uploads_bucket
        key = stored_key(hashlib.sha256(data).hexdigest(), kind, datetime.now(UTC))
        self._storage.put_if_absent(bucket, key, data, content_type=f"image/{kind}")
        return f"s3://{bucket}/{key}"


def stored_key(sha256: str, kind: str, now: datetime) -> str:
    return f"predict/{now:%Y/%m/%d}/{sha256}.{kind}"


def _predicted(
    served: ServedModel, looked: Looked, threshold: float, stored_as: str | None
) -> Prediction:
    found = looked.found.above(threshold)
    DETECTIONS.inc(len(found.scores))
    rows = [
        Detection(box=[round(float(v), 2) for v in box], score=round(float(score), 4))
        for box, score in zip(found.boxes, found.scores, strict=True)
    ]
    return Prediction(
        detections=rows,
        threshold=threshold,
        model=served.card.model,
        engine=served.card.engine,
        width=looked.image.width,
        height=looked.image.height,
        timings_ms=looked.timings,
        stored_as=stored_as,
    )


def _unauthorized(message: str) -> Refusal:
    return Refusal(401, "UNAUTHORIZED", message, {"WWW-Authenticate": "Bearer"})


async def gather(work: list[Coroutine[Any, Any, _T]]) -> list[_T]:
    """All at the same time; if one fails, or the caller is cancelled, the others stop."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
    return [task.result() for task in tasks]
