"""The same numbers on kinds of pictures and sizes of guns: where a model is weak.

Adding a slice is adding one entry to `PICTURE_SLICES`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from gun_detection.evaluation.bootstrap import (
    Interval,
    Ranked,
    draw_weights,
    interval,
    resamples_for,
)
from gun_detection.evaluation.matching import IOU, areas
from gun_detection.evaluation.samples import Sample

# Square root of a box's area over the picture's shorter side.
GUN_SIZES = {"below 0.2": (0.0, 0.2), "0.2 to 0.5": (0.2, 0.5), "above 0.5": (0.5, 1e9)}
# Resamples of one or two scenes are all but alike: their interval would look like certainty.
_LEAST_SCENES = 3


class Slice(BaseModel):
    """One value of one property. Slices of gun sizes have a recall only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    property: str
    value: str
    images: int
    boxes: int
    negatives: int
    ap50: float | None
    ap50_interval: Interval | None
    recall: float | None
    recall_interval: Interval | None
    false_positives_per_image: float | None


def _brightness(sample: Sample) -> str:
    value = sample.properties.brightness
    return "dark (below 80)" if value < 80 else "medium" if value <= 170 else "bright (above 170)"


def _sharpness(sample: Sample) -> str:
    value = sample.properties.sharpness
    return "blurred (below 300)" if value < 300 else "medium" if value <= 1500 else "sharp"


def _aspect(sample: Sample) -> str:
    ratio = sample.properties.width / sample.properties.height
    return "tall (below 0.8)" if ratio < 0.8 else "square" if ratio <= 1.25 else "wide"


def _guns(sample: Sample) -> str:
    count = len(sample.matched.truth)
    return str(count) if count < 3 else "3 or more"


PICTURE_SLICES: dict[str, Callable[[Sample], str]] = {
    "source": lambda sample: sample.properties.source or "all",
    "number of guns": _guns,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "aspect": _aspect,
}


def compute_slices(samples: Sequence[Sample], threshold: float) -> list[Slice]:
    """Every slice that has pictures, property by property."""
    found = _gun_sizes(samples, threshold)
    for name, kind in PICTURE_SLICES.items():
        parts: dict[str, list[Sample]] = {}
        for sample in samples:
            parts.setdefault(kind(sample), []).append(sample)
        found += [_slice(name, value, parts[value], threshold) for value in sorted(parts)]
    return found


def _slice(name: str, value: str, samples: Sequence[Sample], threshold: float) -> Slice:
    matched = [sample.matched for sample in samples]
    ranked = Ranked.of(matched, IOU)
    everything = np.ones(len(matched), dtype=np.int64)
    counts = np.array([picture.counts(threshold) for picture in matched])
    guns = np.array([len(picture.truth) for picture in matched])
    weights = draw_weights([sample.group for sample in samples], resamples_for(matched))
    total = int(guns.sum())
    drawn = weights @ guns
    recalls = np.where(drawn > 0, (weights @ counts[:, 0]) / np.maximum(drawn, 1), np.nan)
    precisions = [ranked.average_precision(row) for row in weights] if total else []
    enough = _scenes(samples, guns) >= _LEAST_SCENES
    return Slice(
        property=name,
        value=value,
        images=len(samples),
        boxes=total,
        negatives=int((guns == 0).sum()),
        ap50=ranked.average_precision(everything) if total else None,
        ap50_interval=interval(np.array(precisions)) if enough else None,
        recall=float(counts[:, 0].sum() / total) if total else None,
        recall_interval=interval(recalls) if enough else None,
        false_positives_per_image=float(counts[:, 1].mean()),
    )


def _scenes(samples: Sequence[Sample], guns: Sequence[int] | NDArray[np.int64]) -> int:
    """Groups with a gun among them."""
    return len({sample.group for sample, count in zip(samples, guns, strict=True) if count})


def _gun_sizes(samples: Sequence[Sample], threshold: float) -> list[Slice]:
    found = []
    for value, (low, high) in GUN_SIZES.items():
        guns, hits = [], []
        for sample in samples:
            side = min(sample.properties.width, sample.properties.height)
            size = np.sqrt(areas(sample.matched.truth)) / side
            inside = (size >= low) & (size < high)
            missed = np.zeros(len(inside), bool)
            missed[sample.matched.missed(threshold)] = True
            guns.append(int(inside.sum()))
            hits.append(int((inside & ~missed).sum()))
        total = sum(guns)
        if not total:
            continue
        matched = [sample.matched for sample in samples]
        weights = draw_weights([sample.group for sample in samples], resamples_for(matched))
        drawn = weights @ np.array(guns)
        recalls = np.where(drawn > 0, (weights @ np.array(hits)) / np.maximum(drawn, 1), np.nan)
        enough = _scenes(samples, guns) >= _LEAST_SCENES
        found.append(
            Slice(
                property="size of the gun",
                value=f"{value} of the short side",
                images=sum(count > 0 for count in guns),
                boxes=total,
                negatives=0,
                ap50=None,
                ap50_interval=None,
                recall=sum(hits) / total,
                recall_interval=interval(recalls) if enough else None,
                false_positives_per_image=None,
            )
        )
    return found
