"""The canary: is the model in the bucket the model that was measured?

A fresh process with an empty cache loads the version as scoring and serving do, looks at a few
holdout pictures again, and its detections are compared with the recorded ones.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gun_detection.detector.detections import Detections
from gun_detection.detector.inference import EVALUATION_FLOOR
from gun_detection.errors import (
    GunDetectionError,
    ModelError,
    NotFoundError,
    ServiceUnavailableError,
)
from gun_detection.evaluation.matching import pairwise_iou
from gun_detection.evaluation.samples import Sample
from gun_detection.release.rules import Canary
from gun_detection.scratch import scratch
from gun_detection.settings import Settings, load_settings

_PICTURES = 8
_TIMEOUT = 900.0
# Weak detections come and go with the last digit.
_WEAK = 0.1
# The same box, but for rounding.
_SAME = 0.9
# What is wrong with the model, whatever kind of error says so.
_OWN = ("SHA256_MISMATCH", "NOT_FINITE")


@dataclass(frozen=True)
class Request:
    """What the fresh process is to look at: pictures of the holdout by their index."""

    model_id: str
    dataset_id: str
    pictures: tuple[int, ...]


def fly_canary(
    model_id: str, dataset_id: str, samples: Sequence[Sample], settings: Settings
) -> Canary:
    """Load the stored model in a fresh process and compare it with its holdout `samples`.

    Anything wrong with the model is in the answer. Raises `ServiceUnavailableError` for all that
    says nothing about the model: a server that could not be reached, a process that was killed, a
    machine without room.
    """
    ranked = sorted(
        range(len(samples)), key=lambda i: -samples[i].matched.found.scores.max(initial=0.0)
    )
    chosen = tuple(sorted(ranked[:_PICTURES]))
    with scratch(settings, "canary") as home:
        found = _run(Request(model_id, dataset_id, chosen), settings, home)
    if isinstance(found, str):
        return Canary(error=found)
    difference, compared = 0.0, 0
    for index, detections in zip(chosen, found, strict=True):
        recorded = samples[index].matched.found
        for one, other in ((recorded, detections), (detections, recorded)):
            most, number = _most_different(one, other)
            difference, compared = max(difference, most), compared + number
    return Canary(difference=difference if compared else None, compared=compared)


def _most_different(found: Detections, other: Detections) -> tuple[float, int]:
    """(largest difference of a score, number compared); a box without its like counts whole."""
    overlaps = pairwise_iou(found.boxes, other.boxes)
    most, number = 0.0, 0
    for overlap, score in zip(overlaps, found.scores, strict=True):
        if score < _WEAK:
            continue
        alike = other.scores[overlap >= _SAME]
        nearest = float(np.abs(alike - score).min(initial=float(score)))
        most, number = max(most, nearest), number + 1
    return most, number


def _run(request: Request, settings: Settings, home: Path) -> list[Detections] | str:
    """The detections of the fresh process, or what was wrong with the model."""
    environment = dict(os.environ) | settings.to_environment() | {"GUN_DETECTION_HOME": str(home)}
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "gun_detection.release.canary"],
            input=json.dumps(vars(request)),
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ServiceUnavailableError(
            f"the stored model did not look at {_PICTURES} pictures within {_TIMEOUT:.0f} s",
            reason="CANARY_LOST",
        ) from None
    if ran.returncode < 0:
        raise ServiceUnavailableError(
            f"the process that tries the stored model was killed by signal {-ran.returncode}",
            reason="CANARY_LOST",
        )
    lines = ran.stdout.splitlines()
    answer = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if "transient" in answer:
        raise ServiceUnavailableError(answer["transient"])
    if "error" in answer:
        return str(answer["error"])
    if "pictures" not in answer:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise ServiceUnavailableError(
            f"the process that tries the stored model failed: {last[:300]}", reason="CANARY_LOST"
        )
    return [
        Detections(
            np.array(row["boxes"], np.float32).reshape(-1, 4), np.array(row["scores"], np.float32)
        )
        for row in answer["pictures"]
    ]


def _look(request: Request, settings: Settings) -> list[dict[str, list[float]]]:
    # In the fresh process only: nothing of it is needed to compare.
    from gun_detection.database import open_session
    from gun_detection.datasets.manifest import load_manifest
    from gun_detection.datasets.torch_dataset import DetectionDataset
    from gun_detection.release.champion import get_model
    from gun_detection.release.registry import load_predictor
    from gun_detection.storage import Storage

    storage = Storage(settings)
    with open_session(settings) as session:
        version = get_model(session, request.model_id)
    predictor = load_predictor(version, settings, storage, EVALUATION_FLOOR)
    manifest = load_manifest(storage, settings.data_bucket, request.dataset_id)
    pictures = DetectionDataset(manifest, "holdout", settings, storage, fit=predictor.input_size)
    rows = []
    for index in request.pictures:
        pixels = pictures[index][0].permute(1, 2, 0).numpy()
        entry, (height, width) = pictures.entries[index], pixels.shape[:2]
        [found] = predictor([pixels])
        found = found.resized((width, height), (entry.width, entry.height))
        rows.append({"boxes": found.boxes.tolist(), "scores": found.scores.tolist()})
    return rows


def main() -> None:
    """The fresh process: a request on standard input, one JSON document on standard output."""
    content = json.loads(sys.stdin.read())
    request = Request(content["model_id"], content["dataset_id"], tuple(content["pictures"]))
    answer: dict[str, object]
    try:
        answer = {"pictures": _look(request, load_settings())}
    except GunDetectionError as error:
        # What else goes wrong is the machine's doing, or that of the settings.
        own = isinstance(error, ModelError | NotFoundError) or error.reason in _OWN
        answer = {"error" if own else "transient": error.message}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
