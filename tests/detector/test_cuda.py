from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, nms

from gun_detection.detector import cuda, proposals
from gun_detection.detector.architectures import (
    ARCHITECTURES,
    DetectorConfig,
    build_detector,
    fold_batch_norm,
)
from gun_detection.detector.cuda import CudaDetector
from gun_detection.detector.detections import Detections
from gun_detection.detector.fusion import _ConvolutionReLU, fuse
from gun_detection.detector.inference import Predictor
from gun_detection.detector.roi_align import GatherRoIAlign
from gun_detection.errors import ImageError

CPU = torch.device("cpu")


def pictures(*sizes: tuple[int, int]) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def both(
    config: DetectorConfig,
    images: list[NDArray[np.uint8]],
    floor: float = 0.0,
    precision: torch.dtype = torch.float32,
) -> tuple[list[Detections], list[Detections]]:
    """What torchvision's detector finds, and ours, in the same batch."""
    torch.manual_seed(0)
    model = build_detector(config).eval()
    usual = Predictor(deepcopy(model), CPU, floor, mirrored=config.mirrored)
    tuned = Predictor(CudaDetector(model, precision), CPU, floor, mirrored=config.mirrored)  # type: ignore[arg-type]
    return usual(images), tuned(images)


@pytest.mark.parametrize("norm", ["frozen", "folded", "trainable"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_batch_gives_what_torchvision_finds(norm: str, mirrored: bool) -> None:
    config = DetectorConfig(architecture="resnet18_fpn", norm=norm, mirrored=mirrored)
    images = pictures((100, 150), (90, 60), (300, 200), (77, 140), (40, 1000))
    for usual, tuned in zip(*both(config, images), strict=True):
        assert len(usual.scores) > 10
        np.testing.assert_allclose(tuned.scores, usual.scores, atol=1e-5)
        np.testing.assert_allclose(tuned.boxes, usual.boxes, atol=0.01)


def test_a_batch_that_takes_more_rounds_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    find = CudaDetector.find

    def watched(self: CudaDetector, pictures: list[Tensor], rounds: int, *how: Any) -> Tensor:
        asked.append(rounds)
        return find(self, pictures, rounds, *how)

    monkeypatch.setattr(CudaDetector, "find", watched)
    monkeypatch.setattr(cuda, "_ROUNDS", 1)
    config = DetectorConfig(architecture="resnet18_fpn")
    for usual, tuned in zip(*both(config, pictures((100, 150), (90, 140))), strict=True):
        np.testing.assert_allclose(tuned.scores, usual.scores, atol=1e-5)
    assert asked[:2] == [1, 4]


def test_less_precision_is_near() -> None:
    config = DetectorConfig(architecture="resnet18_fpn")
    images = pictures((100, 150), (100, 150))
    for usual, tuned in zip(*both(config, images, precision=torch.bfloat16), strict=True):
        np.testing.assert_allclose(tuned.scores[:10], usual.scores[:10], atol=0.02)
        assert not np.array_equal(tuned.scores[:10], usual.scores[:10])


def _scale_rpn(model: FasterRCNN) -> None:
    # What it says of boxes stays the same.
    layer = model.rpn.head.conv[0][0]
    layer.weight.data *= 2.0**17
    layer.bias.data *= 2.0**17
    model.rpn.head.cls_logits.weight.data /= 2.0**17
    model.rpn.head.bbox_pred.weight.data /= 2.0**17


def _scale_box_head(model: FasterRCNN) -> None:
    model.roi_heads.box_head.fc6.weight.data *= 2.0**17
    model.roi_heads.box_head.fc6.bias.data *= 2.0**17
    model.roi_heads.box_head.fc7.weight.data /= 2.0**17


@pytest.mark.parametrize("scale", [_scale_rpn, _scale_box_head])
def test_what_is_too_large_for_16_bits_is_looked_at_in_float32(
    scale: Any, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = build_detector(DetectorConfig(architecture="resnet18_fpn", norm="folded")).eval()
    scale(model)
    images = pictures((100, 150), (90, 140))
    expected = Predictor(deepcopy(model), CPU, 0.0)(images)
    tuned = Predictor(CudaDetector(model), CPU, 0.0)  # type: ignore[arg-type]
    for _ in range(2):
        for usual, found in zip(expected, tuned(images), strict=True):
            assert len(usual.scores) > 10
            np.testing.assert_allclose(found.scores, usual.scores, atol=1e-5)
            np.testing.assert_allclose(found.boxes, usual.boxes, atol=0.01)
    # It is said once.
    assert len(caplog.messages) == 1
    assert "float16 is too small" in caplog.text


def test_only_the_picture_that_is_too_much_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = build_detector(DetectorConfig(architecture="resnet18_fpn")).eval()
    detector = CudaDetector(model, torch.bfloat16)
    tuned = Predictor(detector, CPU, 0.0)  # type: ignore[arg-type]
    images = pictures((100, 150), (90, 140), (90, 150))
    before = tuned(images)
    find, asked = CudaDetector.find, []

    def spoiled(self: CudaDetector, given: list[Tensor], rounds: int, *how: Any) -> Tensor:
        asked.append([picture.shape[1:] for picture in given])
        row = find(self, given, rounds, *how)
        if len(given) == 3:
            # The number of the second.
            row[-3] = torch.nan
        return row

    monkeypatch.setattr(CudaDetector, "find", spoiled)
    after = tuned(images)
    assert asked == [[(100, 150), (90, 140), (90, 150)], [(90, 140)]]
    for at in (0, 2):
        np.testing.assert_array_equal(after[at].boxes, before[at].boxes)
    assert not np.array_equal(after[1].scores[:10], before[1].scores[:10])
    np.testing.assert_allclose(after[1].scores[:10], before[1].scores[:10], atol=0.02)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layer", "value"),
    [
        ("backbone.body.conv1", torch.nan),
        ("backbone.body.conv1", torch.inf),
        ("rpn.head.cls_logits", -torch.inf),
        ("rpn.head.bbox_pred", torch.inf),
        ("roi_heads.box_head.fc7", torch.nan),
        ("roi_heads.box_predictor.bbox_pred", -torch.inf),
    ],
)
def test_what_is_no_number_in_float32_either_is_an_error(
    layer: str, value: float, precision: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = build_detector(DetectorConfig(architecture="resnet18_fpn", norm="folded")).eval()
    model.get_submodule(layer).bias.data[0] = value
    tuned = Predictor(CudaDetector(model, precision), CPU, 0.0)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="150x100") as caught:
        tuned(pictures((100, 150)))
    assert caught.value.reason == "NOT_FINITE"


def test_both_views_are_asked_for_before_one_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = []
    find, to_host = CudaDetector.find, cuda.to_host

    def asked(self: CudaDetector, given: list[Tensor], rounds: int, *how: Any) -> Tensor:
        order.append("asked")
        return find(self, given, rounds, *how)

    def waited(tensor: Tensor) -> Tensor:
        order.append("waited")
        return to_host(tensor)

    monkeypatch.setattr(CudaDetector, "find", asked)
    monkeypatch.setattr(cuda, "to_host", waited)
    model = build_detector(DetectorConfig(architecture="resnet18_fpn")).eval()
    Predictor(CudaDetector(model, torch.float32), CPU, mirrored=True)(pictures((60, 90)))  # type: ignore[arg-type]
    assert order == ["asked", "asked", "waited", "waited"]


def test_nothing_is_found_where_all_is_below_the_floor() -> None:
    config = DetectorConfig(architecture="resnet18_fpn")
    for found in both(config, pictures((60, 60)), floor=0.999):
        assert [(one.boxes.shape, one.scores.shape) for one in found] == [((0, 4), (0,))]


def test_shapes_in_turn_keep_their_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposals, "_SHAPES", 2)
    torch.manual_seed(0)
    model = build_detector(DetectorConfig(architecture="resnet18_fpn")).eval()
    usual = Predictor(deepcopy(model), CPU, 0.0)
    tuned = Predictor(CudaDetector(model, torch.float32), CPU, 0.0)  # type: ignore[arg-type]
    # More shapes than are kept, some of them again.
    for image in pictures((60, 60), (60, 90), (60, 120), (60, 60), (60, 120), (120, 60)):
        [expected], [found] = usual([image]), tuned([image])
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.01)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_anchors_are_those_of_torchvision(architecture: str) -> None:
    model = build_detector(DetectorConfig(architecture=architecture)).eval()
    proposer = proposals.Proposer(model.rpn)
    for size in ((64, 96), (256, 352), (32, 704)):
        batch = torch.zeros(1, 3, *size)
        with torch.inference_mode():
            levels = list(model.backbone(batch).values())
            maps = model.rpn.head(levels)[0]
            found = proposer._anchors_of(batch, maps)
        [expected] = model.rpn.anchor_generator(ImageList(batch, [size]), levels)
        assert torch.equal(torch.cat(found), expected)
        # Each level has as many as there are places on its map.
        assert [len(level) for level in found] == [level[0].numel() for level in maps]


