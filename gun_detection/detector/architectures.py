"""Every architecture by name. Adding one is adding one entry to `ARCHITECTURES`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection, resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import (
    FasterRCNN,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d

from gun_detection.detector.roi_align import GatherRoIAlign

NUM_CLASSES = 2


class DetectorConfig(BaseModel):
    """What is needed to build the same network again; stored with every model version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = Field("resnet50_fpn", description="A name in `ARCHITECTURES`.")
    min_size: int | None = Field(
        None, gt=0, description="Shorter side that pictures are resized to, pixels."
    )
    max_size: int | None = Field(None, gt=0, description="Longest side after resizing, pixels.")
    norm: Literal["frozen", "folded", "trainable"] = Field(
        "frozen",
        description="The backbone's batch norm: `frozen` keeps its pretrained statistics, `folded` "
        "as well, but within the convolutions (half the cost), `trainable` learns new ones.",
    )
    max_detections: int = Field(100, gt=0, description="Most boxes per picture.")
    max_proposals: int | None = Field(
        None,
        gt=0,
        description="Most regions of a picture that the box head looks at, training apart; "
        "unset: the architecture's own number.",
    )
    mirrored: bool = Field(
        False,
        description="Detections are averaged with those in the mirrored picture: better, at twice "
        "the cost of looking.",
    )

    @field_validator("architecture")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ARCHITECTURES:
            raise ValueError(
                f"unknown architecture {name!r}: choose from {', '.join(ARCHITECTURES)}"
            )
        return name


class FullPrecisionPredictor(FastRCNNPredictor):  # type: ignore[misc]
    """Scores in float32 whatever the rest runs in: bfloat16 leaves those near one tied."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(features.device.type, enabled=False):
            scores, boxes = super().forward(features.float())
        return scores, boxes


@dataclass(frozen=True)
class Architecture:
    """How to build one network and where its public weights come from.

    `build(**sizes)` returns a `FasterRCNN` with random weights. `stages` are the children of the
    backbone's body, grouped from the stem on. `coco` and `imagenet` are torchvision's weight
    entries; `classifier_prefix` is what stands before the backbone's parameter names in a
    classification checkpoint and not in the detector's backbone. `channels_last` is whether CPUs
    train it faster in that order of memory, as they do where few convolutions are large. `precise`
    is how many of the first convolutions are to stay float32 where engines compute the rest in
    fewer bits, as their sums nearly cancel.
    """

    build: Callable[..., FasterRCNN]
    min_size: int
    max_size: int
    stages: tuple[tuple[str, ...], ...]
    coco: Any = None
    imagenet: Any = None
    classifier_prefix: str = ""
    norm_eps: float = 1e-5
    channels_last: bool = False
    precise: int = 0


def _torchvision(builder: Callable[..., FasterRCNN]) -> Callable[..., FasterRCNN]:
    def build(**kwargs: Any) -> FasterRCNN:
        return builder(weights=None, weights_backbone=None, num_classes=NUM_CLASSES, **kwargs)

    return build


class _CoarseAnchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors on all levels but the finest, which only the box head reads."""

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        anchors: list[Tensor] = super().forward(image_list, feature_maps[1:])
        return anchors


