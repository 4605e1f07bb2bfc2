"""The engines: ways to run a detector, by name, and what of them a machine can run.

`eager` is the reference, which every other one is held against.
"""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.detector.architectures import DetectorConfig, input_size
from gun_detection.detector.inference import Detections, Predictor

logger = logging.getLogger(__name__)

REFERENCE = "eager"
CPU_ENGINES = ("openvino-f32", "openvino-bf16", "openvino-int8")
GPU_ENGINES = ("cuda",)

# Any one of these instructions. Older processors emulate bfloat16 slowly, and sums of products of
# 8 bits overflow in theirs.
_INSTRUCTIONS = {
    "openvino-bf16": ("avx512_bf16", "amx_bf16"),
    "openvino-int8": ("avx512_vnni", "avx_vnni", "amx_int8"),
}
GPU_BATCH = 16
# While one batch waits for the processor, the GPU works at another.
GPU_STREAMS = 2
# What PyTorch and OpenVINO say for want of memory, in errors without a type of their own.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "bad allocation")


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
        """Detections of each picture, uint8 (H, W, 3) RGB; raises `OutOfMemory`."""
        ...


class DetectorEngine:
    """A `Predictor` as an engine; up to `streams` threads may call it at once."""

    def __init__(
        self,
        name: str,
        predictor: Predictor,
        input_size: tuple[int, int],
        *,
        device: str,
        streams: int,
        batch: int,
    ) -> None:
        self.name, self.device, self.input_size = name, device, input_size
        self.streams, self.batch = streams, batch
        self.predictor = predictor

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of each picture, at most `batch` of them at a time."""
        try:
            return [
                found
                for start in range(0, len(images), self.batch)
                for found in self.predictor(images[start : start + self.batch])
            ]
        except (MemoryError, RuntimeError) as error:
            if not _lacks_memory(error):
                raise
            message = str(error).strip().partition("\n")[0]
        # Outside the handler: its exception would keep the tensors of the failed batch alive.
        raise OutOfMemory(message)


def detect(
    engine: Engine, images: Sequence[NDArray[np.uint8]]
) -> list[tuple[Detections | None, float]]:
    """(detections, its share of the milliseconds) of each picture; None for one that is too much.

    A batch that does not fit into memory is halved until its parts do.
    """
    began = time.perf_counter()
    try:
        found = engine(images)
    except OutOfMemory:
        logger.warning("a batch of %d pictures does not fit into memory", len(images))
    else:
        share = round(1000 * (time.perf_counter() - began) / len(images), 3)
        return [(one, share) for one in found]
    # Outside the handler: its exception would keep the tensors of the failed batch alive.
    if len(images) == 1:
        return [(None, 0.0)]
    half = len(images) // 2
    return detect(engine, images[:half]) + detect(engine, images[half:])


def shape_class(shape: tuple[int, ...]) -> tuple[int, int]:
    """The same for pictures (height, width, …) of about the same proportions.

    The pictures of a batch are padded to the largest: like shapes waste least.
    """
    height, width = shape[:2]
    return (1, round(4 * width / height)) if width >= height else (round(4 * height / width), 1)


def _lacks_memory(error: MemoryError | RuntimeError) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _NO_MEMORY)


def reference(
    model: FasterRCNN, config: DetectorConfig, floor: float, device: torch.device
) -> DetectorEngine:
    """The reference: PyTorch, one operation after the other.

    On a CPU, threads that look at a picture each use the cores better than one operation that is
    shared among them (`one_thread_each`).
    """
    predictor = Predictor(model, device, floor, mirrored=config.mirrored)
    streams = cores() if device.type == "cpu" else 1
    return DetectorEngine(
        REFERENCE, predictor, input_size(config), device=str(device), streams=streams, batch=1
    )


def one_thread_each() -> None:
    """Have PyTorch use one thread for each that calls it: for a process that does so with many.

    To be called before those threads start: a thread keeps what held when it first computed.
    """
    torch.set_num_threads(1)


def runnable(device: torch.device) -> tuple[str, ...]:
    """The engines beside the reference that this machine has the hardware for."""
    if device.type == "cuda":
        return GPU_ENGINES
    known = torch.cpu.get_capabilities()
    return tuple(
        name
        for name in CPU_ENGINES
        if name not in _INSTRUCTIONS or any(known.get(word) for word in _INSTRUCTIONS[name])
    )


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
