"""Two models on the same pictures, with the interval of each difference."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from gun_detection.errors import DatasetError
from gun_detection.evaluation.bootstrap import (
    Interval,
    draw_weights,
    interval,
    resamples_for,
)
from gun_detection.evaluation.metrics import numbers_of
from gun_detection.evaluation.samples import Sample


class Difference(BaseModel):
    """One number of two models; `interval` is that of `second - first`, 95 %."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    first: float | None
    second: float | None
    difference: float | None
    interval: Interval | None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Paired:
    """Numbers of two models on the same pictures; `spread` is `second - first` by resample.

    What there is nothing of (no gun-free picture, say) is NaN.
    """

    first: dict[str, float]
    second: dict[str, float]
    spread: dict[str, NDArray[np.float64]]


def resample_both(
    first: Sequence[Sample],
    second: Sequence[Sample],
    thresholds: tuple[float, float],
    only: Collection[str] | None = None,
) -> Paired:
    """Numbers of two models at their own thresholds, by the paired bootstrap over groups.

    Both are resampled by the same pictures, so that what is hard for both cancels out.
    Raises `DatasetError` when they were not measured on the same pictures.
    """
    names = [sample.name for sample in first]
    if names != [sample.name for sample in second]:
        raise DatasetError("the two models were measured on other pictures: evaluate both again")
    both = [[sample.matched for sample in samples] for samples in (first, second)]
    functions = [
        numbers_of(matched, threshold, only)
        for matched, threshold in zip(both, thresholds, strict=True)
    ]
    ones = np.ones(len(names), dtype=np.int64)
    points = [function(ones) for function in functions]
    resamples = min(resamples_for(matched) for matched in both)
    weights = draw_weights([sample.group for sample in first], resamples)
    drawn = [[function(row) for row in weights] for function in functions]
    spread = {
        name: np.array([y[name] - x[name] for x, y in zip(*drawn, strict=True)])
        for name in points[0]
    }
    return Paired(points[0], points[1], spread)


def compare(
    first: Sequence[Sample],
    second: Sequence[Sample],
    thresholds: tuple[float, float],
) -> list[Difference]:
    """Every number of two models, each at its own threshold, with the interval of the difference.

    Raises `DatasetError` when they were not measured on the same pictures.
    """
    paired = resample_both(first, second, thresholds)
    return [
        Difference(
            name=name,
            first=_known(paired.first[name]),
            second=_known(paired.second[name]),
            difference=_known(paired.second[name] - paired.first[name]),
            interval=interval(spread),
        )
        for name, spread in paired.spread.items()
    ]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)
