"""Pictures with a gun at a known place, what a detector might say of them, and a real one."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from gun_detection.database import open_session
from gun_detection.database.models import ModelVersion
from gun_detection.datasets.ingest import ingest
from gun_detection.datasets.synthetic import draw_pictures
from gun_detection.detector.detections import Detections
from gun_detection.evaluation.matching import Boxes, Matched
from gun_detection.evaluation.samples import Properties, Sample
from gun_detection.release.registry import publish
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model

GUN = [10.0, 10.0, 60.0, 40.0]
OTHER = [100.0, 100.0, 140.0, 130.0]
NONE = np.zeros((0, 4))


def found(*rows: tuple[list[float], float]) -> Detections:
    boxes = np.array([box for box, _ in rows], np.float32).reshape(-1, 4)
    return Detections(boxes, np.array([score for _, score in rows], np.float32))


def picture(truth: Boxes | list[list[float]], *rows: tuple[list[float], float]) -> Matched:
    return Matched.of(np.array(truth, float).reshape(-1, 4), found(*rows))


def sample(matched: Matched, name: str = "a.jpg", **changes: object) -> Sample:
    values = {"width": 200, "height": 150, "brightness": 100.0, "sharpness": 500.0, "source": ""}
    properties = Properties(**(values | changes))  # type: ignore[arg-type]
    return Sample(name, name, matched, properties, 0.01)


def random_pictures(count: int, seed: int = 0) -> list[Matched]:
    """Guns of all sizes, found more or less well, with false positives among them."""
    random = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        corner = random.uniform(0, 300, (random.integers(0, 4), 2))
        truth = np.hstack([corner, corner + random.uniform(10, 200, (len(corner), 2))])
        noise = random.normal(0, 6, truth.shape)
        wrong = random.uniform(0, 300, (random.integers(0, 4), 2))
        boxes = np.vstack([truth + noise, np.hstack([wrong, wrong + random.uniform(10, 150, 2)])])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = np.sort(random.uniform(0.01, 1, len(boxes)))[::-1]
        order = random.permutation(len(boxes))
        detections = Detections(boxes[order].astype(np.float32), scores.astype(np.float32))
        pictures.append(Matched.of(truth, detections))
    return pictures


def version_of(
    folder: Path,
    stretch: Callable[[int], tuple[int, int]],
    settings: Settings,
    storage: Storage,
) -> ModelVersion:
    """A model of synthetic pictures, each stretched by (width, height) by its number."""
    for name in ("Images", "Labels"):
        (folder / name).mkdir()
    for number, picture in enumerate(draw_pictures(24)):
        wide, tall = stretch(number)
        with Image.open(io.BytesIO(picture.data)) as image:
            large = image.resize((wide * image.width, tall * image.height))
        large.save(folder / "Images" / f"{number}.jpeg", quality=95)
        lines = [
            " ".join(str(round(side)) for side in np.array(box) * [wide, tall, wide, tall])
            for box in picture.boxes
        ]
        label = "\n".join([str(len(lines)), *lines])
        (folder / "Labels" / f"{number}.txt").write_text(label)
    with open_session(settings) as session:
        dataset = ingest(str(folder), settings, storage, session)
        trained = replace(random_model(1), dataset_id=dataset.dataset_id)
        return publish(trained, settings, storage, session)
