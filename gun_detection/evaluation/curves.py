"""What each threshold gives: the marks counted by falling score."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gun_detection.evaluation.matching import Matched

Numbers = NDArray[np.floating[Any]]


class Curve:
    """Counts from the surest mark to each next one; all arrays are (marks,), by falling `scores`.

    `hits` are marks that found a gun (IoU 0.5), `alarms` marks that touch no gun, on gun-free
    pictures or `everywhere`. `cuts` says where a threshold can lie: tied scores stay or go
    together.
    """

    def __init__(self, pictures: Sequence[Matched], *, everywhere: bool = False) -> None:
        scores = np.concatenate([np.zeros(0), *(p.found.scores for p in pictures)])
        correct = np.concatenate([np.zeros(0, bool), *(p.correct for p in pictures)])
        alarm = np.concatenate(
            [np.zeros(0, bool), *(p.stray & (p.negative or everywhere) for p in pictures)]
        )
        order = np.argsort(-scores, kind="stable")
        self.scores: Numbers = scores[order]
        self.hits = np.cumsum(correct[order])
        self.alarms = np.cumsum(alarm[order])
        self.guns = sum(len(p.truth) for p in pictures)
        self.judged = sum(p.negative or everywhere for p in pictures)
        self.cuts = np.append(self.scores[:-1] > self.scores[1:], True)[: len(order)]

    @property
    def marks(self) -> NDArray[np.int64]:
        return np.arange(1, len(self.scores) + 1)

    @property
    def precision(self) -> Numbers:
        """Share of the marks that are right."""
        return self.hits / self.marks

    @property
    def recall(self) -> Numbers:
        """Share of the guns that are found; NaN without guns."""
        return self.hits / (self.guns or np.nan)

    @property
    def fppi(self) -> Numbers:
        """Alarms per picture that is judged, gun-free ones or all; NaN without any."""
        return self.alarms / (self.judged or np.nan)

    @property
    def f1(self) -> Numbers:
        """Harmonic mean of precision and recall."""
        return 2 * self.hits / (self.marks + self.guns)

    def points(self, most: int = 500) -> list[dict[str, float | None]]:
        """At most so many thresholds and what each gives, highest first, as JSON types.

        The first is above every score. Then one for each step of the recall, evenly thinned; the
        last is the lowest score.
        """
        steps = np.flatnonzero(self.cuts)
        rises = np.diff(self.hits[steps], prepend=0) > 0
        rises[-1:] = True
        steps = steps[rises]
        if len(steps) > most - 1:
            steps = steps[np.linspace(0, len(steps) - 1, most - 1).round().astype(int)]
        columns = {
            "threshold": np.append(1.0, self.scores[steps]),
            "precision": np.append(np.nan, self.precision[steps]),
            "recall": np.append(0 / (self.guns or np.nan), self.recall[steps]),
            "false_positives_per_negative": np.append(
                0 / (self.judged or np.nan), self.fppi[steps]
            ),
        }
        return [
            {
                name: None if np.isnan(value) else round(float(value), 5)
                for name, value in zip(columns, row, strict=True)
            }
            for row in zip(*columns.values(), strict=True)
        ]
