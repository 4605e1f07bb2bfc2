import pytest
import torch
from torch import Tensor

from gun_detection.datasets.torch_dataset import Target
from gun_detection.training.augment import AugmentedDataset, mosaic
from gun_detection.training.config import Augmentation

EVERYTHING = Augmentation(flip=0.5, photometric=0.5, zoom_out=0.5, crop=0.7)
ALWAYS_MOSAIC = Augmentation(flip=0.5, photometric=0, mosaic=1)
SIZE = (96, 128)


class Squares:
    """Grey pictures with a black rectangle in a white frame, or with nothing."""

    def __init__(self, boxes: list[list[int]]) -> None:
        self.boxes = boxes

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image = torch.full((3, 120, 160), 200, dtype=torch.uint8)
        for x1, y1, x2, y2 in self.boxes:
            image[:, y1:y2, x1:x2] = 0
        boxes = torch.tensor(self.boxes, dtype=torch.float32).reshape(-1, 4)
        labels = torch.ones(len(boxes), dtype=torch.int64)
        return image, {"boxes": boxes, "labels": labels, "image_id": torch.tensor([index])}


@pytest.mark.parametrize("boxes", [[], [[20, 30, 60, 80]], [[20, 30, 60, 80], [100, 10, 150, 50]]])
def test_boxes_stay_inside_and_go_with_their_pixels(boxes: list[list[int]]) -> None:
    data = AugmentedDataset(Squares(boxes), EVERYTHING, 0, SIZE)
    for epoch in range(40):
        image, target = data[epoch, 0, 0]
        assert type(image) is Tensor
        assert type(target["boxes"]) is Tensor
        assert image.dtype == torch.uint8
        height, width = image.shape[1:]
        kept = target["boxes"]
        assert kept.shape == (len(target["labels"]), 4)
        assert (kept[:, 2:] > kept[:, :2]).all()
        assert (kept >= 0).all()
        assert (kept[:, [0, 2]] <= width).all()
        assert (kept[:, [1, 3]] <= height).all()
        for x1, y1, x2, y2 in kept.round().int().tolist():
            inside = image[:, y1:y2, x1:x2].float()
            assert inside.mean() < 100, "the dark rectangle is where the box says"
        assert len(kept) >= min(1, len(boxes)), "a crop keeps a gun"


def test_gun_free_pictures_are_cropped_as_well() -> None:
    data = AugmentedDataset(Squares([]), Augmentation(crop=1.0), 0, SIZE)
    sizes = {tuple(data[epoch, 0, 0][0].shape) for epoch in range(10)}
    assert len(sizes) > 5
    assert all(height >= 60 and width >= 80 for _, height, width in sizes)


def test_changes_follow_from_seed_and_draw_alone() -> None:
    first = AugmentedDataset(Squares([[20, 30, 60, 80]]), EVERYTHING, 0, SIZE)
    before = torch.get_rng_state()
    image, target = first[3, 0, 0]
    assert torch.equal(torch.get_rng_state(), before), "the training's own random state is left"
    torch.manual_seed(99)
    again, same = first[3, 0, 0]
    assert torch.equal(image, again)
    assert torch.equal(target["boxes"], same["boxes"])
    assert not torch.equal(image, first[4, 0, 0][0])
    repeats = [first[3, 0, repeat][0] for repeat in range(5)]
    assert len({repeat.numpy().tobytes() for repeat in repeats}) == 5
    assert torch.equal(repeats[4], first[3, 0, 4][0])
    other = AugmentedDataset(Squares([[20, 30, 60, 80]]), EVERYTHING, 1, SIZE)
    assert not torch.equal(image, other[3, 0, 0][0])


class Gallery(Squares):
    """Pictures of many shapes, each with the same rectangles in its own shade."""

    shapes = ((120, 160), (160, 120), (40, 300), (30, 30), (500, 400))

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        height, width = self.shapes[index]
        image = torch.full((3, height, width), 250, dtype=torch.uint8)
        boxes = torch.tensor(self.boxes, dtype=torch.float32).reshape(-1, 4)
        boxes *= torch.tensor([width, height, width, height])
        for x1, y1, x2, y2 in boxes.round().int().tolist():
            image[:, y1:y2, x1:x2] = 0
        labels = torch.ones(len(boxes), dtype=torch.int64)
        return image, {"boxes": boxes, "labels": labels, "image_id": torch.tensor([index])}


