"""Engines that run a detector, and which of them this machine can run."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.detector.architectures import DetectorConfig, input_size
from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import (
    CPU_ENGINES,
    GPU_ENGINES,
    REFERENCE,
    OutOfMemory,
    cores,
)
from gun_detection.detector.inference import Predictor

# Any one of these instructions. Older processors emulate bfloat16 slowly, and sums of products of
# 8 bits overflow in theirs.
_INSTRUCTIONS = {
    "openvino-bf16": ("avx512_bf16", "amx_bf16"),
    "openvino-int8": ("avx512_vnni", "avx_vnni", "amx_int8"),
}
# What PyTorch and OpenVINO say for want of memory, in errors without a type of their own.
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
    # Of the computer's own, for what goes to the GPU and comes from it.
    "CUDA error: out of memory",
    # Of a GPU's, within the libraries for convolutions and products of matrices.
    "unable to find an engine to execute this computation",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "HOST_ALLOCATION_FAILED",
    "DEVICE_ALLOCATION_FAILED",
)


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
