"""What happens to a picture: decode in a sandbox, infer with others, draw."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

import numpy as np

from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import cores
from gun_detection.errors import ImageError, ModelError, ServiceUnavailableError
from gun_detection.images import (
    DOUBTFUL,
    DecodedImage,
    DecoderPool,
    Reason,
    draw_boxes,
    encode_png,
)
from gun_detection.serving.answers import DISCLAIMER, Timings
from gun_detection.serving.metrics import STAGE_SECONDS, UNDER_WAY
from gun_detection.serving.models import ServedModel
from gun_detection.serving.protocol import unsent_bytes
from gun_detection.serving.refusals import Refusal, busy
from gun_detection.settings import Settings

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

_SMALL_SIDE = 32
# Drawn pictures have up to a hundred megabytes each, which slow clients leave in the memory.
_MOST_UNSENT = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Looked:
    """A picture that was looked at; boxes are in pixels of all of it."""

    image: DecodedImage
    found: Detections
    timings: Timings


class Slots:
    """So many pictures may be under way; who comes then is told to come again."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._seconds = 1.0

    @contextmanager
    def hold(self, pictures: int) -> Iterator[None]:
        """Raises `Refusal` (503) with the time after which there should be room."""
        if self._taken + pictures > self._most:
            raise busy(
                f"{self._taken} pictures are under way, the most that are taken: try again",
                self._seconds,
            )
        self._taken += pictures
        UNDER_WAY.inc(pictures)
        began = time.monotonic()
        try:
            yield
        finally:
            self._taken -= pictures
            UNDER_WAY.dec(pictures)
            # How long the last ones took, with their waiting.
            self._seconds += 0.2 * (time.monotonic() - began - self._seconds)


class Pictures:
    """Decoders, which are processes, and threads that wait for them; to be closed.

    Its methods raise `ImageError` where the picture is to blame, and `ServiceUnavailableError`
    where the machine is.
    """

    def __init__(self, settings: Settings) -> None:
        threads = max(2, cores())
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
        self._drawing = asyncio.Semaphore(threads)
        # Two tries have to fit into the time that there is for an answer.
        seconds = min(settings.decode_timeout, 0.4 * settings.serve_timeout)
        limited = settings.model_copy(update={"decode_timeout": seconds})
        self._decoders = DecoderPool(limited, threads)
        side = max(_SMALL_SIDE, settings.min_image_side)
        self._small = np.zeros((side, side, 3), np.uint8)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._decoders.__exit__()

    async def look(self, served: ServedModel, data: bytes) -> Looked:
        """What the model finds in it.

        Raises `Refusal` (422) where what it computes for this picture is no number, `ModelError`
        where that is so for any.
        """
        began = time.perf_counter()
        image = await self._decode(data, served.engine.input_size)
        decoded = time.perf_counter()
        found, inference = await asyncio.wrap_future(served.submit(image.pixels))
        done = time.perf_counter()
        if found is None:
            await self._demand_memory(served)
            raise ImageError(
                f"a picture of {image.width}x{image.height} pixels needs more memory than there "
                "is: send a smaller one",
                reason=Reason.DECODE_MEMORY,
            )
        if isinstance(found, ImageError):
            await self._demand_numbers(served)
            raise Refusal(422, found.reason, found.message)
        height, width = image.pixels.shape[:2]
        STAGE_SECONDS.labels("decode").observe(decoded - began)
        STAGE_SECONDS.labels("wait_and_inference").observe(done - decoded)
        timings = Timings(
            decode=_milliseconds(decoded - began),
            wait_and_inference=_milliseconds(done - decoded),
            inference=inference,
            total=_milliseconds(done - began),
        )
        return Looked(image, found.resized((width, height), (image.width, image.height)), timings)

    async def overlay(self, data: bytes, looked: Looked, threshold: float, model: str) -> bytes:
        """The whole picture as PNG, with its boxes and the words that nobody has reviewed them.

        Raises `Refusal` (503) where clients have left too much in the memory.
        """
        # Few at a time, so that each sees what those before it have added.
        async with self._drawing:
            if unsent_bytes() > _MOST_UNSENT:
                raise busy("drawn pictures wait for slow clients: try again, or ask for JSON", 10)
            began = time.perf_counter()
            image = looked.image
            # What was looked at may be smaller than the picture.
            if image.pixels.shape[:2] != (image.height, image.width):
                image = await self._decode(data)
            drawn = await self._in_thread(_draw, image, looked.found, threshold, model)
            STAGE_SECONDS.labels("draw").observe(time.perf_counter() - began)
            return drawn

    async def _decode(self, data: bytes, fit: tuple[int, int] | None = None) -> DecodedImage:
        """Once more, where it is not certain that the picture is to blame."""
        try:
            return await self._in_thread(self._decoders.decode, data, fit)
        except ImageError as error:
            if error.reason not in DOUBTFUL:
                raise
        try:
            return await self._in_thread(self._decoders.decode, data, fit)
        except ImageError as error:
            if error.reason in DOUBTFUL:
                await self._demand_decoder()
            raise

    async def _demand_decoder(self) -> None:
        """Raise `ServiceUnavailableError` where no picture can be decoded."""
        try:
            await self._in_thread(self._decoders.decode, encode_png(self._small))
        except ImageError:
            raise ServiceUnavailableError(
                "no picture can be decoded now: try again", reason="DECODER_UNAVAILABLE"
            ) from None

    async def _demand_memory(self, served: ServedModel) -> None:
        """Raise `ServiceUnavailableError` where there is too little memory for any picture."""
        found, _ = await asyncio.wrap_future(served.submit(self._small))
        if found is None:
            raise ServiceUnavailableError(
                "there is not even the memory for a small picture now: try again",
                reason="NO_MEMORY",
            )

    async def _demand_numbers(self, served: ServedModel) -> None:
        """Raise `ModelError` where the model computes no numbers for any picture."""
        found, _ = await asyncio.wrap_future(served.submit(self._small))
        if isinstance(found, ImageError):
            logger.error("%s is damaged: %s", served.card.model, found.message)
            raise ModelError(found.message, reason=found.reason)

    def _in_thread(
        self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs
    ) -> asyncio.Future[_T]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._threads, partial(function, *arguments, **named))


def _draw(image: DecodedImage, found: Detections, threshold: float, model: str) -> bytes:
    above = found.above(threshold)
    drawn = draw_boxes(image.pixels, above.boxes, above.scores, threshold, caption="unreviewed")
    words = {"Model": model, "Threshold": f"{threshold:g}", "Review": DISCLAIMER}
    return encode_png(drawn, texts=words)


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 2)
