"""Candidates and champions as they were measured, without a detector."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gun_detection.evaluation.matching import Matched
from gun_detection.evaluation.metrics import compute_metrics
from gun_detection.evaluation.samples import Sample
from gun_detection.release.rules import Canary, Case, Measured
from tests.evaluation.conftest import GUN, OTHER, picture, sample

THRESHOLD = 0.5


def pictures(
    count: int, found: float, gun_free: int = 20, alarms: float = 0.0, seed: int = 0
) -> list[Sample]:
    """`count` pictures with a gun, a share `found` of them right; gun-free ones with `alarms`."""
    random = np.random.default_rng(seed)
    right = random.permutation(count) < round(count * found)
    samples = [
        sample(picture([GUN], (GUN if hit else OTHER, 0.9)), f"gun-{index}")
        for index, hit in enumerate(right)
    ]
    rows: list[Matched] = [
        picture([], *([(OTHER, 0.8)] if index < round(gun_free * alarms) else []))
        for index in range(gun_free)
    ]
    return samples + [sample(row, f"free-{index}") for index, row in enumerate(rows)]


def measured(samples: Sequence[Sample], model_id: str = "candidate", **changes: Any) -> Measured:
    matched = [item.matched for item in samples]
    metrics = compute_metrics(matched, THRESHOLD, [item.group for item in samples])
    numbers = metrics.model_dump(mode="json") | {"milliseconds_per_image": 10.0, "device": "cpu"}
    size = int(changes.pop("weights_bytes", 1000))
    network = {"architecture": changes.pop("architecture", "resnet18_fpn")}
    return Measured(model_id, network, THRESHOLD, numbers | changes, samples, size)


def case(
    candidate: Sequence[Sample],
    champion: Sequence[Sample] | None = None,
    canary: Canary | None = None,
) -> Case:
    return Case(
        measured(candidate),
        None if champion is None else measured(champion, "champion"),
        canary or Canary(difference=0.0, compared=8),
    )
