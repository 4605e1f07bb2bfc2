import numpy as np
import pytest

from gun_detection.detector.inference import Detections
from gun_detection.evaluation.metrics import choose_threshold, compute_metrics
from gun_detection.evaluation.report import Picture, render_report

GUN = [10.0, 10.0, 60.0, 40.0]
OTHER = [100.0, 100.0, 140.0, 130.0]
NONE = np.zeros((0, 4))


def found(*rows: tuple[list[float], float]) -> Detections:
    boxes = np.array([box for box, _ in rows], np.float32).reshape(-1, 4)
    return Detections(boxes, np.array([score for _, score in rows], np.float32))


def test_perfect_detections() -> None:
    metrics = compute_metrics([np.array([GUN]), NONE], [found((GUN, 0.9)), found()], 0.5)
    assert (metrics.ap, metrics.ap50, metrics.ap75) == pytest.approx((1, 1, 1))
    assert (metrics.precision, metrics.recall) == (1, 1)
    assert (metrics.false_positives_per_negative, metrics.false_alarm_rate) == (0, 0)
    assert (metrics.images, metrics.boxes, metrics.negatives) == (2, 1, 1)
    assert metrics.ap_large is None


def test_a_loose_box_counts_at_half_overlap_only() -> None:
    loose = [10.0, 10.0, 60.0, 55.0]
    metrics = compute_metrics([np.array([GUN])], [found((loose, 0.9))], 0.5)
    assert metrics.ap50 == pytest.approx(1)
    assert metrics.ap75 == pytest.approx(0)


def test_a_second_mark_on_a_gun_is_a_false_positive() -> None:
    metrics = compute_metrics([np.array([GUN])], [found((GUN, 0.9), (GUN, 0.8))], 0.5)
    assert (metrics.precision, metrics.recall) == (0.5, 1)


def test_false_alarms_count_above_the_threshold_on_gun_free_pictures() -> None:
    alarms = found((GUN, 0.9), (OTHER, 0.6), (OTHER, 0.4))
    metrics = compute_metrics([NONE, NONE], [alarms, found()], 0.5)
    assert metrics.false_positives_per_negative == 1.0
    assert metrics.false_alarm_rate == 0.5
    assert metrics.ap50 is None
    assert metrics.recall is None


def test_no_pictures_and_no_detections() -> None:
    assert compute_metrics([], [], 0.5).ap50 is None
    blind = compute_metrics([np.array([GUN])], [found()], 0.5)
    assert (blind.ap50, blind.recall, blind.precision) == (pytest.approx(0), 0, None)


def test_labels_without_detections_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 pictures have labels and 1 detections"):
        compute_metrics([NONE, NONE], [found()], 0.5)


def test_the_threshold_separates_guns_from_the_rest() -> None:
    truths = [np.array([GUN]), np.array([OTHER]), NONE]
    detections = [found((GUN, 0.9), (OTHER, 0.3)), found((OTHER, 0.7)), found((GUN, 0.4))]
    assert 0.4 < choose_threshold(truths, detections) < 0.7


@pytest.mark.parametrize("truths", [[NONE], [np.array([OTHER])]])
def test_without_anything_to_choose_by_it_is_a_half(truths: list[np.ndarray]) -> None:
    assert choose_threshold(truths, [found((GUN, 0.9))]) == 0.5


def test_the_report_shows_the_worst_and_escapes_names() -> None:
    truths = [NONE, np.array([GUN])]
    detections = [found((GUN, 0.95)), found()]
    metrics = compute_metrics(truths, detections, 0.5)
    pixels = np.zeros((100, 150, 3), np.uint8)
    page = render_report(
        "a <b> report", metrics, truths, detections, lambda i: Picture(f"<i{i}>.jpg", pixels)
    )
    assert "a &lt;b&gt; report" in page
    assert "&lt;i0&gt;.jpg" in page
    assert "&lt;i1&gt;.jpg" in page
    assert "<i0>" not in page
    assert page.count("data:image/jpeg;base64,") == 2
    assert "http:" not in page
    assert "https:" not in page
