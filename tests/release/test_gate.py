"""A policy as a whole; what keeps two evaluations from being compared."""

from dataclasses import replace
from typing import Any

import pytest

from gun_detection.database.models import Evaluation, GateDecision
from gun_detection.errors import ReleaseError
from gun_detection.evaluation.samples import Sample
from gun_detection.release.gate import (
    explain,
    judge,
    open_questions,
    passes,
    require_same_data,
)
from gun_detection.release.policy import Policy, load_policy
from gun_detection.release.rules import Canary, Case
from gun_detection.release.verdict import Outcome
from tests.evaluation.conftest import GUN, OTHER, picture, sample
from tests.release.conftest import case, measured, pictures


def outcome(on: Case, policy: str = "standard") -> bool:
    return passes(judge(on, load_policy(policy)))


def test_standard_lets_a_good_first_champion_in_and_a_bad_one_not() -> None:
    assert outcome(case(pictures(60, 0.9)))
    assert not outcome(case(pictures(60, 0.2)))
    assert not outcome(case(pictures(60, 0.9, gun_free=20, alarms=0.9)))
    assert not outcome(case(pictures(60, 0.9, gun_free=0))), "false alarms are not known"
    assert not outcome(case(pictures(10, 0.9))), "ten pictures say too little"


def test_standard_lets_a_better_candidate_in_and_a_worse_one_not() -> None:
    assert outcome(case(pictures(100, 0.95), pictures(100, 0.7)))
    assert not outcome(case(pictures(100, 0.7), pictures(100, 0.95)))
    assert not outcome(case(pictures(100, 0.78, seed=1), pictures(100, 0.8, seed=2)))


@pytest.mark.parametrize("policy", ["standard", "trial"])
def test_no_policy_lets_another_file_than_the_measured_one_in(policy: str) -> None:
    samples = pictures(60, 0.9)
    assert outcome(case(samples), policy)
    for canary in (Canary(error="damaged"), Canary(difference=0.5, compared=9)):
        assert not outcome(case(samples, canary=canary), policy)


def test_trial_lets_a_barely_trained_model_in() -> None:
    assert outcome(case(pictures(4, 0.0), canary=Canary()), "trial")
    assert not outcome(case(pictures(60, 0.1), pictures(60, 0.9)), "trial")


def test_a_policy_of_which_nothing_could_be_judged_lets_nobody_in() -> None:
    text = "rules: [{kind: at_least, metric: ap50, limit: 0, without_data: allow}]"
    assert not passes(judge(case(pictures(3, 1.0)), Policy.parse("lax", text)))


def marked(unsure: int, alarms: int, missed: int = 0) -> list[Sample]:
    """A hundred pictures with a gun, `unsure` marks of which score 0.55, and sixty without one,
    `alarms` of which have such a mark."""
    scores = [0.0] * missed + [0.55] * unsure + [0.9] * (100 - missed - unsure)
    guns = [picture([GUN], *([(GUN, score)] if score else [])) for score in scores]
    free = [picture([], *([(OTHER, 0.55)] if index < alarms else [])) for index in range(60)]
    return [sample(row, str(index)) for index, row in enumerate(guns + free)]


def at_thresholds(
    candidate: float, champion: float, samples: list[Sample], before: list[Sample] | None = None
) -> Case:
    return Case(
        replace(measured(samples), threshold=candidate),
        replace(measured(before or samples), threshold=champion),
        Canary(difference=0.0, compared=8),
    )


@pytest.mark.parametrize(
    ("thresholds", "lost", "gained"),
    [
        ((0.6, 0.5), "recall not clearly worse", "false positives per gun-free picture better"),
        ((0.5, 0.6), "false positives per gun-free picture not clearly worse", "recall better"),
    ],
)
def test_another_operating_point_of_the_same_weights_is_for_a_person(
    thresholds: tuple[float, float], lost: str, gained: str
) -> None:
    verdicts = judge(at_thresholds(*thresholds, marked(10, 20)), load_policy("standard"))
    assert passes(verdicts)
    [traded] = [verdict for verdict in verdicts if verdict.outcome is Outcome.OPEN]
    assert (traded.rule, traded.blocks) == (lost, False)
    said = open_questions(verdicts)
    assert said is not None
    assert f"a trade: {gained} by " in said


@pytest.mark.parametrize(
    "on",
    [
        at_thresholds(0.6, 0.5, marked(10, 0)),
        at_thresholds(0.5, 0.6, marked(0, 20)),
        at_thresholds(0.5, 0.5, marked(0, 20, missed=10), marked(0, 0)),
        # Fewer false alarms, for guns that no threshold finds again.
        at_thresholds(0.5, 0.5, marked(0, 0, missed=10), marked(0, 20)),
        replace(at_thresholds(0.6, 0.5, marked(10, 20)), canary=Canary(error="damaged")),
    ],
    ids=["recall alone", "alarms alone", "both", "average precision", "another rule"],
)
def test_a_loss_that_buys_nothing_is_no_trade(on: Case) -> None:
    verdicts = judge(on, load_policy("standard"))
    assert not passes(verdicts)
    assert open_questions(verdicts) is None


def test_without_average_precision_nobody_knows_a_trade_from_a_loss() -> None:
    guards = ("recall", "false_positives_per_negative")
    rules = [f"{{kind: not_clearly_worse, metric: {name}}}" for name in guards]
    on = at_thresholds(0.6, 0.5, marked(10, 20))
    for more, passed in (([], False), (["{kind: not_worse, metric: ap, margin: 0}"], True)):
        policy = Policy.parse("mine", f"rules: [{', '.join(rules + more)}]")
        assert passes(judge(on, policy)) is passed


def evaluation(**values: Any) -> Evaluation:
    same = {"dataset_id": "d", "holdout_id": "h", "split": "holdout", "evaluator_version": "1"}
    return Evaluation(model_id="m", **(same | values))


@pytest.mark.parametrize("name", ["dataset_id", "holdout_id", "split", "evaluator_version"])
def test_other_data_or_code_cannot_be_compared(name: str) -> None:
    require_same_data(evaluation(), evaluation())
    with pytest.raises(ReleaseError, match=name):
        require_same_data(evaluation(), evaluation(**{name: "other"}))


def test_a_rejection_says_what_kept_the_candidate_out() -> None:
    verdicts = judge(case(pictures(60, 0.2)), load_policy("standard"))
    decision = GateDecision(
        candidate_id="m", passed=False, rules=[v.model_dump(mode="json") for v in verdicts]
    )
    text = explain(decision)
    assert text.startswith("m is rejected — AP50: ")
    assert "FAILED" in text
    assert "false positives" not in text, "what passed is not why"
