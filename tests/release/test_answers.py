"""An engine that answers otherwise than where it was accepted is found out, rounding is not."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import OutOfMemory
from gun_detection.errors import ImageError
from gun_detection.release.answers import differs, record

PICTURES = [np.full((8, 12, 3), number, np.uint8) for number in range(4)]
BOXES = np.array([[0, 0, 4, 4], [5, 0, 9, 4], [0, 4, 4, 8]], np.float32)
SCORES = np.array([0.9, 0.6, 0.3], np.float32)


class Fixed:
    """Gives every picture the same boxes with the same scores; `limit` pictures at a time."""

    name, device, streams, batch, input_size = "fixed", "cpu", 1, 4, (8, 12)

    def __init__(self, boxes: NDArray[np.float32], scores: Sequence[float], limit: int = 4) -> None:
        self.found = Detections(boxes, np.array(scores, np.float32))
        self.limit = limit
        self.seen: list[NDArray[np.uint8]] = []

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        if len(images) > self.limit:
            raise OutOfMemory
        self.seen += images
        return [self.found] * len(images)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "answers.npz"
    path.write_bytes(record(Fixed(BOXES, SCORES), PICTURES))
    return path


def test_it_is_asked_about_the_same_pictures(file: Path) -> None:
    engine = Fixed(BOXES, SCORES)
    assert differs(engine, file, 0.0) is None
    assert len(engine.seen) == len(PICTURES)
    for seen, picture in zip(engine.seen, PICTURES, strict=True):
        np.testing.assert_array_equal(seen, picture)


def test_the_same_answers_make_the_same_file() -> None:
    assert record(Fixed(BOXES, SCORES), PICTURES) == record(Fixed(BOXES, SCORES), PICTURES)


@pytest.mark.parametrize(
    ("boxes", "scores"),
    [
        (BOXES + 0.5, [0.85, 0.55, 0.35]),
        # What is weak comes and goes.
        (np.concatenate([BOXES, BOXES + 20]), [0.9, 0.6, 0.3, 0.15, 0.15, 0.15]),
        # In another order, and with what is below the floor left out.
        (BOXES[[1, 0]], [0.6, 0.9]),
    ],
    ids=["rounding", "weak ones", "above the floor"],
)
def test_rounding_is_no_difference(
    file: Path, boxes: NDArray[np.float32], scores: list[float]
) -> None:
    floor = 0.25 if len(scores) == 2 else 0.05
    assert differs(Fixed(boxes, scores), file, floor) is None


@pytest.mark.parametrize(
    ("boxes", "scores"),
    [
        (BOXES[:0], []),
        (BOXES, [0.5, 0.2, 0.1]),
        (BOXES + 4, SCORES.tolist()),
        (np.concatenate([BOXES, BOXES + 20, BOXES + 40]), [0.9, 0.6, 0.3, *[0.8] * 6]),
    ],
    ids=["nothing", "lower scores", "elsewhere", "false alarms"],
)
def test_other_answers_are_told(
    file: Path, boxes: NDArray[np.float32], scores: list[float]
) -> None:
    told = differs(Fixed(boxes, scores), file, 0.05)
    assert told is not None
    assert "in 4 pictures have no like" in told


def test_an_engine_that_computes_no_number_is_told(file: Path) -> None:
    class Broken(Fixed):
        def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
            raise ImageError("no number", reason="NOT_FINITE")

    assert differs(Broken(BOXES, SCORES.tolist()), file, 0.05) == "no number"


@pytest.mark.parametrize("limit", [2, 0])
def test_little_memory_is_no_difference(file: Path, limit: int) -> None:
    assert differs(Fixed(BOXES, SCORES, limit), file, 0.05) is None
