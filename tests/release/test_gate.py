from typing import Any

import pytest

from gun_detection.database.models import Evaluation
from gun_detection.errors import ReleaseError
from gun_detection.release.gate import Policy, judge

POLICY = Policy(min_ap50=0.5, max_ap50_drop=0.02)


def evaluation(ap50: float | None, **values: Any) -> Evaluation:
    same = {"dataset_id": "d", "holdout_id": "h", "split": "holdout", "evaluator_version": "1"}
    return Evaluation(model_id="m", metrics={"ap50": ap50}, **(same | values))


@pytest.mark.parametrize(
    ("candidate", "champion", "passed"),
    [
        (0.5, None, [True]),
        (0.49, None, [False]),
        (None, None, [False]),
        (0.8, 0.8, [True, True]),
        (0.79, 0.8, [True, True]),
        (0.77, 0.8, [True, False]),
        (0.4, 0.3, [False, True]),
        (0.6, None, [True]),
    ],
)
def test_floor_and_champion(
    candidate: float | None, champion: float | None, passed: list[bool]
) -> None:
    other = None if champion is None else evaluation(champion)
    rules = judge(evaluation(candidate), other, POLICY)
    assert [rule.passed for rule in rules] == passed


@pytest.mark.parametrize("name", ["dataset_id", "holdout_id", "split", "evaluator_version"])
def test_other_data_or_code_cannot_be_compared(name: str) -> None:
    with pytest.raises(ReleaseError, match=name):
        judge(evaluation(0.9), evaluation(0.8, **{name: "other"}), POLICY)


def test_a_rule_says_what_it_wanted() -> None:
    [rule] = judge(evaluation(0.4), None, POLICY)
    assert str(rule) == "AP50 floor: 0.400, needs 0.500: FAIL"
    [unmeasured] = judge(evaluation(None), None, POLICY)
    assert "nothing measured" in str(unmeasured)
