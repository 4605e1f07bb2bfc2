"""What the samples of a source turned out to be, gathered one by one."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from gun_detection.datasets.checks import (
    Checked,
    Problem,
    check_boxes,
    check_sample,
    labels_agree,
    size_fault,
)
from gun_detection.datasets.groups import perceptual_hash
from gun_detection.datasets.labels import Boxes, Label
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
    classes: tuple[tuple[str, bool], ...] = ()


@dataclass
class Findings:
    """What the samples of a source turned out to be; `kept` is by sha256.

    `contradicted` has the sha256 of images labelled both with a gun and without, and the names.
    """

    files: int = 0
    kept: dict[str, Kept] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    duplicates: int = 0
    rejected_images: int = 0
    rejected_boxes: int = 0
    contradicted: dict[str, str] = field(default_factory=dict)

    @property
    def boxes(self) -> int:
        return sum(len(image.boxes) for image in self.kept.values())

    def leave_out(self, sha256: str, reason: str, message: str) -> None:
        """Keep an image no longer: nothing is wrong with it, but others tell the same."""
        image = self.kept.pop(sha256)
        self.duplicates += 1
        self.problems.append(Problem(image.name, "duplicate", reason, message))


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
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 in findings.kept or sha256 in findings.contradicted:
        _add_copy(sample, sha256, findings)
        return None
    checked = check_sample(sample, data, decode)
    findings.problems += checked.problems
    findings.rejected_boxes += checked.dropped
    image = checked.image
    if image is None or checked.boxes is None:
        findings.rejected_images += 1
        return None
    findings.kept[checked.sha256] = Kept(
        sample.name,
        len(data),
        image.width,
        image.height,
        checked.boxes.round(3),
        perceptual_hash(image.pixels),
        checked.classes,
    )
    return checked


def _add_copy(sample: Sample, sha256: str, findings: Findings) -> None:
    """A further copy of the same bytes: the first by name counts, also where boxes differ.

    Where one has boxes and the other none, neither is believed: a gun may be in a picture that
    is to teach what is none.
    """
    label = sample.label()
    first = findings.kept.get(sha256)
    if first is None:
        message = (
            f"same bytes as {findings.contradicted[sha256]}, whose labels contradict each other"
        )
        problem = Problem(sample.name, "duplicate", "DUPLICATE", message)
    elif isinstance(label, LabelError) or size_fault(label, first.width, first.height):
        message = f"same bytes as {first.name}, and its own label cannot be used"
        problem = Problem(sample.name, "duplicate", "DUPLICATE", message)
    elif bool(len(label.boxes)) != bool(len(first.boxes)):
        _reject_both(sample.name, sha256, findings)
        return
    else:
        problem = _duplicate(sample.name, label, first)
    findings.duplicates += 1
    findings.problems.append(problem)


def _reject_both(name: str, sha256: str, findings: Findings) -> None:
    names = findings.kept.pop(sha256).name, name
    both = findings.contradicted[sha256] = " and ".join(names)
    message = f"{both} are the same bytes, one with a gun and one without: correct one label"
    findings.rejected_images += 2
    findings.problems += [Problem(each, "image", "LABEL_CONFLICT", message) for each in names]


def _duplicate(name: str, label: Label, first: Kept) -> Problem:
    boxes, _ = check_boxes(name, label, first.width, first.height)
    if labels_agree(boxes, first.boxes):
        return Problem(name, "duplicate", "DUPLICATE", f"same bytes as {first.name}")
    message = f"same bytes as {first.name}, whose label differs and was kept"
    return Problem(name, "duplicate", "LABEL_CONFLICT", message)
