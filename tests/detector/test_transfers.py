"""What would wait for a GPU, found without one: pretended tensors tell what is asked of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import MultiScaleRoIAlign

from gun_detection.detector import atlas, cuda, proposals
from gun_detection.detector.architectures import ARCHITECTURES, DetectorConfig, build_detector
from gun_detection.detector.cuda import CudaDetector
from gun_detection.detector.transfers import to_device, to_host

GPU = torch.device("cuda", 0)


class Watch(TorchDispatchMode):
    """Refuses what copies between a GPU and the computer's memory and waits until it is done."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = _run(func, args, kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # A single number goes with the operation that it is for, unless that is to copy it.
        whole = [leaf for leaf in given if leaf.dim() or len(given) == 1]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        devices = {leaf.device.type for leaf in whole + made}
        if len(devices) > 1 and not kwargs.get("non_blocking"):
            raise AssertionError(f"{func} waits for the GPU")
        return result


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    # What these are in plain operations, which can be pretended.
    if func is torch.ops.aten.cudnn_convolution_relu.default:
        return torch.ops.aten.conv2d.default(*args)
    if func is torch.ops.aten.cudnn_convolution_add_relu.default:
        pixels, weight, _, _, *rest = args
        return torch.ops.aten.conv2d.default(pixels, weight, *rest)
    return func(*args, **kwargs)


@contextmanager
def pretended() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes, torch.inference_mode():
        yield fakes


def _from_pinned_memory(values: list[list[float]], device: torch.device) -> Tensor:
    """`to_device` without the pinning, which wants a driver."""
    return torch.tensor(values).to(device, non_blocking=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_keeps_no_gpu_waiting(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (atlas, cuda, proposals):
        monkeypatch.setattr(module, "to_device", _from_pinned_memory)
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    model = CudaDetector(build_detector(DetectorConfig(architecture=architecture)).eval())
    with pretended() as gpu:
        model._apply(lambda tensor: gpu.from_tensor(tensor).to(GPU))
        pictures = [torch.empty(3, *size, device=GPU) for size in ((600, 800), (580, 800))]
        with Watch():
            model.find(pictures, 16)


def test_what_waits_is_noticed() -> None:
    with pretended(), Watch():
        table = torch.empty(6, 4, device=GPU)
        maps = {
            name: torch.empty(1, 8, 32 >> level, 32, device=GPU) for level, name in enumerate("01")
        }
        with pytest.raises(AssertionError, match="waits for the GPU"):
            table[:, [0, 1, 0, 1]]
        with pytest.raises(AssertionError, match="waits for the GPU"):
            torch.ones(2).to(GPU)
        # A constant made there is copied, too, which wants a driver.
        with pytest.raises((AssertionError, RuntimeError), match=r"waits for the GPU|NVIDIA"):
            BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(table, table)
        with pytest.raises(AssertionError, match="waits for the GPU"):
            table.cpu()
        with pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
            MultiScaleRoIAlign(["0", "1"], 7, 2)(maps, [table], [(128, 128)])


def test_numbers_go_and_come_back() -> None:
    table = to_device([[1.0, 2.5], [3, 4]], torch.device("cpu"))
    assert table.dtype == torch.float32
    assert to_host(table).tolist() == [[1.0, 2.5], [3.0, 4.0]]
