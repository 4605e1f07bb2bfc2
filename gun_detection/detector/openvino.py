"""A detector whose networks OpenVINO runs, on CPUs; torchvision's steps between them stay.

Resizing, anchors, RoI pooling and the choice of boxes are those of the reference.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import openvino
import torch
from openvino import opset13 as opset
from openvino import properties
from openvino.properties import hint
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import nms

from gun_detection.detector.finite import hear, hear_head
from gun_detection.detector.proposals import Proposer

# One for the whole life of the process. The first network that a core compiles for the CPU gives
# the thread a stack for signal handlers, and the end of the core takes it away. Two that end in the
# order of their beginnings would leave a stack that is no more, and the next signal with a handler
# would kill the process.
_CORE = openvino.Core()
# The first inference of a process fills tables in OpenVINO's bindings, in which one thread can wait
# for the interpreter while another holds that and waits for the table: both for good.
_FIRST = threading.Lock()
# So many times the regions that are wanted are compared at first.
_AT_HAND = 4


@dataclass(frozen=True)
class Networks:
    """Trunk and box head in OpenVINO's form."""

    trunk: Any
    head: Any


def from_files(files: Mapping[str, Path]) -> Networks:
    """The networks of the files that `conversion.to_files` named so, wherever they lie."""
    return Networks(
        *(
            _CORE.read_model(files[f"{name}.xml"], files[f"{name}.bin"])
            for name in ("trunk", "head")
        )
    )


class ResizeFirst(GeneralizedRCNNTransform):  # type: ignore[misc]
    """torchvision's preparation of pictures, but resized before they are normalised, and that while
    they are put together.

    Bilinear interpolation is affine: the values are the same but for rounding, and a large picture
    costs a third.
    """

    @classmethod
    def of(cls, other: GeneralizedRCNNTransform) -> Self:
        return cls(
            other.min_size,
            other.max_size,
            other.image_mean,
            other.image_std,
            size_divisible=other.size_divisible,
        )

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        tall, wide = (
            -(-max(image.shape[axis] for image in images) // size_divisible) * size_divisible
            for axis in (1, 2)
        )
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std)
        )
        batch = torch.zeros(len(images), 3, tall, wide)
        for slot, image in zip(batch, images, strict=True):
            place = slot[:, : image.shape[1], : image.shape[2]]
            torch.sub(image, mean, out=place).div_(std)
        return batch


