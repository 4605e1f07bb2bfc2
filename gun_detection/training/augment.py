"""Training pictures as the recipe changes them, through torchvision's transforms v2."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_area
from torchvision.transforms import v2

from gun_detection.datasets.torch_dataset import ImageDataset, Target
from gun_detection.training.config import Augmentation
from gun_detection.training.order import Draw
from gun_detection.training.paste import find_cutouts, paste
from gun_detection.training.seeds import mix

logger = logging.getLogger(__name__)

# The mean of ImageNet, that the detectors subtract: padding with it is padding with nothing.
_FILL = [124.0, 116.0, 104.0]
# Share of a box that has to be left in a tile of a mosaic.
_LEAST_LEFT = 1 / 3


class AugmentedDataset(Dataset[tuple[Tensor, Target]]):
    """Samples by draw; the random changes of each follow from the draw and the seed.

    So a resumed training sees what the undisturbed one saw, with any number of workers.
    Boxes stay inside the picture and have an area; one that a crop leaves nothing of is gone.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        augmentation: Augmentation,
        seed: int,
        size: tuple[int, int],
        plain_from: float = math.inf,
    ) -> None:
        """`size` is the detector's (shorter, longest side), that a mosaic is put together in.

        From the epoch `plain_from` on there is neither paste nor mosaic nor zoom-out nor crop.
        """
        self._dataset = dataset
        self._seed = seed
        self._size = size
        self._mosaic = augmentation.mosaic
        self._paste = augmentation.paste
        self._cutouts = find_cutouts(dataset, seed) if augmentation.paste else []
        if augmentation.paste:
            logger.info("%d guns can be cut out and pasted", len(self._cutouts))
        self._plain_from = plain_from
        self._strong = build_transform(augmentation)
        self._plain = build_transform(
            augmentation.model_copy(update={"zoom_out": 0.0, "crop": 0.0})
        )

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Target]:
        epoch, index, repeat = draw
        image, target = self._dataset[index]
        seed = mix(self._seed, epoch, index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(seed, repeat) if repeat else seed)
            transform = self._strong
            strong = epoch < self._plain_from
            if strong and self._cutouts and float(torch.rand(())) < self._paste:
                image, target = paste(image, target, self._cutouts)
            if not strong:
                transform = self._plain
            elif float(torch.rand(())) < self._mosaic:
                others = torch.randint(len(self._dataset), (3,)).tolist()
                tiles = [(image, target), *(self._dataset[other] for other in others)]
                image, target = mosaic(tiles, self._size)
                transform = self._plain
            image, target = transform(tv_tensors.Image(image), _wrapped(image, target))
        plain = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return image.as_subclass(Tensor).contiguous(), plain


def _wrapped(image: Tensor, target: Target) -> Target:
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:])
    return target | {"boxes": boxes}


def mosaic(
    samples: Sequence[tuple[Tensor, Target]], size: tuple[int, int]
) -> tuple[Tensor, Target]:
    """Four pictures as the tiles of one, in the shape that the first has at the input size.

    Each is scaled until it covers its tile and cut at a random place that leaves its boxes whole
    where there is room for them; a box of which less than a third is left is dropped. Everything
    else of the target is the first's. Bochkovskiy et al., "YOLOv4", 2020, section 3.4.
    """
    height, width = samples[0][0].shape[-2:]
    scale = min(size[0] / min(height, width), size[1] / max(height, width))
    height, width = max(2, round(height * scale)), max(2, round(width * scale))
    share = 0.3 + 0.4 * torch.rand(2)
    middle, centre = max(1, int(height * share[0])), max(1, int(width * share[1]))
    canvas = torch.empty(3, height, width, dtype=torch.uint8)
    boxes, labels = [], []
    corners = ((0, 0), (0, centre), (middle, 0), (middle, centre))
    for (top, left), (image, target) in zip(corners, samples, strict=True):
        bottom, right = middle if top == 0 else height, centre if left == 0 else width
        tile, inside, kept = _tile(image, target["boxes"], bottom - top, right - left)
        canvas[:, top:bottom, left:right] = tile
        boxes.append(inside + torch.tensor([left, top, left, top]))
        labels.append(target["labels"][kept])
    return canvas, samples[0][1] | {"boxes": torch.cat(boxes), "labels": torch.cat(labels)}


