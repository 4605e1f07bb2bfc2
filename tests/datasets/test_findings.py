from functools import partial

import pytest

from gun_detection.datasets.findings import Findings, look_at
from gun_detection.datasets.labels import Label, to_boxes
from gun_detection.datasets.layouts import Sample
from gun_detection.datasets.synthetic import draw_pictures
from gun_detection.errors import LabelError
from gun_detection.images import DecodeLimits, decode

decode_any = partial(decode, limits=DecodeLimits(max_pixels=10**7, max_bytes=10**7, min_side=16))

GUN = Label(to_boxes([[5, 5, 60, 60]]))
OTHER_GUN = Label(to_boxes([[5, 5, 20, 20]]))
BAD_GUN = Label(to_boxes([[5, 5, 5, 20]]))
NO_GUN = Label(to_boxes([]))
OTHER_SIZE = Label(to_boxes([]), size=(7, 9))
UNREADABLE = LabelError("no")


@pytest.mark.parametrize(
    ("labels", "reasons", "kept"),
    [
        ([GUN, GUN], ["duplicate DUPLICATE"], True),
        ([GUN, OTHER_GUN], ["duplicate LABEL_CONFLICT"], True),
        ([GUN, BAD_GUN], ["duplicate LABEL_CONFLICT"], True),
        ([GUN, UNREADABLE], ["duplicate DUPLICATE"], True),
        ([GUN, OTHER_SIZE], ["duplicate DUPLICATE"], True),
        ([OTHER_SIZE, GUN], ["image SIZE_MISMATCH"], True),
        ([GUN, NO_GUN], ["image LABEL_CONFLICT"] * 2, False),
        ([NO_GUN, GUN], ["image LABEL_CONFLICT"] * 2, False),
        ([NO_GUN, BAD_GUN], ["image LABEL_CONFLICT"] * 2, False),
        ([NO_GUN, GUN, GUN], ["image LABEL_CONFLICT"] * 2 + ["duplicate DUPLICATE"], False),
    ],
)
def test_copies(labels: list[Label | LabelError], reasons: list[str], kept: bool) -> None:
    (picture,) = draw_pictures(1, seed=3)
    findings = Findings()
    for number, label in enumerate(labels):
        sample = Sample(f"{number}.jpg", lambda: picture.data, lambda label=label: label)
        look_at(sample, findings, decode_any)
    assert [f"{item.kind} {item.reason}" for item in findings.problems] == reasons
    assert len(findings.kept) == kept
    rejected = sum(reason.startswith("image") for reason in reasons)
    assert findings.rejected_images == rejected
    assert findings.files - findings.duplicates - rejected == kept