class OpenVinoDetector(nn.Module):
    """Takes the place of the `FasterRCNN` that its networks were converted from.

    `streams` pictures are looked at side by side, on a core each, when as many threads call it.
    `precision` is what the networks compute in where they are not of 8 bits, `f32` or `bf16`; the
    predictor of scores and boxes is float32 as in the reference. It takes `model` over, without
    the weights of what OpenVINO runs.
    """

    def __init__(self, model: FasterRCNN, networks: Networks, precision: str, streams: int) -> None:
        super().__init__()
        self.transform = ResizeFirst.of(model.transform)
        self.rpn, self.roi_heads = model.rpn, model.roi_heads
        self.rpn.head = self.roi_heads.box_head = None
        self._proposer = Proposer(self.rpn)
        hear_head(self.roi_heads.box_predictor)
        self._trunk = _Network(_channels_last(networks.trunk), precision, streams)
        self._head = _Network(networks.head, precision, streams)

    def forward(self, pictures: list[Tensor]) -> list[dict[str, Tensor]]:
        """Boxes and scores of each picture, given as float32 (3, H, W) in [0, 1]."""
        images = self.prepare(pictures)
        regions, pooled = self.look(images)
        [found] = self._head(pooled).values()
        boxes, scores, _ = self.roi_heads.postprocess_detections(
            *self.roi_heads.box_predictor(found), regions, images.image_sizes
        )
        rows = [
            {"boxes": some, "scores": theirs} for some, theirs in zip(boxes, scores, strict=True)
        ]
        sizes = [tuple(picture.shape[-2:]) for picture in pictures]
        placed: list[dict[str, Tensor]] = self.transform.postprocess(
            rows, images.image_sizes, sizes
        )
        return placed

    def prepare(self, pictures: list[Tensor]) -> ImageList:
        """The pictures as the trunk reads them, resized and together."""
        return self.transform(pictures)[0]

    def look(self, images: ImageList) -> tuple[list[Tensor], Tensor]:
        """The regions of each picture, and the features of all of them as the box head reads."""
        outputs = self._trunk(images.tensors)
        features = {
            name: level.permute(0, 3, 1, 2) for name, level in _group(outputs, "feature").items()
        }
        regions = self._propose(images, outputs)
        pooled: Tensor = self.roi_heads.box_roi_pool(features, regions, images.image_sizes)
        return regions, pooled.permute(0, 2, 3, 1)

    def _propose(self, images: ImageList, outputs: dict[str, Tensor]) -> list[Tensor]:
        """The regions of each picture, as `RegionProposalNetwork.forward` chooses them."""
        limits = torch.tensor([[width, height] * 2 for height, width in images.image_sizes])
        objectness, deltas = (
            list(_group(outputs, kind).values()) for kind in ("objectness", "deltas")
        )
        hear(*objectness, *deltas)
        found = self._proposer.likely(images.tensors, objectness, deltas, limits)
        return [self._distinct(boxes, scores) for boxes, scores in zip(*found, strict=True)]

    def _distinct(self, boxes: Tensor, scores: Tensor) -> Tensor:
        """Of boxes (L, K, 4) with scores (L, K), the best that do not overlap within their level.

        Only better boxes suppress one: where those at hand are enough, worse ones do not matter.
        """
        # Boxes of different levels do not suppress each other: they are moved apart.
        levels = torch.arange(len(boxes))[:, None, None] * (boxes.max() + 1)
        apart = (boxes + levels).flatten(0, 1)
        likely, order = scores.flatten().sort(descending=True)
        real = int((likely >= 0).sum())
        most = self.rpn.post_nms_top_n()
        count = _AT_HAND * most
        while True:
            chosen = order[: min(count, real)]
            kept = nms(apart[chosen], likely[: len(chosen)], self.rpn.nms_thresh)
            if len(kept) >= most or count >= real:
                return boxes.flatten(0, 1)[chosen[kept[:most]]]
            count *= 2


def _channels_last(trunk: Any) -> Any:
    """A trunk whose feature maps come as it computes them and regions are pooled from them: the
    channels of a pixel together, (N, H, W, C).

    Turned round by OpenVINO, and back again afterwards, they cost a tenth of a small detector.
    """
    turned = trunk.clone()
    results = []
    for result in turned.get_results():
        port = result.input_value(0)
        name = port.get_any_name()
        if name.startswith("feature "):
            port.get_tensor().set_names(set())
            pixels = opset.transpose(port, np.array([0, 2, 3, 1]))
            pixels.output(0).get_tensor().set_names({name})
            result = opset.result(pixels)
        results.append(result)
    return openvino.Model(results, turned.get_parameters())


class _Network:
    """A compiled network with a request for each thread that calls it."""

    def __init__(self, network: Any, precision: str, streams: int) -> None:
        # Threads that are bound to cores would fight with those of another worker for the same.
        self._compiled = _CORE.compile_model(
            network,
            "CPU",
            {
                hint.inference_precision: getattr(openvino.Type, precision),
                hint.enable_cpu_pinning: False,
                properties.num_streams: streams,
                properties.inference_num_threads: streams,
            },
        )
        self._names = [port.get_any_name() for port in self._compiled.outputs]
        self._threads = threading.local()

    def __call__(self, values: Tensor) -> dict[str, Tensor]:
        """Its outputs by name; they hold until the same thread calls again."""
        if hasattr(self._threads, "request"):
            return self._infer(values)
        with _FIRST:
            self._threads.request = self._compiled.create_infer_request()
            return self._infer(values)

    def _infer(self, values: Tensor) -> dict[str, Tensor]:
        request = self._threads.request
        request.infer([values.numpy()], share_inputs=True)
        outputs = (torch.from_numpy(output.data) for output in request.output_tensors)
        return dict(zip(self._names, outputs, strict=True))


def _group(outputs: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The outputs of a kind, by what follows it in their names."""
    return {
        name.partition(" ")[2]: value
        for name, value in outputs.items()
        if name.startswith(f"{kind} ")
    }
