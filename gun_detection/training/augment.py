"""Training pictures as the recipe changes them, through torchvision's transforms v2."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from gun_detection.training.config import Augmentation
from gun_detection.training.order import Draw
from gun_detection.training.seeds import mix

Target = dict[str, Tensor]

# The mean of ImageNet, that the detectors subtract: padding with it is padding with nothing.
_FILL = [124.0, 116.0, 104.0]


class ImageDataset(Protocol):
    """Items are (uint8 (3, H, W), target with boxes float32 (N, 4) and labels int64 (N,))."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, Target]: ...


class AugmentedDataset(Dataset[tuple[Tensor, Target]]):
    """Samples by (epoch, index); the random changes of each follow from these and the seed.

    So a resumed training sees what the undisturbed one saw, with any number of workers.
    Boxes stay inside the picture and have an area; one that a crop leaves nothing of is gone.
    """

    def __init__(self, dataset: ImageDataset, augmentation: Augmentation, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._transform = build_transform(augmentation)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Target]:
        epoch, index = draw
        image, target = self._dataset[index]
        wrapped = target | {
            "boxes": tv_tensors.BoundingBoxes(
                target["boxes"], format="XYXY", canvas_size=image.shape[-2:]
            )
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self._seed, epoch, index))
            image, target = self._transform(tv_tensors.Image(image), wrapped)
        plain = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return image.as_subclass(Tensor).contiguous(), plain


def build_transform(augmentation: Augmentation) -> v2.Transform:
    """The changes of a recipe, in order; what has probability 0 costs nothing."""
    steps: list[v2.Transform] = []
    if augmentation.photometric:
        steps.append(v2.RandomPhotometricDistort(p=augmentation.photometric))
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
