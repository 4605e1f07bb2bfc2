import numpy as np
import pytest

from gun_detection.evaluation.curves import Curve
from gun_detection.evaluation.metrics import compute_metrics
from tests.evaluation.conftest import GUN, OTHER, picture, random_pictures


def test_a_point_is_what_the_metrics_say_at_its_threshold() -> None:
    pictures = random_pictures(60)
    points = Curve(pictures).points()
    assert points[0] == {
        "threshold": 1.0,
        "precision": None,
        "recall": 0.0,
        "false_positives_per_negative": 0.0,
    }
    for point in points[1::30]:
        # Rounding may put the threshold above its own mark.
        metrics = compute_metrics(pictures, (point["threshold"] or 0.0) - 1e-5)
        for name in ("precision", "recall", "false_positives_per_negative"):
            assert point[name] == pytest.approx(getattr(metrics, name), abs=1e-5)


def test_there_is_a_point_for_each_gun_that_is_found_and_one_for_all_marks() -> None:
    pictures = [
        picture([GUN, OTHER], (GUN, 0.9), (OTHER, 0.4)),
        picture([], (GUN, 0.8), (OTHER, 0.7), (GUN, 0.1)),
        picture([]),
    ]
    rows = [tuple(point.values()) for point in Curve(pictures).points()]
    assert rows == [
        (1.0, None, 0.0, 0.0),
        (0.9, 1.0, 0.5, 0.0),
        (0.4, 0.5, 1.0, 1.0),
        (0.1, 0.4, 1.0, 1.5),
    ]


def test_tied_scores_are_one_point() -> None:
    pictures = [picture([GUN], (GUN, 0.5)), picture([GUN], (GUN, 0.5)), picture([], (GUN, 0.5))]
    assert [point["recall"] for point in Curve(pictures).points()] == [0, 1]


def test_many_points_are_thinned_and_keep_both_ends() -> None:
    curve = Curve([picture([GUN], (GUN, score)) for score in np.linspace(0.99, 0.01, 1000)])
    points = curve.points(101)
    assert len(points) == 101
    assert [points[0]["recall"], points[1]["recall"], points[-1]["recall"]] == [0, 0.001, 1]


@pytest.mark.parametrize("pictures", [[], [picture([])], [picture([], (GUN, 0.5))]])
def test_without_a_gun_there_is_no_recall(pictures: list[object]) -> None:
    assert {point["recall"] for point in Curve(pictures).points()} == {None}  # type: ignore[arg-type]
