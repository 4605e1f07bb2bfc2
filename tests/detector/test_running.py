from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gun_detection.detector import engines
from gun_detection.detector.architectures import DetectorConfig, build_detector
from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import OutOfMemory, cores, detect
from gun_detection.detector.running import DetectorEngine, reference, runnable

CPU = torch.device("cpu")
SMALL = DetectorConfig(architecture="resnet18_fpn")

Pixels = NDArray[np.uint8]

# What PyTorch says where its libraries for GPUs lack memory.
WITHIN_LIBRARIES = (
    "GET was unable to find an engine to execute this computation",
    "FIND was unable to find an engine to execute this computation",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)


def pictures(number: int, height: int = 100, width: int = 150) -> list[Pixels]:
    random = np.random.default_rng(0)
    return list(random.integers(0, 256, (number, height, width, 3), dtype=np.uint8))


def engine(look: Callable[[Sequence[Pixels]], list[Detections]], batch: int = 1) -> DetectorEngine:
    predictor: Any = look
    return DetectorEngine("test", predictor, (10, 20), device="cpu", streams=1, batch=batch)


def test_pictures_are_looked_at_so_many_at_a_time() -> None:
    sizes = []

    def look(images: Sequence[Pixels]) -> list[Detections]:
        sizes.append(len(images))
        scores = [np.array([image[0, 0, 0]], np.float32) for image in images]
        return [Detections(np.zeros((1, 4), np.float32), score) for score in scores]

    images = [np.full((5, 5, 3), number, np.uint8) for number in range(7)]
    found = engine(look, batch=3)(images)
    assert [int(one.scores[0]) for one in found] == list(range(7))
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize(
    "fail",
    [
        lambda: np.empty(1 << 60, np.uint8),
        lambda: torch.empty(1 << 60, dtype=torch.uint8),
        lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        lambda: _raise(RuntimeError("Exception from src/inference: std::bad_alloc")),
        lambda: _raise(RuntimeError("CUDA error: out of memory")),
        *(lambda text=text: _raise(RuntimeError(text)) for text in WITHIN_LIBRARIES),
    ],
    ids=["numpy", "PyTorch", "a GPU", "OpenVINO", "pinned", *WITHIN_LIBRARIES],
)
def test_want_of_memory_is_one_error_which_holds_nothing(fail: Callable[[], object]) -> None:
    def look(images: Sequence[Pixels]) -> list[Detections]:
        fail()
        return []

    with pytest.raises(OutOfMemory) as caught:
        engine(look)(pictures(1))
    assert caught.value.__context__ is None


def test_what_the_library_said_of_its_want_is_told(caplog: pytest.LogCaptureFixture) -> None:
    # It may mean another thing: a GPU that PyTorch was not built for.
    said = WITHIN_LIBRARIES[0]
    look: Any = lambda images: _raise(RuntimeError(said))  # noqa: E731
    assert detect(engine(look, batch=2), pictures(2)) == [(None, 0.0)] * 2
    assert len(caplog.messages) == 3
    assert all(said in message for message in caplog.messages)


def _raise(error: Exception) -> None:
    raise error


class Small:
    """Stands for a GPU with the memory for so many pictures."""

    def __init__(self, room: int) -> None:
        self.room, self.asked = room, [0]

    def __call__(self, images: Sequence[Pixels]) -> list[Detections]:
        self.asked.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32)) for _ in images]

    def since(self) -> list[int]:
        asked, self.asked = self.asked, []
        return asked


def test_a_batch_that_does_not_fit_is_tried_once() -> None:
    gpu = Small(room=6)
    small, images = engine(gpu, batch=16), pictures(16, 10, 15)
    gpu.since()
    assert all(found is not None for found, _ in detect(small, images))
    assert gpu.since() == [16, 8, 4, 4, 8, 4, 4]
    for _ in range(4):
        assert len(detect(small, images)) == 16
        assert gpu.since() == [4] * 4
    # Another engine has a memory of its own.
    other = Small(room=16)
    detect(engine(other, batch=16), images)
    assert other.asked[1:] == [16]


def test_memory_that_is_there_again_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_PATIENCE", 8)
    gpu = Small(room=2)
    small, images = engine(gpu, batch=8), pictures(8, 10, 15)
    detect(small, images)
    gpu.room = 8
    gpu.since()
    for _ in range(8):
        detect(small, images)
    # Fewer than fit say nothing.
    detect(small, images[:1])
    assert gpu.since() == [2] * 8 + [4] * 8 + [8] * 2 + [1]
    # Each time that it was too much it takes longer.
    gpu.room = 7
    detect(small, images)
    assert gpu.since() == [8, 4, 4]
    for _ in range(9):
        detect(small, images)
    assert gpu.since() == [4] * 16 + [8, 4, 4]


def test_one_picture_that_is_too_much_takes_nothing_from_the_others() -> None:
    def look(images: Sequence[Pixels]) -> list[Detections]:
        if any(image.shape[0] > 10 for image in images):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gpu(images)

    gpu = Small(room=8)
    small, images = engine(look, batch=8), pictures(7, 10, 15)
    found = detect(small, [*images, *pictures(1, 20, 15)])
    assert [one is None for one, _ in found] == [False] * 7 + [True]
    gpu.since()
    # Alone it says nothing at all.
    assert detect(small, pictures(1, 20, 15)) == [(None, 0.0)]
    detect(small, images)
    assert gpu.since() == [4, 3]


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="the weights are wrong"):
        engine(lambda images: _raise(RuntimeError("the weights are wrong")))(pictures(1))  # type: ignore[arg-type,return-value]


def test_threads_share_the_reference() -> None:
    torch.manual_seed(0)
    shared = reference(build_detector(SMALL), SMALL, 0.0, CPU)
    assert (shared.name, shared.streams, shared.input_size) == ("eager", cores(), (192, 320))
    images = pictures(6) + pictures(6, 90, 60)
    alone = shared(images)
    with ThreadPoolExecutor(4) as pool:
        together = [found for [found] in pool.map(lambda image: shared([image]), images)]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"avx2": True}, ("openvino-f32",)),
        ({"avx512_vnni": True, "avx512_bf16": False}, ("openvino-f32", "openvino-int8")),
        (
            {"avx512_vnni": True, "avx512_bf16": True},
            ("openvino-f32", "openvino-bf16", "openvino-int8"),
        ),
        ({"amx_bf16": True, "amx_int8": True}, ("openvino-f32", "openvino-bf16", "openvino-int8")),
    ],
)
def test_what_a_processor_can_run(
    known: dict[str, bool], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert runnable(CPU) == expected
    assert runnable(torch.device("cuda")) == ("cuda",)