@pytest.mark.parametrize("index", range(len(Gallery.shapes)))
def test_a_mosaic_has_four_pictures_and_their_boxes(index: int) -> None:
    data = AugmentedDataset(Gallery([[0.3, 0.2, 0.7, 0.8]]), ALWAYS_MOSAIC, 0, SIZE)
    counts = set()
    for epoch in range(30):
        image, target = data[epoch, index, 0]
        height, width = image.shape[1:]
        assert max(height, width) <= 128
        assert (height > width) == (Gallery.shapes[index][0] > Gallery.shapes[index][1])
        boxes = target["boxes"]
        assert len(boxes) == len(target["labels"])
        assert int(target["image_id"]) == index
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        for x1, y1, x2, y2 in boxes.int().tolist():
            assert image[:, y1 : y2 + 1, x1 : x2 + 1].float().mean() < 125
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
        counts.add(len(boxes))
    assert max(counts) == 4


def test_a_box_that_a_mosaic_leaves_little_of_is_dropped() -> None:
    first, ribbon = Squares([])[0], Squares([[0, 0, 160, 2]])[0]
    # Cut to its box, this is 80 times as wide as high, and a tile shows a small part of it.
    ribbon = ribbon[0][:, :2], ribbon[1]
    image, target = mosaic([first, ribbon, ribbon, ribbon], SIZE)
    assert (image == 0).any()
    assert target["boxes"].shape == (0, 4)


def test_a_mosaic_leaves_boxes_whole_that_fit() -> None:
    # Twice as wide as high: its tiles show a part of it, and that with the gun.
    wide = Squares([[130, 10, 140, 30]])[0]
    wide = wide[0][:, :80], wide[1]
    for seed in range(20):
        torch.manual_seed(seed)
        _, target = mosaic([wide] * 4, SIZE)
        sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
        assert len(sides) == 4
        ratios = sides[:, 0] / sides[:, 1]
        torch.testing.assert_close(ratios, torch.full((4,), 0.5), atol=0.03, rtol=0)


@pytest.mark.parametrize("shape", [(117, 83), (61, 190), (97, 97), (333, 1)])
def test_a_mosaic_takes_boxes_that_reach_the_edge(shape: tuple[int, int]) -> None:
    height, width = shape
    image = torch.zeros((3, height, width), dtype=torch.uint8)
    for box in ([0.0, 0.0, width, height], [width - 0.7, 0, width, height], [0, 0, width, 0.4]):
        target = Squares([])[0][1] | {"boxes": torch.tensor([box]), "labels": torch.ones(1)}
        for seed in range(20):
            torch.manual_seed(seed)
            canvas, result = mosaic([(image, target)] * 4, SIZE)
            height_now, width_now = canvas.shape[1:]
            limits = torch.tensor([width_now, height_now, width_now, height_now])
            assert ((result["boxes"] >= 0) & (result["boxes"] <= limits)).all()


def test_a_mosaic_of_one_picture_and_of_gun_free_ones() -> None:
    one = AugmentedDataset(Squares([[20, 30, 60, 80]]), ALWAYS_MOSAIC, 0, SIZE)
    assert one[0, 0, 0][0].shape == (3, 96, 128)
    _, target = AugmentedDataset(Gallery([]), ALWAYS_MOSAIC, 0, SIZE)[0, 0, 0]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)


def test_the_last_epochs_are_plain() -> None:
    everything = Augmentation(flip=0, photometric=0, zoom_out=1, crop=1, mosaic=0.5)
    plain = Squares([[20, 30, 60, 80]])
    data = AugmentedDataset(plain, everything, 0, SIZE, plain_from=3.4)
    assert all(data[epoch, 0, 0][0].shape != plain[0][0].shape for epoch in range(4))
    assert all(torch.equal(data[epoch, 0, 0][0], plain[0][0]) for epoch in (4, 5, 6))


def test_nothing_changes_without_augmentation() -> None:
    plain = Squares([[20, 30, 60, 80]])
    data = AugmentedDataset(plain, Augmentation(flip=0, photometric=0), 0, SIZE)
    image, target = data[5, 0, 0]
    assert torch.equal(image, plain[0][0])
    assert torch.equal(target["boxes"], plain[0][1]["boxes"])
