"""What an evaluation looks at: pictures with their labels, detections and properties."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from gun_detection.detector.detections import Detections
from gun_detection.detector.inference import Predictor
from gun_detection.errors import ImageError, ModelError
from gun_detection.evaluation.matching import Boxes, Matched

# Blur is measured at one size, or large pictures would seem sharper.
_SIDE = 256


@dataclass(frozen=True)
class Properties:
    """What slices are made by; `brightness` is the mean luma (0 to 255), `sharpness` the variance
    of the Laplacian of the picture made `_SIDE` pixels large. The size is that of the whole one."""

    width: int
    height: int
    brightness: float
    sharpness: float
    source: str


@dataclass(frozen=True)
class Sample:
    """A picture that was measured; `group` is shared by near-duplicates, `name` is for people."""

    name: str
    group: str
    matched: Matched
    properties: Properties
    seconds: float


@dataclass(frozen=True)
class Labelled:
    """A picture before it is measured: pixels uint8 (H, W, 3), boxes (N, 4) xyxy.

    `size` is (width, height) of the whole upright picture, to which the boxes belong: the pixels
    may be those of a smaller one, as scoring decodes it.
    """

    name: str
    group: str
    source: str
    pixels: NDArray[np.uint8]
    truth: Boxes
    size: tuple[int, int]


@dataclass(frozen=True)
class Samples:
    """The pictures of an evaluation and the device that they were measured on."""

    items: list[Sample]
    device: str

    @cached_property
    def matched(self) -> list[Matched]:
        return [sample.matched for sample in self.items]

    def to_json(self) -> bytes:
        """All that is needed to judge again, or to compare two models picture by picture."""
        rows = [
            {
                "name": sample.name,
                "group": sample.group,
                "truth": sample.matched.truth.round(2).tolist(),
                "boxes": sample.matched.found.boxes.round(2).tolist(),
                "scores": sample.matched.found.scores.round(5).tolist(),
                "properties": vars(sample.properties),
                "seconds": round(sample.seconds, 5),
            }
            for sample in self.items
        ]
        return json.dumps({"device": self.device, "pictures": rows}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Samples":
        content = json.loads(data)
        return cls([_sample(row) for row in content["pictures"]], content["device"])


def _sample(row: dict[str, Any]) -> Sample:
    found = Detections(
        np.array(row["boxes"], np.float32).reshape(-1, 4), np.array(row["scores"], np.float32)
    )
    truth = np.array(row["truth"], np.float32).reshape(-1, 4)
    properties = Properties(**row["properties"])
    return Sample(row["name"], row["group"], Matched.of(truth, found), properties, row["seconds"])


def measure(
    predictor: Predictor,
    pictures: Iterable[Labelled],
    progress: Callable[[int], None] = lambda done: None,
    *,
    batch: int = 1,
) -> Samples:
    """Run the detector over the pictures, `batch` at a time; `progress` hears how many are done.

    Raises `ModelError` (`NOT_FINITE`) where it computes what is no number: to find nothing would be
    something else.
    """
    items: list[Sample] = []
    rest = iter(pictures)
    while some := list(islice(rest, batch)):
        start = time.perf_counter()
        try:
            found = predictor([picture.pixels for picture in some])
        except ImageError as error:
            names = ", ".join(picture.name for picture in some)
            raise ModelError(f"{names}: {error.message}", reason=error.reason) from error
        seconds = (time.perf_counter() - start) / len(some)
        for picture, mine in zip(some, found, strict=True):
            height, width = picture.pixels.shape[:2]
            matched = Matched.of(picture.truth, mine.resized((width, height), picture.size))
            items.append(
                Sample(picture.name, picture.group, matched, _properties(picture), seconds)
            )
        progress(len(items))
    return Samples(items, str(predictor.device))


def _properties(picture: Labelled) -> Properties:
    height, width = picture.pixels.shape[:2]
    grey = cv2.cvtColor(picture.pixels, cv2.COLOR_RGB2GRAY)
    factor = _SIDE / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    small = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    return Properties(
        width=picture.size[0],
        height=picture.size[1],
        brightness=round(float(grey.mean()), 1),
        sharpness=round(float(cv2.Laplacian(small, cv2.CV_64F).var()), 1),
        source=picture.source,
    )
