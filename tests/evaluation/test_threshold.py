import pytest
from pydantic import ValidationError

from gun_detection.evaluation.threshold import OperatingTarget, choose_threshold
from tests.evaluation.conftest import GUN, OTHER, picture

F1 = OperatingTarget(kind="f1")
# Forty gun-free pictures, of which two alarm, and guns that are found with falling scores.
PICTURES = [
    *[picture([]) for _ in range(38)],
    picture([], (OTHER, 0.8)),
    picture([], (OTHER, 0.3)),
    *[picture([GUN], (GUN, score)) for score in (0.9, 0.85, 0.7, 0.5, 0.2)],
]


def test_f1_separates_guns_from_the_rest() -> None:
    pictures = [
        picture([GUN], (GUN, 0.9), (OTHER, 0.3)),
        picture([OTHER], (OTHER, 0.7)),
        picture([], (GUN, 0.4)),
    ]
    point = choose_threshold(pictures, F1)
    assert 0.4 < point.threshold < 0.7
    assert (point.recall, point.precision, point.fppi) == (1, 1, 0)


@pytest.mark.parametrize(
    ("budget", "low", "high", "recall"),
    [(0.0, 0.8, 0.85, 0.4), (0.025, 0.3, 0.5, 0.8), (0.05, 0.0, 0.2, 1.0)],
)
def test_the_best_recall_within_a_budget_of_false_positives(
    budget: float, low: float, high: float, recall: float
) -> None:
    point = choose_threshold(PICTURES, OperatingTarget(kind="fppi", value=budget))
    assert low < point.threshold < high
    assert point.recall == pytest.approx(recall)
    assert point.fppi is not None
    assert point.fppi <= budget
    assert point.note == ""


def test_a_detector_that_is_always_sure_keeps_its_guns() -> None:
    pictures = [
        *[picture([], (OTHER, 0.99996)) for _ in range(30)],
        *[picture([GUN], (GUN, 0.99999)) for _ in range(5)],
    ]
    point = choose_threshold(pictures, OperatingTarget(kind="fppi", value=0.0))
    assert 0.99996 < point.threshold <= 0.99999
    assert point.recall == 1


def test_the_best_recall_at_a_precision() -> None:
    point = choose_threshold(PICTURES, OperatingTarget(kind="precision", value=0.8))
    assert point.precision is not None
    assert point.precision >= 0.8
    assert point.recall == pytest.approx(0.8)


def test_with_few_gun_free_pictures_marks_away_from_guns_count_on_all() -> None:
    beside = [GUN[0] + 1, GUN[1] + 1, GUN[2] + 60, GUN[3] + 60]
    pictures = [
        *[picture([]) for _ in range(5)],
        *[picture([GUN], (GUN, 0.9), (beside, 0.85)) for _ in range(30)],
        *[picture([GUN], (GUN, 0.7), (OTHER, 0.4)) for _ in range(4)],
        picture([GUN], (GUN, 0.3)),
    ]
    point = choose_threshold(pictures, OperatingTarget(value=0.05))
    assert "only 5 gun-free pictures" in point.note
    assert "on all 40 pictures" in point.note
    assert 0.4 < point.threshold < 0.7, "four strays in forty pictures are over the budget"
    assert choose_threshold(pictures, OperatingTarget(value=0.1)).threshold < 0.3


def test_with_few_pictures_at_all_f1_decides() -> None:
    point = choose_threshold(PICTURES[30:], OperatingTarget())
    assert "only 10 gun-free pictures" in point.note
    assert "best F1" in point.note
    assert point.threshold == choose_threshold(PICTURES[30:], F1).threshold


def test_a_target_that_cannot_be_kept_is_said() -> None:
    pictures = [picture([GUN], (OTHER, 0.9)), picture([GUN], (GUN, 0.8))]
    point = choose_threshold(pictures, OperatingTarget(kind="precision", value=0.9))
    assert "no threshold keeps the target" in point.note


def test_a_fixed_threshold_stays() -> None:
    assert choose_threshold(PICTURES, OperatingTarget(kind="fixed", value=0.7)).threshold == 0.7


@pytest.mark.parametrize("truth", [[], [OTHER]])
def test_without_anything_to_choose_by_it_is_a_half(truth: list[list[float]]) -> None:
    point = choose_threshold([picture(truth, (GUN, 0.9))], F1)
    assert point.threshold == 0.5
    assert point.note


def test_no_pictures() -> None:
    assert choose_threshold([], F1).threshold == 0.5


def test_a_precision_above_one_is_refused() -> None:
    with pytest.raises(ValidationError, match="between 0 and 1"):
        OperatingTarget(kind="precision", value=1.5)
