"""Plots as SVG that lies in a page: no script, and readable on light and on dark ground."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from gun_detection.evaluation.curves import Curve
from gun_detection.evaluation.matching import Matched
from gun_detection.evaluation.metrics import calibration

# A colour that occurs nowhere else: the page puts its own text colour in its place.
_INK = "#010203"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gun-detection",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#8888884d",
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
}
_BLUE, _ORANGE = "#3b82c4", "#e07b39"


def precision_recall(pictures: Sequence[Matched], threshold: float) -> str:
    """Precision over recall at IoU 0.5, with the operating point."""
    curve = Curve(pictures)
    recall = np.nan_to_num(curve.recall)
    with _axes("recall", "precision") as (axes, finish):
        axes.plot(recall, curve.precision, color=_BLUE)
        shown = int((curve.scores >= threshold).sum())
        if shown:
            point = recall[shown - 1], curve.precision[shown - 1]
            axes.plot(*point, "o", color=_ORANGE, label="at the threshold")
            axes.legend(loc="lower left")
        axes.set(xlim=(0, 1.02), ylim=(0, 1.05))
    return finish()


def free_response(pictures: Sequence[Matched], threshold: float) -> str:
    """Recall over false positives per gun-free picture (FROC)."""
    curve = Curve(pictures)
    recall = np.nan_to_num(curve.recall)
    least = 0.5 / max(1, curve.judged)
    alarms = np.maximum(np.nan_to_num(curve.fppi), least)
    with _axes("false positives per gun-free picture", "recall") as (axes, finish):
        axes.plot(alarms, recall, color=_BLUE, drawstyle="steps-post")
        shown = int((curve.scores >= threshold).sum())
        if shown:
            point = alarms[shown - 1], recall[shown - 1]
            axes.plot(*point, "o", color=_ORANGE, label="at the threshold")
            axes.legend(loc="lower right")
        axes.set(xscale="log", ylim=(0, 1.05))
    return finish()


def reliability(pictures: Sequence[Matched]) -> str:
    """The share of marks that are right over their score."""
    rows = calibration(pictures)
    with _axes("score", "share that is right") as (axes, finish):
        axes.plot([0, 1], [0, 1], "--", color="#888888", label="calibrated")
        axes.plot([r[0] for r in rows], [r[1] for r in rows], "o-", color=_BLUE)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.05))
        axes.legend(loc="upper left")
    return finish()


def scores(pictures: Sequence[Matched], threshold: float) -> str:
    """How many right and wrong marks there are at each score."""
    values = np.concatenate([np.zeros(0), *(p.found.scores for p in pictures)])
    right = np.concatenate([np.zeros(0, bool), *(p.correct for p in pictures)])
    with _axes("score", "marks") as (axes, finish):
        bins = np.linspace(0, 1, 26)
        axes.hist(
            [values[right], values[~right]],
            bins=bins.tolist(),
            stacked=True,
            color=[_BLUE, _ORANGE],
            label=["right", "wrong"],
        )
        axes.axvline(threshold, color=_INK, linestyle=":", label="threshold")
        axes.set(yscale="symlog", xlim=(0, 1))
        axes.legend(loc="upper center")
    return finish()


class _Finish:
    """The finished plot, once its block has ended."""

    svg = ""

    def __call__(self) -> str:
        return self.svg


@contextmanager
def _axes(x: str, y: str) -> Iterator[tuple[Axes, _Finish]]:
    finish = _Finish()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.set(xlabel=x, ylabel=y)
        yield axes, finish
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    finish.svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
