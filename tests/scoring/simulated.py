"""An engine that needs no network: what it finds follows from the pixels alone."""

import threading
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import OutOfMemory


class Simulated:
    """Finds as many boxes as the first pixel's red says, modulo 4, scored by its green.

    Takes `seconds` for each picture, and is out of memory for more than `most` pixels at once.
    """

    name, device = "simulated", "nowhere"

    def __init__(
        self, *, seconds: float = 0.0, streams: int = 2, batch: int = 1, most: int | None = None
    ) -> None:
        self.streams, self.batch = streams, batch
        self.input_size = (800, 1333)
        self.pictures = 0
        self.batches: list[int] = []
        self._seconds, self._most = seconds, most
        self._lock = threading.Lock()

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        if self._most is not None and sum(image.size for image in images) > self._most:
            raise OutOfMemory("too much")
        with self._lock:
            self.pictures += len(images)
            self.batches.append(len(images))
        time.sleep(self._seconds * len(images))
        return [found(image) for image in images]


def found(image: NDArray[np.uint8]) -> Detections:
    height, width = image.shape[:2]
    count, green = int(image[0, 0, 0]) % 4, int(image[0, 0, 1])
    boxes = [[i, i, width - i, height - i] for i in range(count)]
    scores = [0.5 + green / 512 - i / 100 for i in range(count)]
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32))
