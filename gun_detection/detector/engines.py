"""The engines: ways to run a detector, by name, and what scoring asks of each.

`eager` is the reference, which every other one is held against. Loads no PyTorch: see `running`.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from gun_detection.detector.detections import Detections
from gun_detection.errors import ImageError

logger = logging.getLogger(__name__)

REFERENCE = "eager"
CPU_ENGINES = ("openvino-f32", "openvino-bf16", "openvino-int8")
GPU_ENGINES = ("cuda",)

GPU_BATCH = 16
# While one batch waits for the processor, the GPU works at another.
GPU_STREAMS = 2

# After so many batches that fit into memory, more pictures at a time are tried again: another
# process may have held the memory for a moment. Twice as many after each try that failed.
_PATIENCE, _MOST_PATIENCE = 32, 1024


class OutOfMemory(Exception):  # noqa: N818
    """These pictures are too much for the memory: fewer at a time may not be."""


class Engine(Protocol):
    """What scoring needs of a detector.

    name, device: as people read them.
    streams: how many threads call it at once for the most pictures per second on this machine.
    batch: pictures of like shape to give in one call.
    input_size: (shorter, longest) side that pictures are resized to, pixels.
    """

    name: str
    device: str
    streams: int
    batch: int
    input_size: tuple[int, int]

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of each picture, uint8 (H, W, 3) RGB.

        Raises `OutOfMemory`, and `ImageError` (`NOT_FINITE`) where the detector computes what is no
        number for one of them.
        """
        ...


def detect(
    engine: Engine, images: Sequence[NDArray[np.uint8]]
) -> list[tuple[Detections | None, float]]:
    """(detections, its share of the milliseconds) of each picture; None for one that is too much.

    A batch that does not fit into memory is halved until its parts do. Later ones begin with as
    many pictures as did. Raises `ImageError` as the engine does.
    """
    with _LOCK:
        room = _ROOM.setdefault(engine, _Room())
    most = room.most or len(images)
    tried: list[tuple[int, bool]] = []
    found = [
        one
        for start in range(0, len(images), most)
        for one in _in_parts(engine, images[start : start + most], tried)
    ]
    room.learn(tried)
    return found


def detect_each(
    engine: Engine, images: Sequence[NDArray[np.uint8]]
) -> list[tuple[Detections | ImageError | None, float]]:
    """`detect`, with the engine's error for each picture that it is about, and for no other."""
    try:
        return [*detect(engine, images)]
    except ImageError as error:
        if len(images) == 1:
            return [(error, 0.0)]
    return [one for image in images for one in detect_each(engine, [image])]


def _in_parts(
    engine: Engine, images: Sequence[NDArray[np.uint8]], tried: list[tuple[int, bool]]
) -> list[tuple[Detections | None, float]]:
    """`detect`, which `tried` tells how many pictures did fit into memory together, or did not."""
    began = time.perf_counter()
    try:
        found = engine(images)
    except OutOfMemory as error:
        logger.warning("a batch of %d pictures does not fit into memory: %s", len(images), error)
    else:
        tried.append((len(images), True))
        share = round(1000 * (time.perf_counter() - began) / len(images), 3)
        return [(one, share) for one in found]
    # Outside the handler: its exception would keep the tensors of the failed batch alive.
    tried.append((len(images), False))
    if len(images) == 1:
        return [(None, 0.0)]
    half = len(images) // 2
    return _in_parts(engine, images[:half], tried) + _in_parts(engine, images[half:], tried)


class _Room:
    """How many pictures fit into an engine's memory together, as far as it is known.

    most: so many, or None as long as nothing failed. Threads may share it.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self._fitted, self._patience = 0, _PATIENCE
        self._lock = threading.Lock()

    def learn(self, tried: list[tuple[int, bool]]) -> None:
        """From batches (pictures, whether they fitted) of one call."""
        fitted = [number for number, fits in tried if fits]
        with self._lock:
            if len(fitted) < len(tried):
                if self.most is not None:
                    self._patience = min(2 * self._patience, _MOST_PATIENCE)
                # Where nothing fitted, that is so for any number.
                self.most = max(fitted, default=self.most)
                self._fitted = 0
            elif self.most is not None:
                # Smaller ones say nothing about it.
                self._fitted += sum(number >= self.most for number in fitted)
                if self._fitted >= self._patience:
                    self.most, self._fitted = 2 * self.most, 0


_ROOM: WeakKeyDictionary[Engine, _Room] = WeakKeyDictionary()
_LOCK = threading.Lock()


def shape_class(shape: tuple[int, ...]) -> tuple[int, int]:
    """The same for pictures (height, width, …) of about the same proportions.

    The pictures of a batch are padded to the largest: like shapes waste least.
    """
    height, width = shape[:2]
    return (1, round(4 * width / height)) if width >= height else (round(4 * height / width), 1)


def cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """How many cores this process may use: those it is bound to, within its container's limit.

    The limit is that of Linux's control groups: microseconds of computing in a period, or `max`.
    """
    allowed = len(os.sched_getaffinity(0))
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            allowed = min(allowed, round(int(limit) / int(period)))
    return max(1, allowed)
