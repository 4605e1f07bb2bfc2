"""What the samples of a source turned out to be, gathered one by one."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from gun_detection.datasets.checks import Checked, Problem, check_boxes, check_sample, labels_agree
from gun_detection.datasets.groups import perceptual_hash
from gun_detection.datasets.labels import Boxes
from gun_detection.datasets.layouts import Sample
from gun_detection.errors import ImageError, LabelError
from gun_detection.images import DecodedImage


@dataclass(frozen=True, eq=False)
class Kept:
    """An image that is part of the data set, before it has a group and a split."""

    name: str
    size: int
    width: int
    height: int
    boxes: Boxes
    phash: int


@dataclass
class Findings:
    """What the samples of a source turned out to be; `kept` is by sha256."""

    files: int = 0
    kept: dict[str, Kept] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    duplicates: int = 0
    rejected_images: int = 0
    rejected_boxes: int = 0

    @property
    def boxes(self) -> int:
        return sum(len(image.boxes) for image in self.kept.values())


def look_at(
    sample: Sample, findings: Findings, decode: Callable[[bytes], DecodedImage]
) -> Checked | None:
    """Add a sample to the findings; what is returned is to be uploaded."""
    findings.files += 1
    try:
        data = sample.read()
    except ImageError as error:
        findings.rejected_images += 1
        findings.problems.append(Problem(sample.name, "image", error.reason, error.message))
        return None
    first = findings.kept.get(hashlib.sha256(data).hexdigest())
    if first is not None:
        findings.duplicates += 1
        findings.problems.append(_duplicate(sample, first))
        return None
    checked = check_sample(sample, data, decode)
    findings.problems += checked.problems
    findings.rejected_boxes += checked.dropped
    if checked.pixels is None or checked.boxes is None:
        findings.rejected_images += 1
        return None
    height, width = checked.pixels.shape[:2]
    phash = perceptual_hash(checked.pixels)
    findings.kept[checked.sha256] = Kept(
        sample.name, len(data), width, height, checked.boxes.round(3), phash
    )
    return checked


def _duplicate(sample: Sample, first: Kept) -> Problem:
    """A further copy of the same bytes: the first by name counts, also where labels differ."""
    label = sample.label()
    if isinstance(label, LabelError):
        message = f"same bytes as {first.name}, and its own label cannot be used"
        return Problem(sample.name, "duplicate", "DUPLICATE", message)
    boxes, _ = check_boxes(sample.name, label, first.width, first.height)
    if labels_agree(boxes, first.boxes):
        return Problem(sample.name, "duplicate", "DUPLICATE", f"same bytes as {first.name}")
    return Problem(
        sample.name,
        "duplicate",
        "LABEL_CONFLICT",
        f"same bytes as {first.name}, whose label differs and was kept",
    )
