"""What is wrong with a sample: one reason code for every image or box that cannot be used.

A picture of which a box is dropped is left out as a whole (`BAD_BOX`): the gun would still be in
it, unmarked, and teach the detector to overlook guns. Boxes that reach over the edge with less
than half of their area are clipped, and the picture stays.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from gun_detection.datasets.labels import Boxes, Label
from gun_detection.datasets.layouts import Sample
from gun_detection.errors import ImageError, LabelError
from gun_detection.images import DecodedImage

MIN_BOX_SIDE = 2.0
MIN_INSIDE_SHARE = 0.5
# Rounding in relative formats puts edges this little outside, in pixels; no fault to report.
_EDGE_TOLERANCE = 0.01

Kind = Literal["image", "box", "clipped", "duplicate"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A finding about a sample: `image` and `box` are left out, `clipped` boxes and the first of
    `duplicate` images are kept.
    """

    name: str
    kind: Kind
    reason: str
    message: str


@dataclass(frozen=True, eq=False)
class Checked:
    """A sample that was looked at; `image` and `boxes` are None when it is left out.

    `boxes` is float64 (N, 4) xyxy inside the whole picture; `dropped` counts boxes left out.
    """

    name: str
    sha256: str
    data: bytes
    image: DecodedImage | None
    boxes: Boxes | None
    problems: list[Problem]
    dropped: int = 0
    classes: tuple[tuple[str, bool], ...] = ()


def check_sample(sample: Sample, data: bytes, decode: Callable[[bytes], DecodedImage]) -> Checked:
    """Decode the picture, read its label and check every box; never raises for a bad sample."""

    def left_out(*problems: Problem, dropped: int = 0) -> Checked:
        return Checked(sample.name, sha256, data, None, None, list(problems), dropped)

    sha256 = hashlib.sha256(data).hexdigest()
    try:
        image = decode(data)
    except ImageError as error:
        return left_out(Problem(sample.name, "image", error.reason, error.message))
    label = sample.label()
    if isinstance(label, LabelError):
        return left_out(Problem(sample.name, "image", label.reason, label.message))
    if fault := size_fault(label, image.width, image.height):
        return left_out(Problem(sample.name, "image", "SIZE_MISMATCH", fault))
    boxes, problems = check_boxes(sample.name, label, image.width, image.height)
    dropped = sum(problem.kind == "box" for problem in problems)
    if dropped:
        whole = Problem(
            sample.name, "image", "BAD_BOX", f"{dropped} of its boxes cannot be used: left out"
        )
        return left_out(*problems, whole, dropped=dropped)
    return Checked(sample.name, sha256, data, image, boxes, problems, classes=label.classes)


def size_fault(label: Label, width: int, height: int) -> str | None:
    """What is wrong with a label that was made for a picture of another size, or None.

    Its boxes would lie elsewhere: the picture was scaled, or turned by its EXIF orientation.
    """
    if label.size in (None, (width, height)):
        return None
    stated = "x".join(f"{side:g}" for side in label.size)
    return (
        f"the label is for a picture of {stated}, this one is {width}x{height}: label it anew or "
        "store the picture upright"
    )


def check_boxes(name: str, label: Label, width: int, height: int) -> tuple[Boxes, list[Problem]]:
    """The usable boxes of a picture of this size, clipped to it, and what is wrong with others."""
    kept, problems = [], []
    for number, box in enumerate(label.pixels(width, height), start=1):
        clipped = np.clip(box, 0, [width, height, width, height])
        fault = _fault(box, clipped)
        where = f"box {number} [{', '.join(f'{value:g}' for value in box)}] in {width}x{height}"
        if fault:
            problems.append(Problem(name, "box", fault, where))
            continue
        kept.append(clipped)
        if np.abs(clipped - box).max() > _EDGE_TOLERANCE:
            problems.append(Problem(name, "clipped", "OUT_OF_FRAME", f"{where}: clipped"))
    return np.array(kept, np.float64).reshape(-1, 4), problems


def _fault(box: npt.NDArray[np.float64], clipped: npt.NDArray[np.float64]) -> str | None:
    """Why the box has to be dropped, or None."""
    if not np.isfinite(box).all():
        return "NOT_FINITE"
    sides = box[2:] - box[:2]
    if (sides < 0).any():
        return "INVERTED"
    if (sides == 0).any():
        return "ZERO_AREA"
    inside = clipped[2:] - clipped[:2]
    if inside.prod() < MIN_INSIDE_SHARE * sides.prod():
        return "OUT_OF_FRAME"
    return "TOO_SMALL" if (inside < MIN_BOX_SIDE).any() else None


def labels_agree(one: Boxes, other: Boxes) -> bool:
    """Whether two labels of a picture mark the same guns: every box meets another at IoU 0.5."""
    if len(one) != len(other):
        return False
    if len(one) == 0:
        return True
    corner = np.minimum(one[:, None, 2:], other[None, :, 2:]) - np.maximum(
        one[:, None, :2], other[None, :, :2]
    )
    common = np.clip(corner, 0, None).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (one, other)]
    near = common / (areas[0][:, None] + areas[1][None] - common) >= 0.5
    return bool(near.any(axis=0).all() and near.any(axis=1).all())
