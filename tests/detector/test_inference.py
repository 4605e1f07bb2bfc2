from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.ops import box_iou

from gun_detection.detector.cuda import CudaDetector
from gun_detection.detector.inference import EVALUATION_FLOOR, Predictor, _fuse
from gun_detection.detector.openvino import Networks, OpenVinoDetector
from tests.detector.conftest import CPU, picture


class Views(nn.Module):
    """Finds what it is told to, in the picture (dark at its left edge) and in its mirror image."""

    def __init__(self, plain: list[list[float]], mirrored: list[list[float]]) -> None:
        super().__init__()
        self.views = plain, mirrored
        self.roi_heads: Any = SimpleNamespace(nms_thresh=0.5, detections_per_img=3)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = [self.views[int(image[0, 0, 0] > 0)] for image in images]
        tensors = [torch.tensor(rows, dtype=torch.float32).reshape(-1, 5) for rows in found]
        return [{"boxes": rows[:, :4], "scores": rows[:, 4]} for rows in tensors]


def look(plain: list[list[float]], mirrored: list[list[float]], floor: float = 0.05) -> Any:
    pixels = np.zeros((50, 100, 3), np.uint8)
    pixels[:, 50:] = 255
    model: Any = Views(plain, mirrored)
    return Predictor(model, CPU, floor, mirrored=True)([pixels])[0]


def test_what_both_views_show_is_averaged() -> None:
    # In the mirrored picture, 100 wide, the box from 10 to 30 lies from 70 to 90.
    found = look([[10, 5, 30, 25, 0.9]], [[66, 5, 90, 25, 0.3]])
    assert found.scores == pytest.approx([0.6])
    np.testing.assert_allclose(found.boxes, [[10, 5, 31, 25]], atol=1e-5)


def test_what_one_view_shows_has_half_its_score() -> None:
    found = look([[10, 5, 30, 25, 0.9]], [[10, 5, 30, 25, 0.8], [0, 0, 9, 9, 0.08]])
    assert found.scores == pytest.approx([0.45, 0.4])
    np.testing.assert_allclose(found.boxes, [[10, 5, 30, 25], [70, 5, 90, 25]])


def test_a_detection_is_paired_once_and_only_so_many_are_kept() -> None:
    rows = [[10.0 * i, 0.0, 10.0 * i + 8, 8.0, 0.9 - 0.1 * i] for i in range(4)]
    twice = [[92.0, 0.0, 100.0, 8.0, 0.7], [91.0, 0.0, 100.0, 8.0, 0.5]]
    found = look(rows, twice)
    assert found.scores == pytest.approx([0.8, 0.4, 0.35])
    assert look([[0, 0, 9, 9, 0.5]], [[0, 0, 9, 9, 0.5]], floor=0.3).scores.size == 0


def _fused_box_by_box(
    boxes: Tensor, scores: Tensor, other_boxes: Tensor, other_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """As written down, with PyTorch."""
    left = torch.ones(len(other_boxes), dtype=torch.bool)
    boxes, halves = boxes.clone(), scores / 2
    overlaps = box_iou(boxes, other_boxes)
    for index in range(len(boxes)):
        free = torch.where(left, overlaps[index], -1.0)
        if not len(free) or float(free.max()) < 0.5:
            continue
        twin = int(free.argmax())
        left[twin] = False
        share = scores[index] / (scores[index] + other_scores[twin])
        boxes[index] = boxes[index] * share + other_boxes[twin] * (1 - share)
        halves[index] += other_scores[twin] / 2
    return torch.cat([boxes, other_boxes[left]]), torch.cat([halves, other_scores[left] / 2])


@pytest.mark.parametrize("seed", range(20))
def test_views_are_fused_to_the_last_bit(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    mine, others = (100, 80) if seed else (3, 0)

    def views(number: int) -> tuple[Tensor, Tensor]:
        corners = torch.rand(number, 2, generator=random) * 60
        sides = torch.rand(number, 2, generator=random) * 40 + 1
        scores = torch.rand(number, generator=random).sort(descending=True).values
        return torch.cat([corners, corners + sides], 1), scores

    boxes, scores = views(mine)
    other_boxes, other_scores = views(others)
    if others:
        # Some are alike, some are twice there, and one has no area.
        other_boxes[:50] = boxes[:50] + torch.rand(50, 4, generator=random)
        other_boxes[10:20] = other_boxes[:10]
        other_boxes[20] = boxes[20] = torch.tensor([5.0, 5.0, 5.0, 9.0])
    given = boxes, scores, other_boxes, other_scores
    before = [tensor.clone() for tensor in given]
    for found, expected in zip(_fuse(*given), _fused_box_by_box(*given), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


def test_a_view_may_show_nothing() -> None:
    assert look([], [[10, 5, 30, 25, 0.8]]).scores == pytest.approx([0.4])
    assert look([[10, 5, 30, 25, 0.8]], []).scores == pytest.approx([0.4])
    assert look([], []).boxes.shape == (0, 4)


@pytest.mark.parametrize("mirrored", [False, True], ids=["plain", "mirrored"])
@pytest.mark.parametrize(
    "tune",
    [
        lambda model, _: model,
        lambda model, networks: OpenVinoDetector(model, networks, "f32", streams=1),
        lambda model, _: CudaDetector(model, torch.float32),
    ],
    ids=["reference", "OpenVINO", "CUDA"],
)
def test_the_floor_cuts_scores_and_changes_none(
    tune: Callable[[FasterRCNN, Networks], Any],
    mirrored: bool,
    model: FasterRCNN,
    networks: Networks,
) -> None:
    model = deepcopy(model)
    # Random weights give all of them scores near one half.
    model.roi_heads.box_predictor.cls_score.weight.data *= 40
    images = [picture(240, 400), picture(300, 200)]

    def look_from(floor: float) -> list[Any]:
        detector = tune(deepcopy(model), networks)
        return [Predictor(detector, CPU, floor, mirrored=mirrored)([image])[0] for image in images]

    every = look_from(EVALUATION_FLOOR)
    for floor in (0.3, 0.5):
        for found, all_found in zip(look_from(floor), every, strict=True):
            expected = all_found.above(floor)
            assert 0 < len(expected.scores) < len(all_found.scores)
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
            np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