def test_only_the_anchors_not_asked_for_the_longest_make_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proposals, "_SHAPES", 2)
    model = build_detector(DetectorConfig(architecture="resnet18_fpn")).eval()
    proposer = proposals.Proposer(model.rpn)

    def anchors(side: int) -> Tensor:
        maps = [torch.zeros(1, 3, side // stride, side // stride) for stride in (8, 16, 32, 64)]
        return proposer._anchors_of(torch.zeros(1, 3, side, side), maps)[0]

    first, second = anchors(64), anchors(128)
    assert anchors(64) is first
    third = anchors(192)
    assert anchors(64) is first
    assert anchors(192) is third
    assert anchors(128) is not second


def test_a_strip_changes_nothing_in_the_pictures_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU.
    monkeypatch.setattr(GatherRoIAlign, "_gathered", MultiScaleRoIAlign.forward)
    torch.manual_seed(0)
    model = build_detector(DetectorConfig(architecture="resnet18_fpn")).eval()
    strip, usual = pictures((90, 728), (100, 150))
    for kind in (lambda model: model, lambda model: CudaDetector(model, torch.float32)):
        fresh, used = (Predictor(kind(deepcopy(model)), CPU, 0.0) for _ in range(2))
        [expected] = fresh([usual])
        used([strip])
        [found] = used([usual])
        np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_array_equal(found.boxes, expected.boxes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", [128, 100], ids=["halves exactly", "does not"])
def test_fused_networks_compute_the_same(architecture: str, side: int) -> None:
    torch.manual_seed(0)
    model = build_detector(DetectorConfig(architecture=architecture, norm="trainable"))
    pixels = torch.randn(2, 3, side, side + 64)
    with torch.no_grad():
        model(list(pixels), [_target(), _target()])  # Batch norms that do something.
    model.eval()
    fold_batch_norm(model)
    fused = deepcopy(model)
    for network in (fused.backbone, fused.rpn.head, fused.roi_heads.box_head):
        fuse(network)
    with torch.inference_mode():
        expected, found = model.backbone(pixels), fused.backbone(pixels)
        assert list(found) == list(expected)
        for name, level in expected.items():
            torch.testing.assert_close(found[name], level, rtol=1e-3, atol=1e-4)
        levels = list(expected.values())
        torch.testing.assert_close(fused.rpn.head(levels), model.rpn.head(levels))
    layers = list(fused.backbone.modules())
    combined = [layer.convolution for layer in layers if isinstance(layer, _ConvolutionReLU)]
    assert {layer.groups for layer in combined} <= {1}
    if architecture.startswith("resnet"):
        assert not any(isinstance(layer, torch.nn.ReLU) for layer in layers)


def _target() -> dict[str, Tensor]:
    return {"boxes": torch.tensor([[10.0, 10.0, 60.0, 60.0]]), "labels": torch.tensor([1])}


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_suppression_is_that_of_torchvision(threshold: float) -> None:
    random = torch.Generator().manual_seed(0)
    corners = torch.rand(4, 300, 2, generator=random) * 100
    sides = torch.rand(4, 300, 2, generator=random) * 40
    boxes = torch.cat([corners, corners + sides], 2)
    # A chain, in which each would suppress the next: only every second goes.
    boxes[0] = torch.stack([torch.tensor([float(i), 0, i + 10, 10]) for i in range(300)])
    real = torch.rand(4, 300, generator=random) > 0.2
    real[3] = False
    kept, settled = cuda._suppress(boxes, real, threshold, torch.float16, rounds=301)
    assert settled
    assert not cuda._suppress(boxes, real, threshold, torch.float16, rounds=16)[1]
    scores = torch.linspace(1, 0, 300)
    for row, (some, which) in enumerate(zip(boxes, real, strict=True)):
        numbers = torch.arange(300)[which]
        expected = numbers[nms(some[which], scores[which], threshold)]
        assert torch.where(kept[row])[0].tolist() == expected.sort().values.tolist()
