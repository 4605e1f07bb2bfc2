"""A detector's networks in OpenVINO's form, also in 8 bits.

The trunk (backbone, FPN and RPN head) and the box head are each converted once, for pictures of any
size.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.detector.openvino import Networks, OpenVinoDetector

# The least common multiple of the strides: torchvision pads pictures to it.
_STRIDE = 32
_MOST = 256
# Regions of each picture that the ranges of the box head are chosen on, about.
_REGIONS = 64
_CONVOLUTIONS = {"Convolution", "GroupConvolution"}


class _Trunk(nn.Module):
    """Pixels (N, 3, H, W), resized, to all feature maps, then objectness and box deltas."""

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.rpn.head

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.backbone(pixels)
        objectness, deltas = self.head(list(features.values()))
        return (
            {f"feature {name}": level for name, level in features.items()}
            | {f"objectness {number}": level for number, level in enumerate(objectness)}
            | {f"deltas {number}": level for number, level in enumerate(deltas)}
        )


class _Head(nn.Module):
    """Pooled regions (N, height, width, channels) to what the box predictor reads."""

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        self.head = model.roi_heads.box_head

    def forward(self, regions: Tensor) -> Tensor:
        found: Tensor = self.head(regions.permute(0, 3, 1, 2))
        return found


def convert(model: FasterRCNN) -> Networks:
    """The networks of a detector in evaluation mode on the CPU."""
    rows, columns, number = (Dim(name, min=1, max=_MOST) for name in ("rows", "columns", "number"))
    with torch.no_grad():
        # No side of an example is 1, or it would be taken for a constant.
        pixels = torch.zeros(2, 3, 4 * _STRIDE, 6 * _STRIDE)
        shapes = ({0: number, 2: _STRIDE * rows, 3: _STRIDE * columns},)
        trunk = _Trunk(model).eval()
        names = list(trunk(pixels))
        converted = _convert(trunk, pixels, shapes)
        for port, name in zip(converted.outputs, names, strict=True):
            port.get_tensor().set_names({name})
        pool, channels = model.roi_heads.box_roi_pool, model.backbone.out_channels
        regions = torch.zeros(2, *pool.output_size, channels)
        return Networks(converted, _convert(_Head(model).eval(), regions, ({0: Dim("regions")},)))


def _convert(network: nn.Module, example: Tensor, shapes: tuple[dict[int, Any]]) -> Any:
    exported = torch.export.export(network, (example,), dynamic_shapes=shapes, strict=False)
    return openvino.convert_model(exported)


def quantize(
    model: FasterRCNN,
    networks: Networks,
    pictures: Sequence[int],
    read: Callable[[int], Tensor],
    precise: int = 0,
) -> Networks:
    """The networks in 8 bits but for the first `precise` convolutions of the trunk, with ranges
    that suit `pictures`; `read` gives one as the detector takes it.

    Post-training quantisation as by Jacob et al., "Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference", 2018, by NNCF, which corrects the biases.
    """
    detector = OpenVinoDetector(deepcopy(model), networks, "f32", streams=1).eval()

    def pixels(index: int) -> NDArray[np.float32]:
        values: NDArray[np.float32] = detector.prepare([read(index)]).tensors.numpy()
        return values

    def regions(index: int) -> NDArray[np.float32]:
        pooled = detector.look(detector.prepare([read(index)]))[1]
        # From the likely to the unlikely ones.
        chosen: NDArray[np.float32] = pooled[:: max(1, len(pooled) // _REGIONS)].numpy()
        return chosen

    with torch.inference_mode():
        return Networks(
            _quantize(networks.trunk, pictures, pixels, precise),
            # A third of the pictures has regions enough.
            _quantize(networks.head, pictures[::3], regions, 0),
        )


def _quantize(
    network: Any, pictures: Sequence[int], read: Callable[[int], NDArray[np.float32]], precise: int
) -> Any:
    # Packaging alone needs it, and it takes seconds to import.
    import nncf

    nncf.set_log_level(logging.WARNING)
    kept = [
        node.get_friendly_name()
        for node in network.get_ordered_ops()
        if node.get_type_name() in _CONVOLUTIONS
    ][:precise]
    # It draws progress bars on standard output, which is for results.
    with contextlib.redirect_stdout(io.StringIO()):
        return nncf.quantize(
            network.clone(),
            nncf.Dataset(pictures, read),
            subset_size=len(pictures),
            ignored_scope=nncf.IgnoredScope(names=kept),
        )


def to_files(networks: Networks, precise: int = 0) -> dict[str, bytes]:
    """The networks as files: `trunk.xml` and `head.xml` with `trunk.bin` and `head.bin`.

    The first `precise` convolutions of the trunk stay float32 whatever the rest is computed in.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, network in vars(networks).items():
            openvino.save_model(network, f"{folder}/{name}.xml", compress_to_fp16=False)
        _mark(Path(folder, "trunk.xml"), precise)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _mark(file: Path, precise: int) -> None:
    """Write into a stored network what of it stays float32: OpenVINO has no function for it."""
    tree = ElementTree.parse(file)
    layers = [layer for layer in tree.iter("layer") if layer.get("type") in _CONVOLUTIONS]
    for layer in layers[:precise]:
        marks = layer.find("rt_info")
        if marks is None:
            marks = ElementTree.SubElement(layer, "rt_info")
        ElementTree.SubElement(marks, "attribute", name="precise", version="0")
    tree.write(file)
