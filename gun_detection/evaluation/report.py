"""One self-contained HTML page per evaluation: numbers, plots, slices and the worst pictures."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from numpy.typing import NDArray

from gun_detection.evaluation import plots
from gun_detection.evaluation.bootstrap import Interval
from gun_detection.evaluation.matching import Matched
from gun_detection.evaluation.metrics import Metrics
from gun_detection.evaluation.samples import Sample
from gun_detection.evaluation.slices import Slice
from gun_detection.images import draw_boxes, encode_jpeg

_SHOWN = 12
_SIDE = 480
_MISSED_COLOUR = (255, 200, 0)


@dataclass(frozen=True)
class Row:
    """A number with its 95 % interval, as text."""

    name: str
    value: str
    interval: str
    meaning: str


def render_report(
    title: str,
    metrics: Metrics,
    slices: Sequence[Slice],
    samples: Sequence[Sample],
    pixels: Callable[[int], NDArray[np.uint8]],
    notes: Sequence[str] = (),
) -> str:
    """The page as HTML; `pixels` is asked only for the few pictures that are shown.

    `notes` are lines about the model, such as how its threshold was chosen.
    """
    threshold = metrics.threshold
    matched = [sample.matched for sample in samples]
    galleries = []
    for name, worst in rank_failures(samples, threshold).items():
        cards = [
            {
                "name": samples[index].name,
                "source": data_uri(draw_failure(samples[index], pixels(index), threshold)),
            }
            for index in worst[:_SHOWN]
        ]
        galleries.append((name, cards, len(worst)))
    environment = Environment(
        loader=PackageLoader("gun_detection.evaluation"), autoescape=select_autoescape()
    )
    return environment.get_template("report.html").render(
        title=title,
        metrics=metrics,
        notes=notes,
        rows=number_rows(metrics),
        plots=_plots(matched, threshold) if metrics.boxes else [],
        slices=[slice_row(item) for item in slices],
        galleries=galleries,
        cost=_cost(samples),
    )


def _plots(matched: Sequence[Matched], threshold: float) -> list[tuple[str, Markup]]:
    # Made by the plotting library from numbers alone: no text from outside is in them.
    return [
        ("Precision and recall", Markup(plots.precision_recall(matched, threshold))),
        ("Recall and false positives", Markup(plots.free_response(matched, threshold))),
        ("Calibration of scores", Markup(plots.reliability(matched))),
        ("Scores of right and wrong marks", Markup(plots.scores(matched, threshold))),
    ]


def rank_failures(samples: Sequence[Sample], threshold: float) -> dict[str, list[int]]:
    """Indices of the pictures with failures at a threshold by kind of failure, worst first."""
    free: list[tuple[float, int]] = []
    armed: list[tuple[float, int]] = []
    missed: list[tuple[float, int]] = []
    for index, sample in enumerate(samples):
        picture = sample.matched
        wrong = picture.found.scores[~picture.correct]
        worst = float(wrong.max()) if len(wrong) else 0.0
        if worst >= threshold:
            (free if picture.negative else armed).append((worst, index))
        count = len(picture.missed(threshold))
        if count:
            missed.append((count, index))
    ranked = {
        "Worst false positives on gun-free pictures": free,
        "Worst false positives on pictures with guns": armed,
        "Most missed guns": missed,
    }
    return {
        name: [index for _, index in sorted(found, key=lambda item: (-item[0], item[1]))]
        for name, found in ranked.items()
    }


def draw_failure(sample: Sample, pixels: NDArray[np.uint8], threshold: float) -> bytes:
    """A small JPEG of the picture with the marks from `threshold` on, and what was missed."""
    matched = sample.matched
    drawn = draw_boxes(pixels, matched.found.boxes, matched.found.scores, threshold)
    missed = matched.truth[matched.missed(threshold)]
    drawn = draw_boxes(
        drawn, missed, np.ones(len(missed)), threshold, colour=_MISSED_COLOUR, label="missed"
    )
    # Large pictures make a page that no browser opens.
    step = max(1, max(drawn.shape[:2]) // _SIDE)
    return encode_jpeg(np.ascontiguousarray(drawn[::step, ::step]), 80)


def data_uri(jpeg: bytes) -> str:
    """The picture as part of a page."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def number_rows(metrics: Metrics) -> list[Row]:
    """Every number with its interval and what it means, for people."""
    found = metrics.intervals
    rows = [
        ("AP50", "ap50", "average precision at IoU 0.5"),
        ("AP", "ap", "mean over IoU 0.50 to 0.95"),
        ("AP75", "ap75", "average precision at IoU 0.75"),
        ("AP small", "ap_small", "boxes below 32 × 32 pixels"),
        ("AP medium", "ap_medium", "boxes up to 96 × 96 pixels"),
        ("AP large", "ap_large", "larger boxes"),
        ("Precision", "precision", "share of marks that are guns"),
        ("Recall", "recall", "share of guns that are marked"),
        (
            "False positives per gun-free picture",
            "false_positives_per_negative",
            "marks where there is no gun (FPPI)",
        ),
        ("Sensitivity", "sensitivity", "share of pictures with a gun that have a mark"),
        ("Specificity", "specificity", "share of gun-free pictures without a mark"),
    ]
    table = [
        Row(name, _text(getattr(metrics, key)), _range(found.get(key)), meaning)
        for name, key, meaning in rows
    ]
    for level, value in sorted(metrics.recall_at_fppi.items(), key=lambda item: float(item[0])):
        name = f"Recall at {float(level):g} false positives"
        meaning = f"at the threshold that gives {float(level):g} per gun-free picture"
        key = f"recall_at_fppi_{level}"
        table.append(Row(name, _text(value), _range(found.get(key)), meaning))
    error = _text(metrics.calibration_error)
    return [*table, Row("Calibration error", error, "", "score against the share that is right")]


def slice_row(item: Slice) -> list[str]:
    """A slice as the cells of a table."""
    return [
        item.property,
        item.value,
        str(item.images),
        str(item.boxes),
        _with_range(item.ap50, item.ap50_interval),
        _with_range(item.recall, item.recall_interval),
        _text(item.false_positives_per_image, "–"),
    ]


def _with_range(value: float | None, span: Interval | None) -> str:
    return _text(value, "–") + (f" ({_range(span)})" if span else "")


def _text(value: float | None, missing: str = "not measured") -> str:
    return missing if value is None else f"{value:.3f}"


def _range(span: Interval | None) -> str:
    return f"{span[0]:.3f} to {span[1]:.3f}" if span else ""


def _cost(samples: Sequence[Sample]) -> str:
    if not samples:
        return "not measured"
    # The first pictures pay for what is set up once.
    times = [sample.seconds for sample in samples[len(samples) // 10 :]]
    return f"{1000 * float(np.median(times)):.0f} ms"
