from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gun_detection.detector.architectures import DetectorConfig, build_detector
from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import OutOfMemory, cores
from gun_detection.detector.running import DetectorEngine, reference, runnable

CPU = torch.device("cpu")
SMALL = DetectorConfig(architecture="resnet18_fpn")

Pixels = NDArray[np.uint8]


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
    ],
    ids=["numpy", "PyTorch", "a GPU", "OpenVINO", "pinned"],
)
def test_want_of_memory_is_one_error_which_holds_nothing(fail: Callable[[], object]) -> None:
    def look(images: Sequence[Pixels]) -> list[Detections]:
        fail()
        return []

    with pytest.raises(OutOfMemory) as caught:
        engine(look)(pictures(1))
    assert caught.value.__context__ is None


def _raise(error: Exception) -> None:
    raise error


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
    ("known", "engines"),
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
    known: dict[str, bool], engines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert runnable(CPU) == engines
    assert runnable(torch.device("cuda")) == ("cuda",)
