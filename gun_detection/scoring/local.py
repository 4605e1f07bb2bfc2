"""Local pictures through the same decoder and engine as uploads; nothing is stored but files."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import Engine, cores, detect
from gun_detection.errors import GunDetectionError, ImageError, NotFoundError
from gun_detection.images import DecoderPool, draw_boxes, encode_png
from gun_detection.scoring.flow import in_threads
from gun_detection.settings import Settings

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True, slots=True)
class Looked:
    """A picture with its detections, in pixels of all of it, or with what is wrong with it."""

    path: Path
    found: Detections | None = None
    error: GunDetectionError | OSError | None = None


def find_pictures(paths: Sequence[Path], besides: Path | None = None) -> list[Path]:
    """The files among `paths`, and in its folders, those with a picture's suffix, by name.

    What lies in `besides` is left out. Raises `NotFoundError` where there is nothing.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in SUFFIXES
            and file.is_file()
            and not (besides and file.resolve().is_relative_to(besides.resolve()))
        ]
        if not inside:
            raise NotFoundError(f"there is no picture in {path}: it has no {', '.join(SUFFIXES)}")
        found += inside
    return found


def look_at(
    pictures: Sequence[Path],
    engine: Engine,
    settings: Settings,
    threshold: float,
    overlays: Path | None,
    progress: Callable[[int, int], None],
) -> list[Looked]:
    """Look at pictures, in their order; with `overlays`, a folder, draw what is found as PNG."""
    threads = max(engine.streams, cores())
    results: dict[int, Looked] = {}
    with DecoderPool(settings, threads) as decoders:

        def one(item: tuple[int, Path]) -> tuple[int, Looked]:
            overlay = overlays / _overlay_name(*item) if overlays else None
            return item[0], _look(item[1], decoders, engine, threshold, overlay)

        for result in in_threads(one, enumerate(pictures, start=1), threads):
            if result is not None:
                results[result[0]] = result[1]
                progress(len(results), len(pictures))
    return [results[number] for number in sorted(results)]


def _overlay_name(number: int, path: Path) -> str:
    # The number keeps apart what folders kept apart; the name cannot lead elsewhere.
    return f"{number:05d}-{path.stem[:100]}.png"


def _look(
    path: Path,
    decoders: DecoderPool,
    engine: Engine,
    threshold: float,
    overlay: Path | None,
) -> Looked:
    try:
        data = path.read_bytes()
        image = decoders.decode(data, fit=engine.input_size)
        [(detections, _)] = detect(engine, [image.pixels])
        if detections is None:
            raise ImageError("it needs more memory than there is", reason="DECODE_MEMORY")
        height, width = image.pixels.shape[:2]
        found = detections.resized((width, height), (image.width, image.height))
        if overlay is not None and (height, width) != (image.height, image.width):
            image = decoders.decode(data)
    except (GunDetectionError, OSError) as error:
        return Looked(path, error=error)
    if overlay is not None:
        # What goes wrong with this file, a full disk for one, is no fault of the picture.
        kept = found.above(threshold)
        drawn = draw_boxes(image.pixels, kept.boxes, kept.scores, threshold, caption="unreviewed")
        overlay.write_bytes(encode_png(drawn))
    return Looked(path, found)


def document(looked: Sequence[Looked], model: str, threshold: float) -> dict[str, Any]:
    """All of it as JSON types."""
    return {
        "model": model,
        "threshold": threshold,
        "review": "unreviewed",
        "images": [_row(one, threshold) for one in looked],
    }


def _row(one: Looked, threshold: float) -> dict[str, Any]:
    if one.found is None:
        return {"file": str(one.path), "error": str(one.error)}
    kept = one.found.above(threshold)
    rows = [
        {"box": [round(float(v), 1) for v in box], "score": round(float(score), 4)}
        for box, score in zip(kept.boxes, kept.scores, strict=True)
    ]
    return {"file": str(one.path), "detections": rows}


def write_files(folder: Path, found: dict[str, Any]) -> None:
    """All as `predictions.json`, a row for each picture in `images.csv`, for each box in
    `detections.csv`."""
    (folder / "predictions.json").write_text(json.dumps(found, indent=2))
    known = [found["model"], found["threshold"], found["review"]]
    with (
        (folder / "images.csv").open("w", newline="") as images,
        (folder / "detections.csv").open("w", newline="") as detections,
    ):
        by_picture, by_box = csv.writer(images), csv.writer(detections)
        by_picture.writerow(["file", "guns", "best_score", "error", "model", "threshold", "review"])
        by_box.writerow(["file", "x1", "y1", "x2", "y2", "score", "model", "threshold", "review"])
        for image in found["images"]:
            boxes = image.get("detections", [])
            best = boxes[0]["score"] if boxes else ""
            count = "" if "error" in image else len(boxes)
            by_picture.writerow([image["file"], count, best, image.get("error", ""), *known])
            for box in boxes:
                by_box.writerow([image["file"], *box["box"], box["score"], *known])
