import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gun_detection.datasets.torch_dataset import Target
from gun_detection.training.augment import AugmentedDataset
from gun_detection.training.config import Augmentation
from gun_detection.training.paste import cut_out, find_cutouts, paste

BOX = np.array([20, 30, 120, 90], np.float32)
PASTE = Augmentation(flip=0, photometric=0, paste=1)


def catalogue(ground: int = 250) -> NDArray[np.uint8]:
    """A dark pistol of three bars with a hole in its trigger guard, on a plain ground."""
    pixels = np.full((120, 160, 3), ground, np.uint8)
    pixels[30:50, 20:120] = 40
    pixels[50:90, 20:45] = 60
    pixels[50:70, 45:75] = 50
    pixels[55:65, 52:68] = ground
    return pixels


def target(*boxes: NDArray[np.float32]) -> Target:
    rows = torch.tensor(np.array(boxes, np.float32)).reshape(-1, 4)
    return {
        "boxes": rows,
        "labels": torch.ones(len(boxes), dtype=torch.int64),
        "image_id": torch.tensor([7]),
    }


class Pictures:
    """One catalogue shot, and grey pictures without a gun."""

    def __init__(self, ground: int = 250) -> None:
        self.ground = ground

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if index == 2:
            return torch.from_numpy(catalogue(self.ground)).permute(2, 0, 1), target(BOX)
        return torch.full((3, 100, 130), 128, dtype=torch.uint8), target()


def test_a_gun_on_plain_ground_is_cut_out_without_the_ground() -> None:
    cutout = cut_out(catalogue(), BOX)
    assert cutout is not None
    inside = cutout.pixels[cutout.mask > 0.9]
    assert inside.max() < 100
    # 20 × 100, 25 × 40 and 30 × 20 pixels, less the hole and what smooth edges cost.
    area = 100 * 20 + 25 * 40 + 30 * 20 - 16 * 10
    assert 0.8 * area < cutout.mask.sum() < area


@pytest.mark.parametrize(
    ("pixels", "box"),
    [
        (catalogue(128), BOX),
        (np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8), BOX),
        (np.full((120, 160, 3), 255, np.uint8), BOX),
        (catalogue(), np.array([20, 30, 30, 36], np.float32)),
        (catalogue(), np.array([25, 35, 110, 45], np.float32)),
    ],
    ids=["dark ground", "noise", "nothing but ground", "tiny box", "within the gun"],
)
def test_what_cannot_be_cut_out_is_left(
    pixels: NDArray[np.uint8], box: NDArray[np.float32]
) -> None:
    assert cut_out(pixels, box) is None


def test_a_pasted_gun_has_its_box_beside_those_there() -> None:
    cutouts = find_cutouts(Pictures(), 0)
    assert len(cutouts) == 1
    there = np.array([0, 0, 60, 60], np.float32)
    image = torch.full((3, 200, 260), 128, dtype=torch.uint8)
    pasted = 0
    for seed in range(30):
        torch.manual_seed(seed)
        result, labels = paste(image, target(there), cutouts)
        changed = (result != image).any(0).nonzero()
        assert len(labels["boxes"]) == len(labels["labels"]) == 1 + (len(changed) > 0)
        if len(changed) == 0:
            continue
        pasted += 1
        assert torch.equal(labels["boxes"][0], torch.from_numpy(there))
        left, top, right, bottom = labels["boxes"][1].tolist()
        assert left >= 60 or top >= 60
        low, high = changed.amin(0), changed.amax(0) + 1
        assert max(abs(left - low[1]), abs(top - low[0])) <= 3
        assert max(abs(right - high[1]), abs(bottom - high[0])) <= 3
    assert pasted > 20
    assert (image == 128).all()


def test_without_room_nothing_is_pasted() -> None:
    image = torch.zeros((3, 100, 130), dtype=torch.uint8)
    whole = target(np.array([0, 0, 130, 100], np.float32))
    for seed in range(10):
        torch.manual_seed(seed)
        result, labels = paste(image, whole, find_cutouts(Pictures(), 0))
        assert torch.equal(result, image)
        assert len(labels["boxes"]) == 1
    narrow = torch.zeros((3, 100, 3), dtype=torch.uint8)
    assert torch.equal(paste(narrow, target(), find_cutouts(Pictures(), 0))[0], narrow)


def test_training_pictures_get_pasted_guns_until_the_plain_end() -> None:
    data = AugmentedDataset(Pictures(), PASTE, 0, (100, 130), plain_from=5)
    counts = [len(data[epoch, 0, 0][1]["boxes"]) for epoch in range(10)]
    assert sum(counts[:5]) >= 4
    assert counts[5:] == [0] * 5
    again = AugmentedDataset(Pictures(), PASTE, 0, (100, 130), plain_from=5)
    assert torch.equal(again[1, 0, 0][0], data[1, 0, 0][0])


def test_without_plain_ground_nothing_changes() -> None:
    data = AugmentedDataset(Pictures(90), PASTE, 0, (100, 130))
    assert [len(data[0, index, 0][1]["boxes"]) for index in range(4)] == [0, 0, 1, 0]
