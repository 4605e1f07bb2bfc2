"""What an engine found in a few pictures where its package was accepted, to compare elsewhere.

A package is checked on one machine. Another processor, GPU or driver, or another version of the
engine, computes otherwise, by a last digit or by much: each process that opens it asks first.
"""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import Engine, detect
from gun_detection.errors import ImageError
from gun_detection.evaluation.matching import IOU, pairwise_iou

ANSWERS = "answers.npz"
PICTURES = 4

# Weaker detections come and go with the last digit.
_WEAK = 0.2
# So far apart may the scores of the same gun be, for all but so large a share of them.
_APART, _SHARE = 0.1, 1 / 3


def record(engine: Engine, pictures: Sequence[NDArray[np.uint8]]) -> bytes:
    """Pictures, uint8 (H, W, 3) RGB, with the engine's detections, as a file of NumPy."""
    found = engine(pictures)
    arrays: dict[str, Any] = {}
    for number, (picture, detections) in enumerate(zip(pictures, found, strict=True)):
        arrays |= {
            f"picture-{number}": picture,
            f"boxes-{number}": detections.boxes,
            f"scores-{number}": detections.scores,
        }
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def differs(engine: Engine, file: Path, floor: float) -> str | None:
    """What the engine answers otherwise than is recorded in `file`, or None where it is alike.

    The engine is one that gives detections from the score `floor` on.
    """
    with np.load(file, allow_pickle=False) as arrays:
        numbers = range(len(arrays.files) // 3)
        pictures = [arrays[f"picture-{number}"] for number in numbers]
        recorded = [
            Detections(arrays[f"boxes-{number}"], arrays[f"scores-{number}"]) for number in numbers
        ]
    # What engines keep for each thread goes with this one.
    with ThreadPoolExecutor(1) as thread:
        try:
            found = thread.submit(detect, engine, pictures).result()
        except ImageError as error:
            return error.message
    # What is as strong as that has its like among what the engine gives, where it has one.
    least = max(_WEAK, floor + _APART)
    total = unlike = 0
    for one, (other, _) in zip(recorded, found, strict=True):
        # One that is too much for the memory says nothing.
        for pair in ((one, other), (other, one)) if other is not None else ():
            strong, without = _compare(*pair, least)
            total, unlike = total + strong, unlike + without
    if unlike <= _SHARE * total:
        return None
    return f"{unlike} of {total} detections in {len(pictures)} pictures have no like"


def _compare(found: Detections, others: Detections, least: float) -> tuple[int, int]:
    """(detections from the score `least` on, those of them that have no like among the others)."""
    near = np.abs(found.scores[:, None] - others.scores[None]) <= _APART
    alike = (near & (pairwise_iou(found.boxes, others.boxes) >= IOU)).any(axis=1)
    strong = found.scores >= least
    return int(strong.sum()), int((strong & ~alike).sum())