def _tile(image: Tensor, boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pixels (3, height, width), boxes in them, which of the boxes these are)."""
    scale = max(height / image.shape[-2], width / image.shape[-1])
    scaled = [
        max(height, round(image.shape[-2] * scale)),
        max(width, round(image.shape[-1] * scale)),
    ]
    factor = torch.tensor([scaled[1] / image.shape[-1], scaled[0] / image.shape[-2]]).repeat(2)
    boxes = boxes * factor
    left = _start(boxes[:, 0::2], scaled[1], width)
    top = _start(boxes[:, 1::2], scaled[0], height)
    moved = boxes - torch.tensor([left, top, left, top])
    cut = moved.clone()
    cut[:, 0::2].clamp_(0, width)
    cut[:, 1::2].clamp_(0, height)
    kept = box_area(cut) > _LEAST_LEFT * box_area(moved)
    pixels = v2.functional.resize(image, scaled, antialias=True)
    return pixels[:, top : top + height, left : left + width], cut[kept], kept


def _start(spans: Tensor, length: int, window: int) -> int:
    """Where a window begins along a side, with all of the boxes' `spans` (N, 2) if they fit."""
    first, last = 0, length - window
    if len(spans):
        # Scaled boxes may pass the edge by a rounding.
        low, high = max(0, int(spans.min())), min(length, math.ceil(float(spans.max())))
        if high - low <= window:
            first, last = max(first, high - window), min(last, low)
    return first + int((last - first + 1) * torch.rand(()))


def build_transform(augmentation: Augmentation) -> v2.Transform:
    """The changes of a recipe, in order; what has probability 0 costs nothing."""
    steps: list[v2.Transform] = []
    if augmentation.photometric:
        jitter = v2.ColorJitter(brightness=(0.5, 1.4), contrast=0.4, saturation=0.4, hue=0.04)
        steps.append(v2.RandomApply([jitter], p=augmentation.photometric))
        steps.append(v2.RandomGrayscale(p=0.1 * augmentation.photometric))
    if augmentation.zoom_out:
        steps.append(v2.RandomZoomOut(_FILL, side_range=(1.0, 2.5), p=augmentation.zoom_out))
    if augmentation.crop:
        steps.append(v2.RandomApply([_Crop()], p=augmentation.crop))
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip(augmentation.flip))
    steps.append(v2.ClampBoundingBoxes())
    steps.append(v2.SanitizeBoundingBoxes(min_size=1.0))
    return v2.Compose(steps)


class _Crop(v2.RandomIoUCrop):  # type: ignore[misc]
    """A crop of at least half of each side that keeps a box; a gun-free picture is cropped as well.

    Liu et al., "SSD: Single Shot MultiBox Detector", 2016, section 2.2. Were only pictures with
    guns cropped, the enlarged look of a crop would come to mean a gun.
    """

    def __init__(self) -> None:
        super().__init__(min_scale=0.5)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        [boxes] = [item for item in flat_inputs if isinstance(item, tv_tensors.BoundingBoxes)]
        if len(boxes):
            params: dict[str, Any] = super().make_params(flat_inputs)
            return params
        height, width = boxes.canvas_size
        scale, place = self.min_scale + (1 - self.min_scale) * torch.rand(2), torch.rand(2)
        new_height, new_width = int(height * scale[0]), int(width * scale[1])
        return {
            "top": int((height - new_height) * place[0]),
            "left": int((width - new_width) * place[1]),
            "height": new_height,
            "width": new_width,
            "is_within_crop_area": torch.zeros(0, dtype=torch.bool),
        }
