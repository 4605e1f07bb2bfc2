import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from gun_detection.detector.architectures import ARCHITECTURES, DetectorConfig, build_detector
from gun_detection.detector.roi_align import PADDED_TO, GatherRoIAlign

SHAPES = [(96, 128), (90, 120)]
# Tiny, whole, past every edge, of no width, on each level.
BOXES = [
    torch.tensor([[1.0, 2.0, 5.5, 9.25], [0, 0, 128, 96], [-30, -9, 20, 12], [100, 70, 160, 140]]),
    torch.tensor([[40.0, 40.0, 40.0, 60.0], [10, 10, 90, 70], [127.9, 95.9, 128, 96]]),
]


def features(height: int = 24, width: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        str(level): torch.rand(
            2, 6, height >> level, width >> level, generator=generator, requires_grad=True
        )
        for level in range(3)
    }


@pytest.mark.parametrize("scale", [20, 56, 224], ids=["coarse", "all levels", "fine"])
@pytest.mark.parametrize("output", [(7, 7), (3, 5)])
def test_it_is_torchvisions_forward_and_backward(scale: int, output: tuple[int, int]) -> None:
    gradients, results = [], []
    for kind in (MultiScaleRoIAlign, GatherRoIAlign):
        pool = kind(["0", "1", "2"], output, 2, canonical_scale=scale)
        maps = features()
        results.append(pool(maps, BOXES, SHAPES))
        weights = torch.rand(results[0].shape, generator=torch.Generator().manual_seed(1))
        (results[-1] * weights).sum().backward()
        gradients.append([level.grad for level in maps.values()])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_no_boxes_and_the_order_in_memory() -> None:
    pool, maps = GatherRoIAlign(["0", "1", "2"], 7, 2), features()
    assert pool(maps, [torch.zeros((0, 4))] * 2, SHAPES).shape == (0, 6, 7, 7)
    some = [torch.zeros((0, 4)), BOXES[1]]
    last = {name: level.to(memory_format=torch.channels_last) for name, level in maps.items()}
    assert torch.equal(pool(maps, some, SHAPES), pool(last, some, SHAPES))


@pytest.mark.parametrize("strip", [(40, 320), (320, 40)], ids=["wide", "tall"])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_strips_are_pooled_by_the_padded_size_and_leave_no_trace(
    device: str, strip: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "gpu":
        monkeypatch.setattr(GatherRoIAlign, "_gathered", MultiScaleRoIAlign.forward)
    pool = GatherRoIAlign(["0", "1", "2"], 7, 2, canonical_scale=56)
    for shape in (strip, (96, 128), strip):
        padded = -(-shape[0] // PADDED_TO) * PADDED_TO, -(-shape[1] // PADDED_TO) * PADDED_TO
        maps = features(padded[0] // 4, padded[1] // 4)
        theirs = MultiScaleRoIAlign(["0", "1", "2"], 7, 2, canonical_scale=56)
        expected = theirs(maps, BOXES, [padded] * 2)
        found = pool(maps, BOXES, [shape] * 2)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_detector_has_it(name: str) -> None:
    model = build_detector(DetectorConfig(architecture=name))
    pool = model.roi_heads.box_roi_pool
    assert isinstance(pool, GatherRoIAlign)
    assert model.transform.size_divisible == PADDED_TO
    with torch.inference_mode():
        maps = model.backbone(torch.rand(1, 3, 96, 128))
        boxes = [torch.tensor([[5.0, 5.0, 60.0, 80.0], [0, 0, 128, 96]])]
        theirs = MultiScaleRoIAlign(pool.featmap_names, pool.output_size, pool.sampling_ratio)
        expected = theirs(maps, boxes, [(96, 128)])
        torch.testing.assert_close(pool(maps, boxes, [(96, 128)]), expected, atol=1e-4, rtol=1e-4)
