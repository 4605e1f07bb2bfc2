"""What happens to a picture: decode in a sandbox, infer with others, draw."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import cores
from gun_detection.errors import ImageError
from gun_detection.images import DecodedImage, DecoderPool, draw_boxes, encode_png
from gun_detection.serving.answers import DISCLAIMER, Timings
from gun_detection.serving.metrics import STAGE_SECONDS, UNDER_WAY
from gun_detection.serving.models import ServedModel
from gun_detection.serving.refusals import busy
from gun_detection.settings import Settings

_P = ParamSpec("_P")
_T = TypeVar("_T")


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
    """Decoders, which are processes, and threads that wait for them; to be closed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        threads = max(2, cores())
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
        self._decoders = DecoderPool(settings, threads)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._decoders.__exit__()

    async def look(self, served: ServedModel, data: bytes) -> Looked:
        """Raises `ImageError` as the decoder does, or where it is too much for the memory."""
        began = time.perf_counter()
        fit = served.engine.input_size
        image = await self._in_thread(self._decoders.decode, data, fit)
        decoded = time.perf_counter()
        found, inference = await asyncio.wrap_future(served.submit(image.pixels))
        done = time.perf_counter()
        if found is None:
            raise ImageError(
                f"a picture of {image.width}x{image.height} pixels needs more memory than there "
                "is: send a smaller one",
                reason="DECODE_MEMORY",
            )
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
        """The whole picture as PNG, with its boxes and the words that nobody has reviewed them."""
        began = time.perf_counter()
        drawn = await self._in_thread(self._draw, data, looked, threshold, model)
        STAGE_SECONDS.labels("draw").observe(time.perf_counter() - began)
        return drawn

    def _in_thread(
        self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs
    ) -> asyncio.Future[_T]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._threads, partial(function, *arguments, **named))

    def _draw(self, data: bytes, looked: Looked, threshold: float, model: str) -> bytes:
        image = looked.image
        # What was looked at may be smaller than the picture.
        if image.pixels.shape[:2] != (image.height, image.width):
            image = self._decoders.decode(data)
        found = looked.found.above(threshold)
        drawn = draw_boxes(image.pixels, found.boxes, found.scores, threshold, caption="unreviewed")
        words = {"Model": model, "Threshold": f"{threshold:g}", "Review": DISCLAIMER}
        return encode_png(drawn, texts=words)


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 2)
