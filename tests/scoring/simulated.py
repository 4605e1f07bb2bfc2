"""An engine that needs no network, as what it finds follows from the pixels alone; a server that
does not give out its objects."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import OutOfMemory
from gun_detection.errors import GunDetectionError, ServiceUnavailableError, SettingsError
from gun_detection.settings import Settings
from gun_detection.storage import Storage

DENIED = SettingsError("access denied", reason="ACCESS_DENIED")
AWAY = ServiceUnavailableError("the S3 server answered InternalError")


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


class Refusing(Storage):
    """Raises the error for keys that the test names; for all of them by default."""

    def __init__(
        self, settings: Settings, error: GunDetectionError, keys: set[str] | None = None
    ) -> None:
        super().__init__(settings)
        self.error, self.keys = error, keys

    def get(self, bucket: str, key: str, **options: Any) -> bytes:
        if self.keys is None or key in self.keys:
            raise self.error
        return super().get(bucket, key, **options)
