"""A detector that takes milliseconds a step, under the name `tiny`."""

from typing import Any

import pytest
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import (
    FasterRCNN,
    FastRCNNPredictor,
    TwoMLPHead,
)

from gun_detection.detector.architectures import ARCHITECTURES, NUM_CLASSES, Architecture


def _tiny(**kwargs: Any) -> FasterRCNN:
    def block(before: int, after: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
        )

    body = nn.Sequential(block(3, 8, 4), block(8, 16, 2), block(16, 16, 2))
    backbone = BackboneWithFPN(body, {"1": "0", "2": "1"}, [16, 16], 8)
    anchors = AnchorGenerator(sizes=((16,), (32,), (48,)), aspect_ratios=((0.7, 1.0),) * 3)
    return FasterRCNN(
        backbone,
        num_classes=None,
        rpn_anchor_generator=anchors,
        box_head=TwoMLPHead(8 * 7 * 7, 16),
        box_predictor=FastRCNNPredictor(16, NUM_CLASSES),
        **kwargs,
    )


@pytest.fixture(autouse=True)
def tiny_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = (("0",), ("1",), ("2",))
    monkeypatch.setitem(ARCHITECTURES, "tiny", Architecture(_tiny, 64, 96, stages))
