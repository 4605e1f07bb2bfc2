"""One self-contained HTML page per evaluation: the numbers, and the pictures that went worst."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from numpy.typing import NDArray

from gun_detection.detector.inference import Detections
from gun_detection.evaluation.metrics import Metrics, match
from gun_detection.images import draw_boxes, encode_jpeg

_SHOWN = 12


@dataclass(frozen=True)
class Picture:
    """A picture for the gallery: pixels are uint8 (H, W, 3) RGB."""

    name: str
    pixels: NDArray[np.uint8]


def render_report(
    title: str,
    metrics: Metrics,
    truths: Sequence[NDArray[np.floating[Any]]],
    found: Sequence[Detections],
    picture: Callable[[int], Picture],
) -> str:
    """The page as HTML; `picture` is asked only for the few pictures that are shown."""
    shown = [detections.above(metrics.threshold) for detections in found]
    alarms, misses = [], []
    for index, (truth, detections) in enumerate(zip(truths, shown, strict=True)):
        hits = np.asarray(match(truth, detections), dtype=bool)
        wrong = detections.scores[~hits]
        if len(wrong):
            alarms.append((float(wrong.max()), index))
        missed = len(truth) - int(hits.sum())
        if missed:
            misses.append((missed, index))

    def gallery(ranked: Sequence[tuple[float, int]]) -> list[dict[str, str]]:
        worst = sorted(ranked, key=lambda item: (-item[0], item[1]))[:_SHOWN]
        return [_card(picture(index), shown[index], metrics.threshold) for _, index in worst]

    environment = Environment(
        loader=PackageLoader("gun_detection.evaluation"), autoescape=select_autoescape()
    )
    return environment.get_template("report.html").render(
        title=title,
        metrics=metrics,
        rows=_rows(metrics),
        alarms=gallery(alarms),
        alarm_count=len(alarms),
        misses=gallery(misses),
        miss_count=len(misses),
    )


def _card(picture: Picture, detections: Detections, threshold: float) -> dict[str, str]:
    drawn = draw_boxes(picture.pixels, detections.boxes, detections.scores, threshold)
    # Large pictures make a page that no browser opens.
    step = max(1, max(drawn.shape[:2]) // 480)
    data = base64.b64encode(encode_jpeg(np.ascontiguousarray(drawn[::step, ::step]), 80)).decode()
    return {"name": picture.name, "source": f"data:image/jpeg;base64,{data}"}


def _rows(metrics: Metrics) -> list[tuple[str, str, str]]:
    meanings = [
        ("AP50", metrics.ap50, "average precision at IoU 0.5"),
        ("AP", metrics.ap, "mean over IoU 0.50 to 0.95"),
        ("AP75", metrics.ap75, "average precision at IoU 0.75"),
        ("AP small", metrics.ap_small, "boxes below 32 × 32 pixels"),
        ("AP medium", metrics.ap_medium, "boxes up to 96 × 96 pixels"),
        ("AP large", metrics.ap_large, "larger boxes"),
        ("Precision", metrics.precision, "share of marked boxes that are guns"),
        ("Recall", metrics.recall, "share of guns that are marked"),
        (
            "False positives per gun-free picture",
            metrics.false_positives_per_negative,
            "boxes marked where there is no gun",
        ),
        ("False alarm rate", metrics.false_alarm_rate, "share of gun-free pictures with a mark"),
    ]
    return [(n, "not measured" if v is None else f"{v:.3f}", meaning) for n, v, meaning in meanings]
