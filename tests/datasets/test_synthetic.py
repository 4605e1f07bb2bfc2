import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from gun_detection.datasets.synthetic import Picture, draw_picture, draw_pictures, upload_pictures


def pixels(picture: Picture) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(picture.data)))


def test_the_same_seed_gives_the_same_pictures() -> None:
    one, other = list(draw_pictures(8, seed=1)), list(draw_pictures(12, seed=1))
    assert [item.data for item in one] == [item.data for item in other[:8]]
    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(one, other, strict=False))
    assert draw_picture(3, 1).data == one[3].data
    assert draw_picture(3, 2).data != one[3].data


def test_every_fifth_picture_has_no_gun() -> None:
    counts = [len(picture.boxes) for picture in draw_pictures(50)]
    assert [count == 0 for count in counts] == [index % 5 == 4 for index in range(50)]
    assert set(counts) == {0, 1, 2}


def test_guns_are_dark_and_their_boxes_are_tight() -> None:
    for picture in draw_pictures(30, seed=4):
        image = pixels(picture)
        height, width = image.shape[:2]
        for x1, y1, x2, y2 in picture.boxes.astype(int):
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            longer = max(x2 - x1, y2 - y1) / min(width, height)
            assert 0.26 <= longer <= 0.58
            # Wood is the lightest part of a gun; each edge of the box is reached.
            gun = image[y1:y2, x1:x2].max(axis=2) < 110
            assert gun.mean() > 0.1
            edges = (gun[:3], gun[-3:], gun[:, :3], gun[:, -3:])
            assert all(edge.any() for edge in edges)


def test_sizes_are_mixed_and_moderate() -> None:
    sizes = {Image.open(io.BytesIO(picture.data)).size for picture in draw_pictures(40)}
    assert len(sizes) > 3
    assert all(180 <= side <= 320 for size in sizes for side in size)


def test_uploads_are_fresh_and_of_both_kinds() -> None:
    uploads = upload_pictures(6, seed=0)
    counts = [len(picture.boxes) > 0 for picture in uploads]
    assert counts == [True, False, True, True, False, True]
    assert len({picture.name for picture in uploads}) == 6
    known = {hashlib.sha256(picture.data).digest() for picture in draw_pictures(40, seed=0)}
    assert not known & {hashlib.sha256(picture.data).digest() for picture in uploads}


@pytest.mark.parametrize("seed", [0, 1])
def test_no_two_pictures_are_alike(seed: int) -> None:
    assert len({picture.data for picture in draw_pictures(30, seed)}) == 30
