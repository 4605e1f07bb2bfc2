"""How often the gate is wrong, and how often it is right: candidates whose true AP50 is known.

    python benchmarks/gate.py [--trials N] [--processes P] [--policy NAME]

Draws holdouts of 100, 300 and 1,000 pictures (a fifth without a gun) and what a champion and a
candidate say of them, and lets the policy judge. The two models are drawn from one family: a
picture's difficulty is shared by both, the rest is each model's own. How good each is in truth is
measured on 40,000 other pictures. Prints the share of candidates that pass beside the share that
passes "AP50 not below the champion's", from the same holdouts.
"""

import argparse
import multiprocessing
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gun_detection.detector.detections import Detections
from gun_detection.evaluation.bootstrap import average_precisions
from gun_detection.evaluation.matching import Matched
from gun_detection.evaluation.metrics import calibration_error, numbers_of
from gun_detection.evaluation.samples import Properties, Sample
from gun_detection.release.policy import Policy, load_policy
from gun_detection.release.rules import Canary, Case, Measured

SIZES = (100, 300, 1000)
DIFFERENCES = (-0.05, -0.03, 0.0, 0.03, 0.05)
CHAMPION = 0.80
THRESHOLD = 0.5
GUN_FREE = 0.2
# What the policies look at.
NUMBERS = {"ap50", "precision", "recall", "false_positives_per_negative"}
POPULATION = 40_000
# Small rates need many holdouts, and most of these trials end at the first rule.
MORE_IF_WORSE = 3

_GUN = np.array([10.0, 10.0, 60.0, 40.0])
_ASIDE = np.array([200.0, 200.0, 240.0, 230.0])


@dataclass(frozen=True)
class Pictures:
    """What is so whoever looks: guns in each picture, and how hard it is."""

    guns: np.ndarray
    difficulty: np.ndarray
    brightness: np.ndarray

    @classmethod
    def draw(cls, count: int, random: np.random.Generator) -> "Pictures":
        guns = random.choice([1, 2, 3], size=count, p=[0.85, 0.1, 0.05])
        guns[random.permutation(count)[: round(count * GUN_FREE)]] = 0
        return cls(guns, random.normal(size=count), random.uniform(0, 255, count))


def look(pictures: Pictures, skill: float, random: np.random.Generator) -> list[Matched]:
    """What a model of this skill says of the pictures: the easier and the abler, the surer."""
    rows = []
    for guns, difficulty in zip(pictures.guns, pictures.difficulty, strict=True):
        offsets = np.arange(guns)[:, None] * 70.0
        truth = _GUN + offsets
        # Log-odds that the box is right; a right box is scored higher.
        odds = skill - 2.0 * difficulty + random.normal(0, 1.0, guns)
        seen = random.random(guns) < 1 / (1 + np.exp(-odds))
        boxes = np.where(seen[:, None], truth, truth + 25.0)
        logits = np.where(seen, 1.0 + 0.7 * odds, -0.5) + random.normal(0, 1.0, guns)
        marks = random.poisson(0.5)
        wrong = np.repeat(_ASIDE[None], marks, axis=0) + 60.0 * np.arange(marks)[:, None]
        strays = random.normal(-2.0 + 0.3 * difficulty, 1.3, marks)
        scores = 1 / (1 + np.exp(-np.concatenate([logits, strays])))
        order = np.argsort(-scores)
        found = Detections(
            np.concatenate([boxes, wrong]).astype(np.float32)[order],
            scores.astype(np.float32)[order],
        )
        rows.append(Matched.of(truth, found))
    return rows


def true_ap50(skill: float) -> float:
    random = np.random.default_rng(1)
    matched = look(Pictures.draw(POPULATION, random), skill, random)
    return average_precisions(matched, {"ap50"})["ap50"](np.ones(POPULATION, dtype=np.int64))


def skill_for(ap50: float) -> float:
    """The skill of a model whose AP50 on the population is this, by bisection."""
    low, high = -2.0, 8.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if true_ap50(middle) < ap50 else (low, middle)
    return (low + high) / 2


def measured(name: str, pictures: Pictures, matched: list[Matched]) -> Measured:
    numbers = numbers_of(matched, THRESHOLD, NUMBERS)(np.ones(len(matched), dtype=np.int64))
    metrics: dict[str, Any] = numbers | {
        "calibration_error": calibration_error(matched),
        "intervals": {},
        "milliseconds_per_image": 100.0,
        "device": "cpu",
    }
    samples = [
        Sample(str(i), str(i), item, Properties(640, 480, brightness, 500.0, "simulated"), 0.1)
        for i, (item, brightness) in enumerate(zip(matched, pictures.brightness, strict=True))
    ]
    return Measured(name, {}, THRESHOLD, metrics, samples, 10**6)


def trial(policy: Policy, skills: tuple[float, float], size: int, seed: int) -> tuple[bool, bool]:
    """(passes the policy, AP50 is not below the champion's) on one holdout."""
    random = np.random.default_rng(seed)
    pictures = Pictures.draw(size, random)
    champion, candidate = (
        measured(name, pictures, look(pictures, skill, random))
        for name, skill in zip(("champion", "candidate"), skills, strict=True)
    )
    case = Case(candidate, champion, Canary(difference=0.0, compared=8))
    naive = bool(candidate.metrics["ap50"] >= champion.metrics["ap50"])
    # The comparison of AP50 refuses most: nothing is judged after a refusal.
    rules = sorted(policy.rules, key=lambda rule: rule.kind != "not_worse")
    return not any(rule.judge(case).blocks for rule in rules), naive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=250)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--policy", default="standard")
    arguments = parser.parse_args()
    policy = load_policy(arguments.policy)
    start = time.monotonic()
    with multiprocessing.Pool(arguments.processes) as pool:
        wanted = [CHAMPION, *(CHAMPION + difference for difference in DIFFERENCES)]
        champion, *candidates = pool.map(skill_for, wanted, chunksize=1)
        print(
            f"policy {policy.name} ({policy.version}), champion's true AP50 {CHAMPION:.2f}, "
            f"{arguments.trials} holdouts each, {MORE_IF_WORSE} times as many for the worse\n"
            "true difference | pictures | passes the gate | AP50 not below | ratio",
            flush=True,
        )
        for difference, candidate in zip(DIFFERENCES, candidates, strict=True):
            trials = arguments.trials * (MORE_IF_WORSE if difference < 0 else 1)
            for size in SIZES:
                judge = partial(trial, policy, (champion, candidate), size)
                passed = np.array(pool.map(judge, range(trials), chunksize=4))
                gate, naive = passed.mean(axis=0)
                error = 1.96 * (gate * (1 - gate) / len(passed)) ** 0.5
                ratio = f"{gate / naive:.2f}" if naive else "–"
                print(
                    f"{difference:+15.2f} | {size:8d} | {gate:6.1%} ± {error:4.1%} | "
                    f"{naive:14.1%} | {ratio}",
                    flush=True,
                )
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
