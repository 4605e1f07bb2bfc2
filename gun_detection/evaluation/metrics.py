"""Metrics of detections against labels, as data.

Average precision comes from a maintained COCO evaluator, counts at the operating threshold from
`matching`, intervals from `bootstrap`.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from gun_detection.evaluation.bootstrap import (
    FPPI_LEVELS,
    Interval,
    average_precisions,
    draw_weights,
    interval,
    recalls_at_fppi,
    resamples_for,
)
from gun_detection.evaluation.matching import Boxes, Matched

# Part of the identity of a cached evaluation: raise it when a number would come out differently.
EVALUATOR_VERSION = "3"
_BINS = 10


class Metrics(BaseModel):
    """Quality on some pictures. `None` where there is nothing to measure (no such boxes or images).

    ap: COCO AP, mean over IoU 0.50 to 0.95; ap50, ap75: at one IoU; by box size as COCO's
    (areas below 32², up to 96², above). At `threshold`: precision and recall of boxes;
    `false_positives_per_negative`, per gun-free picture (FPPI); `sensitivity`, the share of
    pictures with a gun that have a mark, and `specificity`, the share of gun-free pictures that
    have none. `recall_at_fppi`: the recall at the threshold that gives so many false positives
    per gun-free picture. `calibration_error`: how far a score is from the share of such marks
    that are right, on average (ECE; Naeini et al., 2015). `intervals`: 95 % of each number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    boxes: int
    negatives: int
    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    threshold: float
    precision: float | None
    recall: float | None
    false_positives_per_negative: float | None
    sensitivity: float | None
    specificity: float | None
    recall_at_fppi: dict[str, float | None]
    calibration_error: float | None
    intervals: dict[str, Interval | None]


def average_precision(pictures: Sequence[Matched]) -> dict[str, float | None]:
    """`ap`, `ap50`, `ap75` and AP by size, from the COCO evaluator."""
    names = {
        "ap": "AP_all",
        "ap50": "AP_50",
        "ap75": "AP_75",
        "ap_small": "AP_small",
        "ap_medium": "AP_medium",
        "ap_large": "AP_large",
    }
    if not any(len(picture.truth) for picture in pictures):
        return dict.fromkeys(names)
    truth_set = COCO(
        {
            "images": [{"id": index} for index in range(len(pictures))],
            "categories": [{"id": 1, "name": "gun"}],
            "annotations": _annotations(pictures),
        }
    )
    rows = [
        {"image_id": index, "category_id": 1, "bbox": box, "score": float(score)}
        for index, picture in enumerate(pictures)
        for box, score in zip(_xywh(picture.found.boxes), picture.found.scores, strict=True)
    ]
    evaluator = COCOeval_faster(
        truth_set, truth_set.loadRes(rows), "bbox", print_function=lambda *_: None
    )
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    found = evaluator.stats_as_dict
    # The evaluator answers -1 where there are no boxes of a size.
    return {
        name: (float(found[theirs]) if found[theirs] >= 0 else None)
        for name, theirs in names.items()
    }


def compute_metrics(
    pictures: Sequence[Matched], threshold: float, groups: Sequence[str] | None = None
) -> Metrics:
    """Metrics over pictures; those of one of the `groups` are drawn together for the intervals."""
    at_threshold = _AtThreshold(pictures, threshold)
    everything = np.ones(len(pictures), dtype=np.int64)
    recalls = recalls_at_fppi(pictures)
    groups = groups or [str(index) for index in range(len(pictures))]
    return Metrics(
        images=len(pictures),
        boxes=sum(len(picture.truth) for picture in pictures),
        negatives=sum(picture.negative for picture in pictures),
        **average_precision(pictures),
        threshold=threshold,
        **{name: _known(value) for name, value in at_threshold(everything).items()},
        recall_at_fppi={str(k): _known(v) for k, v in recalls(everything).items()},
        calibration_error=calibration_error(pictures),
        intervals=_intervals(pictures, threshold, groups),
    )