class _CoarseHead(RPNHead):  # type: ignore[misc]
    """Proposals on all levels but the finest."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        proposals: tuple[list[Tensor], list[Tensor]] = super().forward(x[1:])
        return proposals


def _mobilenet_v2_fpn(**kwargs: Any) -> FasterRCNN:
    """MobileNetV2 with an FPN of 128 channels on strides 4 to 32.

    Most of a small detector's work is at stride 4 and in its proposals, not in its backbone. So
    there are fewer proposals, none at stride 4, and the convolution there is a separable one: the
    box head sees small guns in detail at 1.15 times the cost of going without.
    """
    channels = 128
    features = models.mobilenet_v2(weights=None).features
    layers = {"3": "0", "6": "1", "13": "2", "18": "3"}
    backbone = BackboneWithFPN(features, layers, [24, 32, 96, 1280], channels)
    backbone.fpn.layer_blocks[0] = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        nn.Conv2d(channels, channels, 1),
    )
    anchors = _CoarseAnchors(
        sizes=((24, 36), (56, 84), (128, 180), (256, 360)),
        aspect_ratios=((0.5, 1.0, 2.0),) * 4,
    )
    defaults: dict[str, Any] = {
        "rpn_pre_nms_top_n_train": 1000,
        "rpn_post_nms_top_n_train": 500,
        "rpn_pre_nms_top_n_test": 600,
        "rpn_post_nms_top_n_test": 300,
        "box_batch_size_per_image": 128,
    }
    return FasterRCNN(
        backbone,
        NUM_CLASSES,
        rpn_anchor_generator=anchors,
        rpn_head=_CoarseHead(channels, anchors.num_anchors_per_location()[0]),
        **(defaults | kwargs),
    )


def _resnet18_fpn(**kwargs: Any) -> FasterRCNN:
    """A small network that learns from random weights within minutes on a CPU."""
    body = resnet.resnet18(weights=None)
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(body, layers, [128, 256, 512], 64)
    # Few proposals: the pictures are small and the network is to be quick.
    defaults: dict[str, Any] = {
        "rpn_pre_nms_top_n_train": 400,
        "rpn_post_nms_top_n_train": 150,
        "rpn_pre_nms_top_n_test": 300,
        "rpn_post_nms_top_n_test": 100,
        "rpn_batch_size_per_image": 128,
        "box_batch_size_per_image": 64,
    }
    anchors = AnchorGenerator(
        sizes=((32,), (48,), (64,), (96,)), aspect_ratios=((0.5, 0.75, 1.0),) * 4
    )
    return FasterRCNN(
        backbone,
        num_classes=None,
        rpn_anchor_generator=anchors,
        box_head=TwoMLPHead(64 * 7 * 7, 256),
        box_predictor=FastRCNNPredictor(256, NUM_CLASSES),
        **(defaults | kwargs),
    )


def _numbered(*ends: int) -> tuple[tuple[str, ...], ...]:
    """Stages of a body whose children are numbered, by the number after the last of each."""
    return tuple(
        tuple(str(number) for number in range(start, end))
        for start, end in zip((0, *ends), ends, strict=False)
    )


_RESNET = (("conv1", "bn1", "layer1"), ("layer2",), ("layer3",), ("layer4",))
_MOBILENET_V3 = _numbered(2, 4, 7, 13, 17)

ARCHITECTURES: dict[str, Architecture] = {
    "resnet50_fpn": Architecture(
        _torchvision(detection.fasterrcnn_resnet50_fpn),
        800,
        1333,
        _RESNET,
        coco=detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
        imagenet=models.ResNet50_Weights.IMAGENET1K_V1,
        # torchvision's COCO weights were trained with a batch norm without epsilon.
        norm_eps=0.0,
    ),
    "resnet50_fpn_v2": Architecture(
        _torchvision(detection.fasterrcnn_resnet50_fpn_v2),
        800,
        1333,
        _RESNET,
        coco=detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
        imagenet=models.ResNet50_Weights.IMAGENET1K_V2,
    ),
    "mobilenet_v3_large_fpn": Architecture(
        _torchvision(detection.fasterrcnn_mobilenet_v3_large_fpn),
        800,
        1333,
        _MOBILENET_V3,
        coco=detection.FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1,
        imagenet=models.MobileNet_V3_Large_Weights.IMAGENET1K_V1,
        classifier_prefix="features.",
    ),
    "mobilenet_v3_large_320_fpn": Architecture(
        _torchvision(detection.fasterrcnn_mobilenet_v3_large_320_fpn),
        320,
        640,
        _MOBILENET_V3,
        coco=detection.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1,
        imagenet=models.MobileNet_V3_Large_Weights.IMAGENET1K_V1,
        classifier_prefix="features.",
    ),
    "mobilenet_v2_fpn": Architecture(
        _mobilenet_v2_fpn,
        384,
        512,
        _numbered(2, 4, 7, 14, 19),
        imagenet=models.MobileNet_V2_Weights.IMAGENET1K_V1,
        classifier_prefix="features.",
        channels_last=True,
        precise=3,
    ),
    "resnet18_fpn": Architecture(
        _resnet18_fpn, 192, 320, _RESNET, imagenet=models.ResNet18_Weights.IMAGENET1K_V1
    ),
}


def build_detector(config: DetectorConfig) -> FasterRCNN:
    """A Faster R-CNN with random weights, in training mode, on the CPU."""
    architecture = ARCHITECTURES[config.architecture]
    shorter, longer = input_size(config)
    changes = {"rpn_post_nms_top_n_test": config.max_proposals} if config.max_proposals else {}
    model = architecture.build(
        min_size=shorter,
        max_size=longer,
        box_detections_per_img=config.max_detections,
        **changes,
    )
    pool = model.roi_heads.box_roi_pool
    model.roi_heads.box_roi_pool = GatherRoIAlign(
        pool.featmap_names, pool.output_size, pool.sampling_ratio
    )
    features = model.roi_heads.box_predictor.cls_score.in_features
    model.roi_heads.box_predictor = FullPrecisionPredictor(features, NUM_CLASSES)
    if config.norm != "trainable":
        _freeze_batch_norm(model.backbone.body, architecture.norm_eps)
    if config.norm == "folded":
        fold_batch_norm(model.backbone.body)
    return model


def limit_proposals(model: FasterRCNN, most: int) -> None:
    """Have the box head look at no more regions of a picture than these, training apart."""
    # torchvision takes it at the beginning only.
    model.rpn._post_nms_top_n = model.rpn._post_nms_top_n | {"testing": most}


def input_size(config: DetectorConfig) -> tuple[int, int]:
    """(shorter side, longest side) that pictures are resized to, pixels."""
    architecture = ARCHITECTURES[config.architecture]
    return config.min_size or architecture.min_size, config.max_size or architecture.max_size


def _freeze_batch_norm(module: nn.Module, eps: float) -> None:
    """Replace every `BatchNorm2d` below `module` by one with fixed statistics, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=eps or 0.0)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            _freeze_batch_norm(child, eps)


def fold_batch_norm(module: nn.Module) -> None:
    """Put every batch norm below `module` into the convolution before it, in place, for good."""
    before: nn.Module | None = None
    for name, child in module.named_children():
        if isinstance(child, FrozenBatchNorm2d | nn.BatchNorm2d):
            assert isinstance(before, nn.Conv2d)
            assert before.bias is None
            values = child.state_dict()
            scale = values["weight"] * (values["running_var"] + child.eps).rsqrt()
            before.weight.data.mul_(scale.reshape(-1, 1, 1, 1))
            before.bias = nn.Parameter(values["bias"] - values["running_mean"] * scale)
            setattr(module, name, nn.Identity())
        else:
            fold_batch_norm(child)
        before = child


def select_device(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


__all__ = [
    "ARCHITECTURES",
    "DetectorConfig",
    "build_detector",
    "fold_batch_norm",
    "input_size",
    "limit_proposals",
    "select_device",
]
