"""A policy as a whole; what keeps two evaluations from being compared."""

from typing import Any

import pytest

from gun_detection.database.models import Evaluation, GateDecision
from gun_detection.errors import ReleaseError
from gun_detection.release.gate import explain, judge, passes, require_same_data
from gun_detection.release.policy import Policy, load_policy
from gun_detection.release.rules import Canary, Case
from tests.release.conftest import case, pictures


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
