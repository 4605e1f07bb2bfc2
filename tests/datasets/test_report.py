import re
from dataclasses import replace

import pytest

from gun_detection.datasets.checks import Kind, Problem
from gun_detection.datasets.findings import Findings, Kept
from gun_detection.datasets.labels import to_boxes
from gun_detection.datasets.manifest import Entry, Manifest
from gun_detection.datasets.report import describe, describe_rejected, render

HOSTILE = '<script>alert("1")</script>.jpg'


def problem(kind: Kind, reason: str, name: str = HOSTILE) -> Problem:
    return Problem(name, kind, reason, "a <message>")


def kept(*boxes: tuple[float, float, float, float]) -> Kept:
    return Kept("a.jpg", 10, 100, 50, to_boxes(boxes), 0)


FINDINGS = Findings(
    files=20,
    kept={"a": kept((0, 0, 10, 10), (0, 0, 25, 25)), "b": kept((0, 0, 100, 50)), "c": kept()},
    problems=[
        *[problem("duplicate", "DUPLICATE", f"{number}.jpg") for number in range(12)],
        problem("clipped", "OUT_OF_FRAME"),
        problem("image", "NOT_IMAGE"),
        problem("image", "BAD_BOX"),
        problem("box", "OUT_OF_FRAME"),
    ],
    duplicates=12,
    rejected_images=2,
    rejected_boxes=1,
)
ENTRY = Entry("a", 10, 100, 50, ((0, 0, 10, 10), (0, 0, 25, 25)), "a.jpg", "0" * 16, "a", "train")
MANIFEST = Manifest(
    (
        ENTRY,
        replace(ENTRY, sha256="b", boxes=((0, 0, 100, 50),), split="holdout", group="b"),
        replace(ENTRY, sha256="c", boxes=()),
    )
)


def test_counts_and_splits() -> None:
    report = describe("folder:x", MANIFEST, FINDINGS)
    assert report["counts"] == {
        "files": 20,
        "images": 3,
        "boxes": 3,
        "other_boxes": 0,
        "negatives": 1,
        "duplicates": 12,
        "label_conflicts": 0,
        "clipped_boxes": 1,
        "rejected_images": 2,
        "rejected_boxes": 1,
        "groups": 2,
        "largest_group": 2,
    }
    assert report["splits"] == {
        "train": {"images": 2, "boxes": 2, "negatives": 1, "groups": 1},
        "validation": {"images": 0, "boxes": 0, "negatives": 0, "groups": 0},
        "holdout": {"images": 1, "boxes": 1, "negatives": 0, "groups": 1},
    }
    assert len(report["problems"]) == 16


def test_box_sizes_are_shares_of_the_shorter_side() -> None:
    """10/50, 25/50 and more than the whole."""
    assert describe("x", MANIFEST, FINDINGS)["box_sizes"] == [0, 0, 1, 0, 0, 1, 0, 0, 0, 1]


def test_reasons_start_with_what_is_left_out() -> None:
    reasons = describe("x", MANIFEST, FINDINGS)["reasons"]
    assert [(item["kind"], item["reason"], item["count"]) for item in reasons] == [
        ("image", "BAD_BOX", 1),
        ("image", "NOT_IMAGE", 1),
        ("box", "OUT_OF_FRAME", 1),
        ("clipped", "OUT_OF_FRAME", 1),
        ("duplicate", "DUPLICATE", 12),
    ]
    assert [item["name"] for item in reasons[-1]["first"]] == [f"{n}.jpg" for n in range(8)]


def test_classes_that_count_as_guns_and_others() -> None:
    guns = (("Pistol", True), ("<knife>", False), ("Pistol", True))
    image = replace(kept((0, 0, 10, 10)), classes=guns)
    findings = Findings(2, {"a": image, "b": replace(image, classes=(("", False),))})
    for content in (describe("x", MANIFEST, findings), describe_rejected("x", findings, 0.1)):
        assert content["classes"] == {"guns": {"Pistol": 2}, "others": {"": 1, "<knife>": 1}}
        assert content["counts"]["other_boxes"] == 2
        page = render(content, [])
        for word in ("<h2>Classes", "Pistol", "&lt;knife&gt;", "(no name)"):
            assert word in page
    without = describe("x", MANIFEST, FINDINGS)
    assert without["classes"] == {}
    assert "<h2>Classes" not in render(without, [])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (describe("folder:<x>", MANIFEST, FINDINGS), ["Accepted", MANIFEST.id, "and 4 more"]),
        (describe_rejected("folder:<x>", FINDINGS, 0.1), ["Refused", "10 %", "NOT_IMAGE"]),
        (
            describe("y", MANIFEST, Findings(3, FINDINGS.kept)),
            ["every picture and box can be used"],
        ),
    ],
    ids=["accepted", "refused", "sound"],
)
def test_the_page_needs_no_other_file_and_trusts_no_name(
    content: dict[str, object], words: list[str]
) -> None:
    thumbnail = {
        "name": HOSTILE,
        "split": "train",
        "boxes": 1,
        "width": 1,
        "height": 1,
        "uri": "data:image/jpeg;base64,AAAA",
    }
    page = render(content, [thumbnail])
    for word in words:
        assert word in page
    assert "<script" not in page
    assert "<x>" not in page
    assert "<message>" not in page
    assert re.findall(r'(?:src|href)="([^"]{0,5})', page) == ["data:"]
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page
