"""The rules of the gate: each looks at one number of a candidate and says what came of it.

A policy (`release.policy`) is a list of rules as data. A new kind is one more class here, and one
more name in `Rule`. Differences are turned so that more is better, whatever the number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from gun_detection.evaluation.bootstrap import Interval
from gun_detection.evaluation.compare import resample_both
from gun_detection.evaluation.samples import Sample
from gun_detection.evaluation.slices import PICTURE_SLICES
from gun_detection.release.verdict import Outcome, Verdict

METRICS = {
    "ap50": "AP50",
    "ap75": "AP75",
    "ap": "AP",
    "precision": "precision",
    "recall": "recall",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "false_positives_per_negative": "false positives per gun-free picture",
    "calibration_error": "calibration error",
}
COSTS = {"milliseconds_per_image": "time per picture", "weights_bytes": "size of the weights"}

Measure = Literal[
    "ap50",
    "ap75",
    "ap",
    "precision",
    "recall",
    "sensitivity",
    "specificity",
    "false_positives_per_negative",
]
_LESS_IS_BETTER = {"false_positives_per_negative", "calibration_error"}
_OF_GUN_FREE = {"false_positives_per_negative", "specificity"}


@dataclass(frozen=True)
class Measured:
    """A model with its recorded evaluation: numbers as stored, and picture by picture.

    `network` is its `DetectorConfig` as recorded.
    """

    model_id: str
    network: Mapping[str, Any]
    threshold: float
    metrics: Mapping[str, Any]
    samples: Sequence[Sample]
    weights_bytes: int


@dataclass(frozen=True)
class Canary:
    """What a fresh process found on loading the stored model; `error` when it could not.

    `difference` is the largest one of a score (0 to 1) from the recorded evaluation, over
    `compared` detections.
    """

    difference: float | None = None
    compared: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Case:
    """All that a decision rests on; there is no `champion` for a first candidate."""

    candidate: Measured
    champion: Measured | None
    canary: Canary


class _Rule(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    without_data: Literal["reject", "allow"] = Field(
        "reject", description="What to do where there is too little to judge by."
    )

    def verdict(
        self,
        rule: str,
        outcome: Outcome,
        limit: float,
        value: float | None = None,
        interval: Interval | None = None,
        *,
        at_most: bool = False,
        note: str = "",
    ) -> Verdict:
        blocks = outcome is Outcome.FAILED or (
            outcome is Outcome.INSUFFICIENT and self.without_data == "reject"
        )
        # Adding zero makes a negative zero a plain one.
        return Verdict(
            rule=rule,
            value=None if value is None else value + 0.0,
            interval=None if interval is None else (interval[0] + 0.0, interval[1] + 0.0),
            limit=limit + 0.0,
            at_most=at_most,
            outcome=outcome,
            blocks=blocks,
            note=note,
        )


class _Limit(_Rule):
    """A number of the candidate alone."""

    limit: float
    minimum_pictures: int = Field(
        30, ge=0, description="Independent pictures that it must rest on: fewer say too little."
    )

    def _judge(self, metric: str, case: Case, *, at_most: bool) -> Verdict:
        name, value = METRICS[metric], case.candidate.metrics[metric]
        span = case.candidate.metrics["intervals"].get(metric)
        interval = (span[0], span[1]) if span else None
        enough, note = _enough(case.candidate.samples, metric, self.minimum_pictures)
        if value is None or not enough:
            outcome = Outcome.INSUFFICIENT
        else:
            good = value <= self.limit if at_most else value >= self.limit
            outcome = Outcome.PASSED if good else Outcome.FAILED
        return self.verdict(name, outcome, self.limit, value, interval, at_most=at_most, note=note)


class AtLeast(_Limit):
    """A floor."""

    kind: Literal["at_least"]
    metric: Measure

    def judge(self, case: Case) -> Verdict:
        return self._judge(self.metric, case, at_most=False)


class AtMost(_Limit):
    """A budget."""

    kind: Literal["at_most"]
    metric: Measure | Literal["calibration_error"]

    def judge(self, case: Case) -> Verdict:
        return self._judge(self.metric, case, at_most=True)


class _Comparison(_Rule):
    """Against the champion on the same pictures, by the paired bootstrap over groups.

    The bound is one-sided: with a confidence of 0.95 it is the 5th (or 95th) percentile of the
    difference over the resamples (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993).
    """

    metric: Measure
    margin: float = Field(0.0, ge=0)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    minimum_pictures: int = Field(30, ge=0)

    def _judge(
        self,
        case: Case,
        says: str,
        limit: float,
        decide: Callable[[float, Interval], tuple[bool, str]],
    ) -> Verdict:
        """`decide` gives (good, note) of a difference, where more is better, and its bounds."""
        name, champion = f"{METRICS[self.metric]} {says}", case.champion
        if champion is None:
            return _first(self, name, limit)
        value, bounds = _difference(
            champion.samples,
            case.candidate.samples,
            (champion.threshold, case.candidate.threshold),
            self.metric,
            self.confidence,
        )
        enough, note = _enough(case.candidate.samples, self.metric, self.minimum_pictures)
        if value is None or bounds is None or not enough:
            return self.verdict(name, Outcome.INSUFFICIENT, limit, value, bounds, note=note)
        good, note = decide(value, bounds)
        outcome = Outcome.PASSED if good else Outcome.FAILED
        return self.verdict(name, outcome, limit, value, bounds, note=note)


class NotWorse(_Comparison):
    """Non-inferiority: shown not to be worse than the champion by more than `margin`.

    `measured`: what was measured must not be worse than this either, or many small steps down,
    each within the margin, would add up over the nights.
    """

    kind: Literal["not_worse"]
    margin: float = Field(ge=0)
    measured: float = 0.0

    def judge(self, case: Case) -> Verdict:
        def decide(value: float, bounds: Interval) -> tuple[bool, str]:
            if bounds[0] < -self.margin:
                return False, f"not shown to be within {self.margin:g}"
            if value < self.measured:
                return False, f"measured below {self.measured:g}"
            return True, ""

        return self._judge(case, "against the champion", -self.margin, decide)


class Better(_Comparison):
    """Superiority: shown to be better than the champion by more than `margin`."""

    kind: Literal["better"]

    def judge(self, case: Case) -> Verdict:
        return self._judge(
            case,
            "better than the champion",
            self.margin,
            lambda _, bounds: (bounds[0] > self.margin, ""),
        )


class NotClearlyWorse(_Comparison):
    """A guard: fails only where the candidate is shown to be worse by more than `margin`."""

    kind: Literal["not_clearly_worse"]
    without_data: Literal["reject", "allow"] = "allow"

    def judge(self, case: Case) -> Verdict:
        return self._judge(
            case,
            "not clearly worse",
            -self.margin,
            lambda _, bounds: (bounds[1] >= -self.margin, ""),
        )


class Slices(_Rule):
    """The same guard on every slice of a property that has enough guns; the worst is shown.

    Confidence is shared among the slices (Bonferroni): many slices, many chances of bad luck.
    Guns of one scene are one chance: resamples of a few groups are all alike, and look certain.
    """

    kind: Literal["slices"]
    property: Literal["source", "number of guns", "brightness", "sharpness", "aspect"]
    metric: Literal["ap50", "recall"] = "ap50"
    margin: float = Field(0.05, ge=0)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    minimum_guns: int = Field(20, ge=1)
    minimum_pictures: int = Field(10, ge=1, description="Independent ones with a gun.")
    without_data: Literal["reject", "allow"] = "allow"

    def judge(self, case: Case) -> Verdict:
        name, limit = f"{METRICS[self.metric]} by {self.property}", -self.margin
        champion = case.champion
        if champion is None:
            return _first(self, name, limit)
        parts: dict[str, list[int]] = {}
        for index, sample in enumerate(case.candidate.samples):
            parts.setdefault(PICTURE_SLICES[self.property](sample), []).append(index)
        judged = {value: part for value, part in parts.items() if self._has_enough(case, part)}
        left = ", ".join(sorted(value for value in parts if value not in judged))
        note = f"too few guns or independent pictures in: {left}" if left else ""
        if not judged:
            return self.verdict(name, Outcome.INSUFFICIENT, limit, note=note)
        confidence = 1 - (1 - self.confidence) / len(judged)
        rows = []
        for value, part in judged.items():
            both = [[m.samples[i] for i in part] for m in (champion, case.candidate)]
            thresholds = champion.threshold, case.candidate.threshold
            found = _difference(both[0], both[1], thresholds, self.metric, confidence)
            if found[0] is not None and found[1] is not None:
                rows.append((found[1][1], found[0], found[1], value))
        if not rows:
            return self.verdict(name, Outcome.INSUFFICIENT, limit, note=note)
        upper, difference, bounds, worst = min(rows)
        outcome = Outcome.PASSED if upper >= limit else Outcome.FAILED
        note = f"worst: {worst}" + (f"; {note}" if note else "")
        return self.verdict(name, outcome, limit, difference, bounds, note=note)

    def _has_enough(self, case: Case, part: list[int]) -> bool:
        samples = [case.candidate.samples[i] for i in part]
        guns = sum(len(sample.matched.truth) for sample in samples)
        groups = {sample.group for sample in samples if not sample.matched.negative}
        return guns >= self.minimum_guns and len(groups) >= self.minimum_pictures


class TimesChampion(_Rule):
    """What the candidate costs, as a multiple of the champion's.

    Whoever chose another network may have meant to pay for it: a person decides then.
    """

    kind: Literal["times_champion"]
    cost: Literal["milliseconds_per_image", "weights_bytes"]
    limit: float = Field(gt=0)
    without_data: Literal["reject", "allow"] = "allow"

    def judge(self, case: Case) -> Verdict:
        name, champion = f"{COSTS[self.cost]}, times the champion's", case.champion
        if champion is None:
            return _first(self, name, self.limit, at_most=True)
        timed = self.cost == "milliseconds_per_image"
        devices = [m.metrics.get("device") for m in (case.candidate, champion)]
        if timed and devices[0] != devices[1]:
            note = f"measured on {devices[0]} and {devices[1]}"
            return self.verdict(name, Outcome.INSUFFICIENT, self.limit, at_most=True, note=note)
        costs = [
            float(m.metrics[self.cost]) if timed else float(m.weights_bytes)
            for m in (case.candidate, champion)
        ]
        value, note = costs[0] / max(costs[1], 1e-9), ""
        outcome = Outcome.PASSED if value <= self.limit else Outcome.FAILED
        if outcome is Outcome.FAILED and case.candidate.network != champion.network:
            outcome = Outcome.OPEN
            note = f"another network than the champion's, which costs {value:.1f} times as much"
        return self.verdict(name, outcome, self.limit, round(value, 3), at_most=True, note=note)


class StoredModel(_Rule):
    """The canary: the stored model, loaded anew, gives the scores that were evaluated."""

    kind: Literal["stored_model"]
    limit: float = Field(0.02, ge=0, le=1, description="Largest difference of a score.")

    def judge(self, case: Case) -> Verdict:
        name, canary = "scores of the stored model, difference from those evaluated", case.canary
        if canary.error is not None:
            return self.verdict(name, Outcome.FAILED, self.limit, at_most=True, note=canary.error)
        if canary.difference is None:
            note = "the model found nothing in any picture"
            return self.verdict(name, Outcome.INSUFFICIENT, self.limit, at_most=True, note=note)
        outcome = Outcome.PASSED if canary.difference <= self.limit else Outcome.FAILED
        return self.verdict(
            name,
            outcome,
            self.limit,
            round(canary.difference, 5),
            at_most=True,
            note=f"{canary.compared} detections compared",
        )


Rule = Annotated[
    AtLeast | AtMost | NotWorse | Better | NotClearlyWorse | Slices | TimesChampion | StoredModel,
    Field(discriminator="kind"),
]


def _first(rule: _Rule, name: str, limit: float, *, at_most: bool = False) -> Verdict:
    note = "there is no champion to compare with"
    return rule.verdict(name, Outcome.NOT_APPLICABLE, limit, at_most=at_most, note=note)


def _enough(samples: Sequence[Sample], metric: str, minimum: int) -> tuple[bool, str]:
    """Whether a number rests on enough independent pictures, and what to do if not."""
    gun_free = metric in _OF_GUN_FREE
    if metric == "calibration_error":
        groups = {sample.group for sample in samples}
    else:
        groups = {sample.group for sample in samples if sample.matched.negative == gun_free}
    if len(groups) >= minimum:
        return True, ""
    kind = "gun-free holdout pictures" if gun_free else "holdout pictures"
    return False, f"{len(groups)} independent {kind} of {minimum} needed: add some"


def _difference(
    champion: Sequence[Sample],
    candidate: Sequence[Sample],
    thresholds: tuple[float, float],
    metric: str,
    confidence: float,
) -> tuple[float | None, Interval | None]:
    """(difference, its one-sided bounds), turned so that more is better; `None`: not known."""
    paired = resample_both(champion, candidate, thresholds, {metric})
    sign = -1.0 if metric in _LESS_IS_BETTER else 1.0
    value = sign * (paired.second[metric] - paired.first[metric])
    known = sign * paired.spread[metric][np.isfinite(paired.spread[metric])]
    if np.isnan(value) or len(known) < len(paired.spread[metric]) / 2:
        return None, None
    low, high = np.quantile(known, [1 - confidence, confidence])
    return round(value, 4), (round(float(low), 4), round(float(high), 4))
