import io
from functools import partial

import numpy as np
import pytest
from PIL import Image

from gun_detection.datasets.checks import check_boxes, check_sample, labels_agree
from gun_detection.datasets.labels import Label, to_boxes
from gun_detection.datasets.layouts import Sample
from gun_detection.errors import LabelError
from gun_detection.images import DecodeLimits, decode

decode_small = partial(decode, limits=DecodeLimits(max_pixels=10**6, max_bytes=10**6, min_side=16))


def jpeg(width: int = 100, height: int = 50, orientation: int = 1) -> bytes:
    image = Image.new("RGB", (width, height), (90, 120, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def sample(label: Label | LabelError) -> Sample:
    return Sample("a.jpg", bytes, lambda: label)


@pytest.mark.parametrize(
    ("box", "kept", "kind", "reason"),
    [
        ((10, 10, 20, 20), (10, 10, 20, 20), None, None),
        ((0, 0, 100, 50), (0, 0, 100, 50), None, None),
        ((90, 10, 104, 20), (90, 10, 100, 20), "clipped", "OUT_OF_FRAME"),
        ((-5, -1, 20, 20), (0, 0, 20, 20), "clipped", "OUT_OF_FRAME"),
        ((90, 10, 110, 20), (90, 10, 100, 20), "clipped", "OUT_OF_FRAME"),
        ((90, 10, 110.1, 20), None, "box", "OUT_OF_FRAME"),
        ((200, 200, 210, 210), None, "box", "OUT_OF_FRAME"),
        ((0, 0, 100.001, 50), (0, 0, 100, 50), None, None),
        ((10, 10, 10, 20), None, "box", "ZERO_AREA"),
        ((10, 20, 30, 20), None, "box", "ZERO_AREA"),
        ((20, 10, 10, 20), None, "box", "INVERTED"),
        ((10, 20, 20, 10), None, "box", "INVERTED"),
        ((np.nan, 1, 5, 5), None, "box", "NOT_FINITE"),
        ((0, 0, np.inf, 5), None, "box", "NOT_FINITE"),
        ((10, 10, 11.9, 20), None, "box", "TOO_SMALL"),
        ((10, 10, 12, 12), (10, 10, 12, 12), None, None),
        ((98.5, 10, 101, 20), None, "box", "TOO_SMALL"),
    ],
)
def test_boxes(
    box: tuple[float, ...],
    kept: tuple[float, ...] | None,
    kind: str | None,
    reason: str | None,
) -> None:
    boxes, problems = check_boxes("a.jpg", Label(to_boxes([box])), 100, 50)
    assert boxes.tolist() == ([] if kept is None else [list(kept)])
    assert boxes.shape[1] == 4
    assert [(item.kind, item.reason) for item in problems] == ([(kind, reason)] if kind else [])


def test_a_good_sample_keeps_its_boxes() -> None:
    checked = check_sample(sample(Label(to_boxes([[1, 2, 30, 40]]))), jpeg(), decode_small)
    assert checked.boxes is not None
    assert checked.boxes.tolist() == [[1, 2, 30, 40]]
    assert checked.image is not None
    assert checked.image.pixels.shape == (50, 100, 3)
    assert not checked.problems


def test_boxes_refer_to_the_upright_picture() -> None:
    """A picture stored lying on its side: the box is outside as stored and inside upright."""
    label = Label(to_boxes([[10, 60, 40, 95]]))
    turned = check_sample(sample(label), jpeg(orientation=6), decode_small)
    assert turned.image is not None
    assert turned.image.pixels.shape == (100, 50, 3)
    assert turned.boxes is not None
    assert turned.boxes.tolist() == [[10, 60, 40, 95]]
    assert check_sample(sample(label), jpeg(), decode_small).boxes is None


def test_a_dropped_box_takes_its_picture_along() -> None:
    label = Label(to_boxes([[1, 2, 30, 40], [5, 5, 5, 9], [9, 9, 8, 8]]))
    checked = check_sample(sample(label), jpeg(), decode_small)
    assert checked.boxes is None
    assert checked.dropped == 2
    assert [item.reason for item in checked.problems] == ["ZERO_AREA", "INVERTED", "BAD_BOX"]


@pytest.mark.parametrize(
    ("data", "label", "reason"),
    [
        (b"", Label(to_boxes([])), "EMPTY"),
        (b"<html>not a picture</html>", Label(to_boxes([])), "NOT_IMAGE"),
        (jpeg()[:-200], Label(to_boxes([])), "TRUNCATED"),
        (jpeg(8, 8), Label(to_boxes([])), "TOO_SMALL"),
        (jpeg(), LabelError("no", reason="COUNT_MISMATCH"), "COUNT_MISMATCH"),
    ],
)
def test_samples_that_are_left_out(data: bytes, label: Label | LabelError, reason: str) -> None:
    checked = check_sample(sample(label), data, decode_small)
    assert checked.image is None
    assert [(item.kind, item.reason) for item in checked.problems] == [("image", reason)]


@pytest.mark.parametrize(
    ("size", "orientation", "fits"),
    [
        ((100, 50), 1, True),
        (None, 6, True),
        ((50, 100), 6, True),
        ((100, 50), 6, False),
        ((200, 100), 1, False),
    ],
    ids=["same", "none", "upright", "as-stored", "scaled"],
)
def test_labels_for_a_picture_of_another_size(
    size: tuple[float, float] | None, orientation: int, fits: bool
) -> None:
    label = Label(to_boxes([[10, 10, 40, 40]]), size=size)
    checked = check_sample(sample(label), jpeg(orientation=orientation), decode_small)
    assert (checked.boxes is not None) is fits
    if not fits:
        assert [(item.kind, item.reason) for item in checked.problems] == [
            ("image", "SIZE_MISMATCH")
        ]


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        ([], [], True),
        ([[0, 0, 10, 10]], [], False),
        ([[0, 0, 10, 10]], [[0, 0, 10, 20]], True),
        ([[0, 0, 10, 10]], [[0, 0, 10, 21]], False),
        ([[0, 0, 10, 10], [50, 0, 60, 10]], [[50, 0, 60, 10], [0, 0, 10, 10]], True),
        ([[0, 0, 10, 10], [50, 0, 60, 10]], [[0, 0, 10, 10], [0, 0, 10, 11]], False),
        ([[0, 0, 10, 10]], [[50, 50, 60, 60]], False),
    ],
)
def test_labels_agree(one: list[list[float]], other: list[list[float]], agree: bool) -> None:
    assert labels_agree(to_boxes(one), to_boxes(other)) is agree
    assert labels_agree(to_boxes(other), to_boxes(one)) is agree
