"""The service itself, without HTTP: who may ask, how much, and what becomes of a picture."""

import asyncio
import hashlib
import logging
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from gun_detection.errors import GunDetectionError, SettingsError
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

    async def start(self) -> None:
        await self.models.start()

    async def stop(self) -> None:
        await self.models.stop()
        self._pictures.close()

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

    async def look(self, served: ServedModel, data: bytes) -> Looked:
        """In the time that there is; raises `Refusal`."""
        try:
            async with asyncio.timeout(self.settings.serve_timeout):
                looked = await self._pictures.look(served, data)
        except TimeoutError:
            PICTURES.labels("TIMEOUT").inc()
            seconds = self.settings.serve_timeout
            raise busy(f"no answer within {seconds:g} s: try again", 10, "TIMEOUT") from None
        except GunDetectionError as error:
            PICTURES.labels(error.reason).inc()
            raise refusal_of(error) from None
        PICTURES.labels("looked at").inc()
        return looked

    async def overlay(self, served: ServedModel, data: bytes, looked: Looked, at: float) -> bytes:
        """PNG with the boxes at or above the threshold `at`; raises `Refusal`."""
        try:
            return await self._pictures.overlay(data, looked, at, served.card.model)
        except GunDetectionError as error:
            raise refusal_of(error) from None

    def predicted(
        self, served: ServedModel, looked: Looked, threshold: float, stored_as: str | None
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

    async def batch_item(
        self, served: ServedModel, name: str, data: bytes, threshold: float, store: bool
    ) -> BatchItem:
        """A picture of a batch; one that cannot be used fails alone."""
        try:
            looked = await self.look(served, data)
            stored_as = await self.store(data) if store else None
        except Refusal as refusal:
            return BatchItem(name=name, error=Failure(reason=refusal.reason, message=str(refusal)))
        prediction = self.predicted(served, looked, threshold, stored_as)
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

    async def store(self, data: bytes) -> str:
        """Put a picture where scoring finds it; the same one, once a day. Raises `Refusal`."""
        try:
            return await asyncio.to_thread(self._store, data)
        except GunDetectionError as error:
            logger.error("a picture could not be stored: %s", error.message)
            raise busy("the picture could not be stored: try again", 10, error.reason) from None

    def _store(self, data: bytes) -> str:
        kind = read_header(data, self._limits).format.lower()
        sha256 = hashlib.sha256(data).hexdigest()
        key = f"predict/{datetime.now(UTC):%Y/%m/%d}/{sha256}.{kind}"
        storage = Storage(self.settings)
        storage.put_if_absent(self.settings.uploads_bucket, key, data, content_type=f"image/{kind}")
        return f"s3://{self.settings.uploads_bucket}/{key}"


def _unauthorized(message: str) -> Refusal:
    return Refusal(401, "UNAUTHORIZED", message, {"WWW-Authenticate": "Bearer"})


async def gather(work: list[Coroutine[Any, Any, _T]]) -> list[_T]:
    """All at the same time; if one fails, or the caller is cancelled, the others stop."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
    return [task.result() for task in tasks]