def calibration(pictures: Sequence[Matched]) -> list[tuple[float, float, int]]:
    """(mean score, share that is right, number) of the detections in each tenth of the scores."""
    scores = np.concatenate([np.zeros(0), *(p.found.scores for p in pictures)])
    correct = np.concatenate([np.zeros(0, bool), *(p.correct for p in pictures)])
    bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    return [
        (float(scores[bins == b].mean()), float(correct[bins == b].mean()), int((bins == b).sum()))
        for b in range(_BINS)
        if (bins == b).any()
    ]


def calibration_error(pictures: Sequence[Matched]) -> float | None:
    rows = calibration(pictures)
    total = sum(number for _, _, number in rows)
    if not total:
        return None
    return round(sum(abs(score - right) * number for score, right, number in rows) / total, 4)


class _AtThreshold:
    """The counts of each picture at a threshold; called with weights, the numbers of a resample."""

    def __init__(self, pictures: Sequence[Matched], threshold: float) -> None:
        counts = [picture.counts(threshold) for picture in pictures]
        self.hits, self.alarms = np.array(counts, dtype=np.int64).reshape(-1, 2).T
        self.guns = np.array([len(picture.truth) for picture in pictures], dtype=np.int64)
        self.negative = self.guns == 0

    def __call__(self, weights: NDArray[np.int64]) -> dict[str, float]:
        hits, marks = weights @ self.hits, weights @ (self.hits + self.alarms)
        negatives = weights @ self.negative
        marked = self.hits + self.alarms > 0
        return {
            "precision": _ratio(hits, marks),
            "recall": _ratio(hits, weights @ self.guns),
            "false_positives_per_negative": _ratio(
                weights @ (self.alarms * self.negative), negatives
            ),
            "sensitivity": _ratio(weights @ (marked & ~self.negative), weights @ ~self.negative),
            "specificity": _ratio(weights @ (~marked & self.negative), negatives),
        }


def numbers_of(
    pictures: Sequence[Matched], threshold: float, only: Collection[str] | None = None
) -> Callable[[NDArray[np.int64]], dict[str, float]]:
    """A function that gives every number of a resample by its weights; NaN where there is none.

    With `only` it gives those, and spends no time on the others.
    """
    precisions = average_precisions(pictures, only)
    names = {f"recall_at_fppi_{level}" for level in FPPI_LEVELS}
    ranked = only is None or not names.isdisjoint(only)
    recalls = recalls_at_fppi(pictures) if ranked else None
    counted = only is None or not set(only) <= {*precisions, *names}
    at_threshold = _AtThreshold(pictures, threshold) if counted else None

    def numbers(weights: NDArray[np.int64]) -> dict[str, float]:
        row = {name: function(weights) for name, function in precisions.items()}
        if at_threshold:
            row |= at_threshold(weights)
        if recalls:
            row |= {f"recall_at_fppi_{level}": v for level, v in recalls(weights).items()}
        return row if only is None else {name: v for name, v in row.items() if name in only}

    return numbers


def _intervals(
    pictures: Sequence[Matched], threshold: float, groups: Sequence[str]
) -> dict[str, Interval | None]:
    if not pictures:
        return {}
    numbers = numbers_of(pictures, threshold)
    values: dict[str, list[float]] = {}
    for weights in draw_weights(groups, resamples_for(pictures)):
        for name, value in numbers(weights).items():
            values.setdefault(name, []).append(value)
    return {name: interval(np.array(column)) for name, column in values.items()}


def _annotations(pictures: Sequence[Matched]) -> list[dict[str, Any]]:
    boxes = [(index, box) for index, p in enumerate(pictures) for box in _xywh(p.truth)]
    return [
        {
            "id": number,
            "image_id": index,
            "category_id": 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for number, (index, box) in enumerate(boxes, start=1)
    ]


def _xywh(boxes: Boxes) -> list[list[float]]:
    return [[float(x1), float(y1), float(x2 - x1), float(y2 - y1)] for x1, y1, x2, y2 in boxes]


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else float("nan")


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


__all__ = [
    "EVALUATOR_VERSION",
    "FPPI_LEVELS",
    "Metrics",
    "average_precision",
    "calibration",
    "calibration_error",
    "compute_metrics",
    "numbers_of",
]
