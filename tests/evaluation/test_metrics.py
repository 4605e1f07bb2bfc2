import numpy as np
import pytest

from gun_detection.evaluation.matching import match_all
from gun_detection.evaluation.metrics import calibration_error, compute_metrics
from tests.evaluation.conftest import GUN, NONE, OTHER, found, picture


def test_perfect_detections() -> None:
    metrics = compute_metrics([picture([GUN], (GUN, 0.9)), picture([])], 0.5)
    assert (metrics.ap, metrics.ap50, metrics.ap75) == pytest.approx((1, 1, 1))
    assert (metrics.precision, metrics.recall) == (1, 1)
    assert metrics.false_positives_per_negative == 0
    assert (metrics.sensitivity, metrics.specificity) == (1, 1)
    assert metrics.recall_at_fppi == {"0.01": 1, "0.1": 1, "1.0": 1}
    assert (metrics.images, metrics.boxes, metrics.negatives) == (2, 1, 1)
    assert metrics.ap_large is None


def test_a_loose_box_counts_at_half_overlap_only() -> None:
    metrics = compute_metrics([picture([GUN], ([10.0, 10.0, 60.0, 55.0], 0.9))], 0.5)
    assert metrics.ap50 == pytest.approx(1)
    assert metrics.ap75 == pytest.approx(0)


def test_a_second_mark_on_a_gun_is_a_false_positive() -> None:
    metrics = compute_metrics([picture([GUN], (GUN, 0.9), (GUN, 0.8))], 0.5)
    assert (metrics.precision, metrics.recall) == (0.5, 1)


def test_false_alarms_count_above_the_threshold_on_gun_free_pictures() -> None:
    alarms = picture([], (GUN, 0.9), (OTHER, 0.6), (OTHER, 0.4))
    metrics = compute_metrics([alarms, picture([])], 0.5)
    assert metrics.false_positives_per_negative == 1.0
    assert metrics.specificity == 0.5
    assert metrics.ap50 is None
    assert metrics.recall is None


def test_recall_at_a_budget_of_false_positives() -> None:
    pictures = [
        picture([GUN], (GUN, 0.9)),
        picture([GUN], (GUN, 0.3)),
        *[picture([]) for _ in range(9)],
        picture([], (OTHER, 0.5)),
    ]
    metrics = compute_metrics(pictures, 0.5)
    assert metrics.recall_at_fppi == {"0.01": 0.5, "0.1": 1.0, "1.0": 1.0}


def test_no_pictures_and_no_detections() -> None:
    nothing = compute_metrics([], 0.5)
    assert nothing.ap50 is None
    assert nothing.intervals == {}
    blind = compute_metrics([picture([GUN])], 0.5)
    assert (blind.ap50, blind.recall, blind.precision) == (pytest.approx(0), 0, None)


def test_labels_without_detections_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 pictures have labels and 1 detections"):
        match_all([NONE, NONE], [found()])


def test_every_number_has_an_interval_around_it() -> None:
    random = np.random.default_rng(0)
    pictures = [
        picture([GUN], (GUN, 0.9)) if random.random() < 0.8 else picture([GUN], (OTHER, 0.4))
        for _ in range(60)
    ] + [picture([]) for _ in range(30)]
    metrics = compute_metrics(pictures, 0.5)
    for name in ("ap50", "ap", "recall", "sensitivity"):
        low, high = metrics.intervals[name] or (0, 0)
        assert 0 < high - low < 0.3
        assert low <= getattr(metrics, name) <= high
    assert metrics.intervals["specificity"] == (1, 1)
    assert metrics.intervals["ap_large"] is None


def test_pictures_of_a_group_make_the_interval_wider() -> None:
    pictures = [picture([GUN], (GUN, 0.9)) if i % 10 < 8 else picture([GUN]) for i in range(100)]
    alone = compute_metrics(pictures, 0.5).intervals["recall"]
    grouped = compute_metrics(
        sorted(pictures, key=lambda p: len(p.found.scores)), 0.5, [str(i // 10) for i in range(100)]
    ).intervals["recall"]
    assert alone
    assert grouped
    assert grouped[1] - grouped[0] > 1.5 * (alone[1] - alone[0])


def test_calibration_error_of_scores_that_say_what_they_mean_is_zero() -> None:
    right = [picture([GUN], (GUN, 0.75)) for _ in range(3)]
    wrong = [picture([GUN], (OTHER, 0.75))]
    assert calibration_error(right + wrong) == pytest.approx(0, abs=1e-6)
    assert calibration_error(wrong) == pytest.approx(0.75, abs=1e-4)
    assert calibration_error([picture([GUN])]) is None
