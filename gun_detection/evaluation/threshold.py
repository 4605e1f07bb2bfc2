"""The operating threshold: chosen on validation pictures for a stated target."""

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gun_detection.evaluation.curves import Curve
from gun_detection.evaluation.matching import Matched

# Below this number of pictures a rate of false positives is not known well enough.
_MIN_PICTURES = 20
# Where nothing is known; the middle of the scale.
_DEFAULT = 0.5


class OperatingTarget(BaseModel):
    """What a threshold is chosen for.

    `fppi`: the best recall with at most `value` false positives per gun-free picture;
    `precision`: the best recall with at least that precision; `f1`: the best F1;
    `fixed`: `value` itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["fppi", "precision", "f1", "fixed"] = Field(
        "fppi", description="`fppi`, `precision`, `f1` or `fixed`."
    )
    value: float = Field(
        0.05, ge=0, description="False positives per gun-free picture, precision or threshold."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind in ("precision", "fixed") and self.value > 1:
            raise ValueError(f"a {self.kind} lies between 0 and 1, not at {self.value}")
        return self


class OperatingPoint(BaseModel):
    """A threshold, for which target, and what it gave on the pictures that it was chosen with.

    `note` says why the target could not be followed, where it could not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float
    target: OperatingTarget
    recall: float | None
    precision: float | None
    fppi: float | None
    negatives: int
    note: str = ""


def choose_threshold(pictures: Sequence[Matched], target: OperatingTarget) -> OperatingPoint:
    """The lowest threshold that keeps the target (for `f1` the one where F1 is best).

    Without enough gun-free pictures for `fppi`, marks that touch no gun, on all pictures, stand for
    false positives on gun-free ones; without enough pictures F1 decides. `note` says so.
    """
    if target.kind == "fixed":
        return _point(pictures, target.value, target)
    negatives = sum(p.negative for p in pictures)
    few = target.kind == "fppi" and negatives < _MIN_PICTURES
    curve = Curve(pictures, everywhere=few)
    if not curve.guns or not curve.hits.any():
        return _point(pictures, _DEFAULT, target, "nothing was found: no threshold can be chosen")
    if target.kind == "f1":
        return _point(pictures, _best_f1(curve), target)
    note = ""
    if few:
        note = (
            f"only {negatives} gun-free pictures, {_MIN_PICTURES} are needed to judge false "
            "positives on them: "
        )
        if len(pictures) < _MIN_PICTURES:
            return _point(pictures, _best_f1(curve), target, note + "chosen for the best F1")
        note += f"marks that touch no gun on all {len(pictures)} pictures stand for these"
    cut = _lowest(curve, target)
    if cut is None:
        note = "no threshold keeps the target: chosen for the best F1"
        return _point(pictures, _best_f1(curve), target, note)
    return _point(pictures, cut, target, note)


def _best_f1(curve: Curve) -> float:
    return _below(curve, int(np.argmax(np.where(curve.cuts, curve.f1, -1.0))))


def _lowest(curve: Curve, target: OperatingTarget) -> float | None:
    good = curve.fppi <= target.value if target.kind == "fppi" else curve.precision >= target.value
    last = np.flatnonzero(good & curve.cuts & (curve.hits > 0))
    return _below(curve, int(last[-1])) if len(last) else None


def _below(curve: Curve, index: int) -> float:
    """Half-way to the next lower score, so that this detection stays in."""
    score = float(curve.scores[index])
    following = float(curve.scores[index + 1]) if index + 1 < len(curve.scores) else 0.0
    middle = (score + following) / 2
    short = round(middle, 4)
    return short if following < short <= score else middle


def _point(
    pictures: Sequence[Matched], threshold: float, target: OperatingTarget, note: str = ""
) -> OperatingPoint:
    counts = np.array([p.counts(threshold) for p in pictures], dtype=np.int64).reshape(-1, 2)
    negative: NDArray[np.bool_] = np.array([p.negative for p in pictures], dtype=bool)
    hits, total = int(counts[:, 0].sum()), sum(len(p.truth) for p in pictures)
    marks, negatives = int(counts.sum()), int(negative.sum())
    return OperatingPoint(
        threshold=threshold,
        target=target,
        recall=hits / total if total else None,
        precision=hits / marks if marks else None,
        fppi=int(counts[negative, 1].sum()) / negatives if negatives else None,
        negatives=negatives,
        note=note,
    )
