"""Which model answers: the champion, whoever it is by now, or one file."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gun_detection.batching import Batcher
from gun_detection.database import open_session
from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import Engine, detect_each, shape_class
from gun_detection.errors import (
    GunDetectionError,
    ImageError,
    ServiceUnavailableError,
    TerminalError,
)
from gun_detection.release.champion import get_model, require_storable
from gun_detection.release.packages import engine_for, open_engine, open_file_engine
from gun_detection.serving.answers import ModelCard
from gun_detection.serving.metrics import BATCH, MODEL, STALE
from gun_detection.serving.refusals import busy, refusal_of
from gun_detection.settings import Settings
from gun_detection.storage import Storage

logger = logging.getLogger(__name__)

Found = tuple[Detections | ImageError | None, float]


class ServedModel:
    """One model version at work. Requests that began with it end with it."""

    def __init__(self, card: ModelCard, engine: Engine) -> None:
        self.card, self.engine = card, engine
        self._batcher: Batcher[NDArray[np.uint8], Found] = Batcher(
            self._detect, engine.batch, engine.streams, lambda pixels: shape_class(pixels.shape)
        )
        self._batcher.__enter__()
        self._users = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, pixels: NDArray[np.uint8]) -> "Future[Found]":
        """(detections in pixels of this array, milliseconds); with what others ask meanwhile.

        In place of detections the error of a picture for which the model computes what is no
        number, or None for one that needs more memory than there is.
        """
        return self._batcher.submit(pixels)

    def _detect(self, images: Sequence[NDArray[np.uint8]]) -> list[Found]:
        BATCH.observe(len(images))
        return detect_each(self.engine, images)

    @contextmanager
    def in_use(self) -> "Iterator[ServedModel]":
        self._users += 1
        self._idle.clear()
        try:
            yield self
        finally:
            self._users -= 1
            if not self._users:
                self._idle.set()

    async def close(self) -> None:
        """End its threads when the last request is done with it."""
        await self._idle.wait()
        await asyncio.to_thread(self._batcher.__exit__)


class ModelKeeper:
    """Has one model answer, and another one as soon as there is another champion."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._serving: ServedModel | None = None
        self._trouble: GunDetectionError | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the model; with the champion, go on without one and look again and again."""
        await self._look()
        if follows_champion(self._settings):
            self._following = asyncio.create_task(self._follow())
        elif self._trouble is not None:
            raise self._trouble

    async def stop(self) -> None:
        if self._following is not None:
            self._following.cancel()
            with suppress(asyncio.CancelledError):
                await self._following
        if self._serving is not None:
            self._retire(self._serving)
        await asyncio.gather(*self._closing)

    @property
    def serving(self) -> ServedModel:
        """What answers now; raises `Refusal` (503) where there is nothing yet."""
        if self._serving is None:
            trouble = self._trouble
            if isinstance(trouble, TerminalError) and trouble.reason != "NO_CHAMPION":
                # It looks again and again, but a person has to change something first.
                raise refusal_of(trouble)
            reason = trouble.reason if trouble else "STARTING"
            message = "there is no champion yet" if reason == "NO_CHAMPION" else "no model is ready"
            raise busy(f"{message}: try again", self._settings.serve_refresh_seconds, reason)
        return self._serving

    @property
    def card(self) -> ModelCard:
        """What answers now; raises `Refusal` (503) where there is nothing yet."""
        card = self.serving.card
        return card.model_copy(update={"stale": self._trouble.reason if self._trouble else None})

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._settings.serve_refresh_seconds)
            await self._look()

    async def _look(self) -> None:
        """Serve what is to be served by now; what went wrong is told once, and tried again."""
        before = self._serving
        try:
            new = await asyncio.to_thread(_load, self._settings, before.card if before else None)
        except GunDetectionError as error:
            if self._trouble is None or self._trouble.reason != error.reason:
                logger.error("no other model can be served: %s (%s)", error.message, error.reason)
            self._trouble = error
            STALE.set(before is not None)
            return
        except Exception as error:
            # Whatever it is: who stops looking serves an old champion for ever.
            logger.exception("no other model can be served")
            message = f"it cannot be loaded: {error}"
            # A full disk, or too little memory, may pass.
            self._trouble = ServiceUnavailableError(message, reason="LOAD_FAILED")
            STALE.set(before is not None)
            return
        self._trouble = None
        STALE.set(0)
        if new is None:
            return
        self._serving = ServedModel(*new)
        if before is not None:
            # Figures of several processes lie in files, from which clearing takes nothing.
            MODEL.labels(before.card.model).set(0)
        MODEL.clear()
        MODEL.labels(self._serving.card.model).set(1)
        logger.info("serving %s on %s", self._serving.card.model, self._serving.card.engine)
        if before is not None:
            self._retire(before)

    def _retire(self, served: ServedModel) -> None:
        task = asyncio.create_task(served.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def follows_champion(settings: Settings) -> bool:
    return settings.serve_model == "champion"


def _load(settings: Settings, now: ModelCard | None) -> tuple[ModelCard, Engine] | None:
    """What is to be served; None if that is `now` already."""
    if not follows_champion(settings):
        return _load_file(settings)
    with open_session(settings) as session:
        version = get_model(session, "champion")
    # A package may be accepted after the promotion.
    if now and (version.id, engine_for(version, settings)) == (now.model, now.engine):
        return None
    engine = open_engine(version, settings, Storage(settings))
    card = _card(settings, version.id, version.threshold, engine)
    known = {"architecture": version.architecture, "dataset": version.dataset_id}
    return card.model_copy(update=known), engine


def _load_file(settings: Settings) -> tuple[ModelCard, Engine]:
    path = Path(settings.serve_model)
    engine, config, threshold = open_file_engine(path, settings)
    card = _card(settings, path.name, threshold, engine)
    return card.model_copy(update={"architecture": config.architecture}), engine


def _card(settings: Settings, name: str, threshold: float, engine: Engine) -> ModelCard:
    if settings.serve_threshold is not None:
        threshold = settings.serve_threshold
    require_storable(name, threshold, settings)
    return ModelCard(
        model=name,
        architecture="",
        threshold=threshold,
        engine=engine.name,
        device=engine.device,
        input_size=list(engine.input_size),
        score_floor=settings.score_floor,
        source="champion" if follows_champion(settings) else "file",
        dataset=None,
        stores=settings.serve_store,
        loaded_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
