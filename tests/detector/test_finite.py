"""A picture for which a model computes what is no number was not looked at."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.detector.conversion import convert
from gun_detection.detector.engines import detect_each
from gun_detection.detector.finite import hear, listening
from gun_detection.detector.inference import Predictor
from gun_detection.detector.openvino import Networks, OpenVinoDetector
from gun_detection.detector.running import DetectorEngine
from gun_detection.errors import ImageError
from tests.detector.conftest import CPU, picture

# White, for which `spoil` has a detector compute what is no number.
WHITE = np.full((90, 120, 3), 255, np.uint8)


def spoil(model: FasterRCNN) -> FasterRCNN:
    spoiled = deepcopy(model)

    def features(_: object, given: tuple[Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
        white = given[0].flatten(1).mean(1) > 1
        return {name: level + torch.nan * white[:, None, None, None] if white.any() else level
                for name, level in found.items()}  # fmt: skip

    spoiled.backbone.register_forward_hook(features)
    return spoiled


@pytest.mark.parametrize("mirrored", [False, True], ids=["plain", "mirrored"])
@pytest.mark.parametrize(
    ("layer", "value"),
    [
        ("backbone.body.conv1", torch.nan),
        ("backbone.body.conv1", torch.inf),
        ("rpn.head.cls_logits", -torch.inf),
        ("rpn.head.bbox_pred", torch.nan),
        ("roi_heads.box_head.fc7", torch.nan),
        ("roi_heads.box_predictor.cls_score", torch.nan),
        ("roi_heads.box_predictor.bbox_pred", -torch.inf),
    ],
)
def test_the_reference_says_that_it_computes_no_number(
    layer: str, value: float, mirrored: bool, model: FasterRCNN
) -> None:
    damaged = deepcopy(model)
    damaged.get_submodule(layer).weight.data.view(-1)[0] = value
    with pytest.raises(ImageError, match="200x150") as caught:
        Predictor(damaged, CPU, mirrored=mirrored)([picture(150, 200)])
    assert caught.value.reason == "NOT_FINITE"


@pytest.mark.parametrize(
    "layer",
    [
        "backbone.fpn.layer_blocks.0.0",
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    ],
)
def test_openvino_says_that_it_computes_no_number(layer: str, model: FasterRCNN) -> None:
    damaged = deepcopy(model)
    damaged.get_submodule(layer).weight.data.view(-1)[0] = torch.inf
    detector: Any = OpenVinoDetector(deepcopy(damaged), convert(damaged), "f32", streams=1)
    with pytest.raises(ImageError, match="200x150") as caught:
        Predictor(detector, CPU)([picture(150, 200)])
    assert caught.value.reason == "NOT_FINITE"


@pytest.mark.parametrize("batch", [1, 4])
def test_of_several_pictures_only_those_without_numbers_are_refused(
    batch: int, model: FasterRCNN
) -> None:
    predictor = Predictor(spoil(model), CPU)
    engine = DetectorEngine("eager", predictor, (1, 1), device="cpu", streams=1, batch=batch)
    images = [picture(90, 120), WHITE, picture(90, 130), picture(90, 120)]
    found = [one for one, _ in detect_each(engine, images)]
    assert isinstance(found[1], ImageError)
    assert "for pictures of 120x90 pixels" in found[1].message
    plain = Predictor(deepcopy(model), CPU)
    for at in (0, 2, 3):
        [expected] = plain([images[at]])
        one = found[at]
        assert one is not None
        assert not isinstance(one, ImageError)
        np.testing.assert_array_equal(one.boxes, expected.boxes)
        np.testing.assert_array_equal(one.scores, expected.scores)


def test_threads_do_not_hear_each_other(model: FasterRCNN) -> None:
    predictor = Predictor(spoil(model), CPU)

    def refused(image: Sequence[Any]) -> bool:
        try:
            predictor([np.asarray(image)])
        except ImageError:
            return True
        return False

    images = [WHITE, picture(90, 120)] * 12
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(refused, images)) == [True, False] * 12


def test_heads_are_heard_once_by_who_listens(model: FasterRCNN, networks: Networks) -> None:
    own = deepcopy(model)
    for _ in range(3):
        Predictor(own, CPU)
    copies: list[Callable[[], Any]] = [
        lambda: own.eval(),
        lambda: OpenVinoDetector(deepcopy(own), networks, "f32", streams=1).eval(),
    ]
    for make in copies:
        detector = make()
        with torch.inference_mode(), listening() as sums:
            detector([torch.zeros(3, 90, 120)])
        # Scores and boxes of four levels, then those of the box head.
        assert len(sums) == 2 * 4 + 2
    hear(torch.zeros(3))
    assert len(sums) == 2 * 4 + 2


def test_no_region_is_no_number_that_lacks() -> None:
    with listening() as sums:
        hear(torch.zeros(0, 2), torch.full((300, 4), 1e30))
    assert torch.stack(sums).isfinite().all()
