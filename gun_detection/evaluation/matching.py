"""Which detection found which gun: the rule that every count at a threshold rests on.

The COCO rule: by falling score, each detection takes the unmatched box that it overlaps most,
from some IoU on (Lin et al., "Microsoft COCO: Common Objects in Context", 2014).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gun_detection.detector.detections import Detections

# At which a gun counts as found, but for average precision.
IOU = 0.5
_NEVER = -9.0

Boxes = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Matched:
    """One picture: `truth` (N, 4), detections best first, and the box that each took, or -1."""

    truth: Boxes
    found: Detections
    taken: NDArray[np.int64]

    @classmethod
    def of(cls, truth: Boxes, found: Detections) -> "Matched":
        return cls(truth, found, match(pairwise_iou(found.boxes, truth), IOU))

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        return self.taken >= 0

    @property
    def negative(self) -> bool:
        return len(self.truth) == 0

    @cached_property
    def stray(self) -> NDArray[np.bool_]:
        """Which detections touch no gun at all."""
        most = pairwise_iou(self.found.boxes, self.truth).max(axis=1, initial=0.0)
        stray: NDArray[np.bool_] = most == 0
        return stray

    def counts(self, threshold: float) -> tuple[int, int]:
        """(true positives, false positives) among the detections from `threshold` on."""
        kept = self.correct[self.found.scores >= threshold]
        return int(kept.sum()), int((~kept).sum())

    def missed(self, threshold: float) -> NDArray[np.int64]:
        """Indices of the boxes that nothing took from `threshold` on."""
        taken = self.taken[self.found.scores >= threshold]
        return np.setdiff1d(np.arange(len(self.truth)), taken)


def match_all(truths: Sequence[Boxes], detections: Sequence[Detections]) -> list[Matched]:
    """Every picture matched; `truths` holds each picture's boxes, (N, 4) xyxy pixels."""
    if len(truths) != len(detections):
        raise ValueError(f"{len(truths)} pictures have labels and {len(detections)} detections")
    return [Matched.of(truth, found) for truth, found in zip(truths, detections, strict=True)]


def match(
    overlap: Boxes, iou: float, ignored: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """The box that each detection takes, or -1; `overlap` is (detections by score, boxes).

    Boxes that are `ignored` are taken only by what overlaps no other one enough.
    """
    taken = np.full(len(overlap), -1, dtype=np.int64)
    if overlap.shape[1] == 0:
        return taken
    free = np.where(overlap >= iou, overlap, _NEVER)
    if ignored is not None:
        free[:, ignored] -= 2.0
    for index in range(len(taken)):
        best = int(free[index].argmax())
        if free[index, best] > _NEVER:
            taken[index] = best
            free[:, best] = _NEVER - 2.0
    return taken


def pairwise_iou(boxes: Boxes, others: Boxes) -> Boxes:
    """IoU of every box with every other, (N, M)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    inter = np.clip(high - low, 0, None).prod(axis=2)
    union = areas(boxes)[:, None] + areas(others)[None, :] - inter
    result: Boxes = inter / np.maximum(union, 1e-9)
    return result


def areas(boxes: Boxes) -> Boxes:
    """Areas of (N, 4) boxes, square pixels."""
    result: Boxes = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return result
