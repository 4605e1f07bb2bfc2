"""Intervals of every number: what other pictures of the same kind would have given.

The percentile bootstrap over groups of near-duplicates (Efron, "Bootstrap Methods: Another Look at
the Jackknife", 1979): pictures of one scene are not independent, so that they are drawn together.
Average precision of a resample is computed by COCO's formula from matches that are made once; the
numbers themselves come from the COCO evaluator, and a test holds the two together.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gun_detection.detector.detections import Detections
from gun_detection.evaluation.matching import IOU, Boxes, Matched, areas, match, pairwise_iou

CONFIDENCE = 0.95
IOUS = tuple(np.arange(0.5, 1.0, 0.05).round(2))
# COCO's sizes, in square pixels.
SIZES = {
    "ap_small": (0.0, 32.0**2),
    "ap_medium": (32.0**2, 96.0**2),
    "ap_large": (96.0**2, 1e10),
}
FPPI_LEVELS = (0.01, 0.1, 1.0)

_RECALLS = np.linspace(0, 1, 101)
_RESAMPLES = 1000
_LEAST_RESAMPLES = 200
# Bounds the time for large holdouts.
_MOST_WORK = 20_000_000

Weights = NDArray[np.int64]
Interval = tuple[float, float]


def draw_weights(groups: Sequence[str], resamples: int, seed: int = 0) -> Weights:
    """How often each picture is in each resample, (resamples, pictures)."""
    names, index = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    result: Weights = drawn[:, index]
    return result


def resamples_for(pictures: Sequence[Matched]) -> int:
    """Fewer where there is more to count."""
    marks = sum(len(picture.found.scores) for picture in pictures)
    return max(_LEAST_RESAMPLES, min(_RESAMPLES, _MOST_WORK // max(1, marks)))


def interval(values: NDArray[np.float64]) -> Interval | None:
    """The middle 95 % of the resamples in which there was something to measure."""
    known = values[np.isfinite(values)]
    if len(known) < len(values) / 2:
        return None
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return round(float(low), 4), round(float(high), 4)


@dataclass(frozen=True)
class Ranked:
    """All detections by falling score: their picture, and whether they are right or ignored."""

    picture: NDArray[np.int64]
    correct: NDArray[np.bool_]
    counted: NDArray[np.bool_]
    positives: NDArray[np.int64]

    @classmethod
    def of(cls, pictures: Sequence[Matched], iou: float, size: Interval | None = None) -> "Ranked":
        """Detections matched at an IoU; with `size`, only guns of such areas count."""
        rows = [_rank(picture.truth, picture.found, iou, size) for picture in pictures]
        scores = np.concatenate([np.zeros(0), *(p.found.scores for p in pictures)])
        order = np.argsort(-scores, kind="stable")
        lengths = [len(p.found.scores) for p in pictures]
        return cls(
            np.repeat(np.arange(len(pictures)), lengths)[order],
            np.concatenate([np.zeros(0, bool), *(row[0] for row in rows)])[order],
            np.concatenate([np.zeros(0, bool), *(row[1] for row in rows)])[order],
            np.array([row[2] for row in rows], dtype=np.int64),
        )

    def average_precision(self, weights: NDArray[np.int64]) -> float:
        """COCO's 101-point average precision with pictures weighted; NaN without guns."""
        total = int(weights @ self.positives)
        if not total:
            return float("nan")
        weight = weights[self.picture]
        hits = np.cumsum(weight * self.correct)
        marks = np.cumsum(weight * self.counted)
        precision = hits / np.maximum(marks, 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(hits / total, _RECALLS, side="left")
        return float(np.append(envelope, 0.0)[np.minimum(at, len(envelope))].mean())


def _rank(
    truth: Boxes, found: Detections, iou: float, size: Interval | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], int]:
    """(correct, counted, guns) of one picture."""
    overlap = pairwise_iou(found.boxes, truth)
    if size is None:
        correct = match(overlap, iou) >= 0
        return correct, np.ones(len(correct), bool), len(truth)
    ignored = ~_within(areas(truth), size)
    taken = match(overlap, iou, ignored)
    on_ignored = np.zeros(len(taken), bool)
    on_ignored[taken >= 0] = ignored[taken[taken >= 0]]
    outside = (taken < 0) & ~_within(areas(found.boxes), size)
    counted = ~(on_ignored | outside)
    return (taken >= 0) & ~on_ignored, counted, int((~ignored).sum())


def _within(values: Boxes, size: Interval) -> NDArray[np.bool_]:
    result: NDArray[np.bool_] = (values >= size[0]) & (values <= size[1])
    return result


def average_precisions(
    pictures: Sequence[Matched], only: Collection[str] | None = None
) -> dict[str, Callable[[Weights], float]]:
    """Functions that give each average precision of a resample by its weights.

    With `only` some of them: each is a matching at up to ten IoUs.
    """

    def mean(size: Interval | None) -> Callable[[Weights], float]:
        ranked = [Ranked.of(pictures, iou, size) for iou in IOUS]
        return lambda weights: float(np.mean([r.average_precision(weights) for r in ranked]))

    makers: dict[str, Callable[[], Callable[[Weights], float]]] = {
        "ap": lambda: mean(None),
        "ap50": lambda: Ranked.of(pictures, 0.5).average_precision,
        "ap75": lambda: Ranked.of(pictures, 0.75).average_precision,
        **{name: partial(mean, size) for name, size in SIZES.items()},
    }
    return {name: make() for name, make in makers.items() if only is None or name in only}


def recalls_at_fppi(
    pictures: Sequence[Matched],
) -> Callable[[Weights], dict[float, float]]:
    """A function that gives the recall at each of `FPPI_LEVELS` of a resample by its weights."""
    ranked = Ranked.of(pictures, IOU)
    negative = np.array([picture.negative for picture in pictures], dtype=bool)
    alarm = negative[ranked.picture]

    def at(weights: Weights) -> dict[float, float]:
        negatives, total = int(weights @ negative), int(weights @ ranked.positives)
        if not negatives or not total:
            return dict.fromkeys(FPPI_LEVELS, float("nan"))
        weight = weights[ranked.picture]
        alarms = np.cumsum(weight * alarm) / negatives
        hits = np.append(0, np.cumsum(weight * ranked.correct))
        # As many detections as stay within the budget.
        return {
            level: float(hits[np.searchsorted(alarms, level, side="right")] / total)
            for level in FPPI_LEVELS
        }

    return at
