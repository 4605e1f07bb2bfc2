import numpy as np
import pytest

from gun_detection.evaluation.bootstrap import average_precisions, draw_weights, interval
from gun_detection.evaluation.metrics import average_precision
from tests.evaluation.conftest import random_pictures


@pytest.mark.parametrize("seed", range(4))
def test_the_formula_agrees_with_the_coco_evaluator(seed: int) -> None:
    pictures = random_pictures(60, seed)
    expected = average_precision(pictures)
    everything = np.ones(len(pictures), dtype=np.int64)
    for name, function in average_precisions(pictures).items():
        assert function(everything) == pytest.approx(expected[name], abs=1e-6), name


def test_a_weight_of_two_is_the_picture_twice() -> None:
    pictures = random_pictures(20)
    weights = np.ones(20, dtype=np.int64)
    weights[3], weights[4] = 2, 0
    twice = [p for i, p in enumerate(pictures) if i != 4] + [pictures[3]]
    expected = average_precision(twice)
    assert average_precisions(pictures)["ap"](weights) == pytest.approx(expected["ap"], abs=1e-3)


def test_groups_are_drawn_together() -> None:
    weights = draw_weights(["a", "a", "b", "c"], 50)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()
    assert len(np.unique(weights, axis=0)) > 5


def test_an_interval_needs_something_to_measure_in_most_resamples() -> None:
    assert interval(np.array([np.nan, np.nan, 1.0])) is None
    assert interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
