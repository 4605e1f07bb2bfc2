"""What a picture costs with each engine of this machine, and what it finds, beside the reference.

    python benchmarks/engines.py --pictures DIR [--calibration DIR] [--limit N]
        (--weights FILE | --architecture NAME) [--regions N] [--plain] [--engines NAME ...]

DIR holds labelled pictures in any layout that can be ingested; 8 bits are fitted to those of
`--calibration`, or to half of the others. Engines take turns, some pictures of like shapes at a
time, each with as many threads and as large batches as it asks for. Prints processor and wall
seconds of a picture, their ratio to the reference's, and AP50. An architecture has random weights,
which show its cost alone. `--regions` is how many regions of a picture the engines look at, where
the reference looks at as many as the architecture has it.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.datasets.sources import open_source
from gun_detection.detector.architectures import (
    ARCHITECTURES,
    DetectorConfig,
    build_detector,
    select_device,
)
from gun_detection.detector.conversion import convert, quantize, to_files
from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import CPU_ENGINES, cores, shape_class
from gun_detection.detector.inference import EVALUATION_FLOOR
from gun_detection.detector.running import DetectorEngine, one_thread_each, reference, runnable
from gun_detection.detector.weights import config_of, deserialize
from gun_detection.errors import LabelError
from gun_detection.evaluation.matching import Boxes, match_all
from gun_detection.evaluation.metrics import average_precision
from gun_detection.images import DecodeLimits, decode
from gun_detection.release.packages import assemble, detector_file
from gun_detection.release.packaging import drift
from gun_detection.settings import Settings
from gun_detection.storage import Storage

DEVICE = select_device("auto")
CALIBRATION = 100


@dataclass
class Taken:
    """What an engine took in all, and what it found in each picture."""

    engine: DetectorEngine
    processor: float = 0.0
    wall: float = 0.0
    found: list[Detections] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--limit", type=int, default=200)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", type=Path)
    what.add_argument("--architecture")
    parser.add_argument("--regions", type=int, help="that the box head of an engine looks at")
    parser.add_argument("--plain", action="store_true", help="without the mirrored picture")
    parser.add_argument("--engines", nargs="+", default=list(runnable(DEVICE)))
    arguments = parser.parse_args()
    if DEVICE.type == "cpu":
        one_thread_each()
    pictures = list(labelled(arguments.pictures, arguments.limit))
    if arguments.calibration:
        others = list(labelled(arguments.calibration, CALIBRATION))
    else:
        others, pictures = pictures[1::2], pictures[::2]
    # What is fitted to random weights does not matter.
    fitting = [pixels for pixels, _ in others][: CALIBRATION if arguments.weights else 4]
    model, config = detector(arguments)
    regions = arguments.regions or model.rpn.post_nms_top_n()
    engines = [
        reference(deepcopy(model), config, EVALUATION_FLOOR, DEVICE),
        *(packaged(model, config, arguments.engines, fitting, regions)),
    ]
    pictures.sort(key=lambda picture: shape_class(picture[0].shape))
    show([Taken(engine) for engine in engines], pictures, trained=arguments.weights is not None)


def labelled(folder: Path, limit: int) -> Iterator[tuple[NDArray[np.uint8], Boxes]]:
    """(pixels, boxes) of pictures that are spread over the folder."""
    settings = Settings()
    limits = DecodeLimits.from_settings(settings)
    with open_source(str(folder), settings, Storage(settings)) as source:
        step = max(1, len(source) // limit)
        for number, sample in enumerate(source):
            label = sample.label()
            if number % step or number >= step * limit or isinstance(label, LabelError):
                continue
            pixels = decode(sample.read(), limits).pixels
            height, width = pixels.shape[:2]
            truth = label.pixels(width, height).clip(0, [width, height, width, height])
            yield pixels, truth


def detector(arguments: argparse.Namespace) -> tuple[FasterRCNN, DetectorConfig]:
    changes: dict[str, Any] = {"mirrored": False} if arguments.plain else {}
    if arguments.architecture:
        config = DetectorConfig(architecture=arguments.architecture, **changes)
        torch.manual_seed(0)
        return build_detector(config).eval(), config
    data = arguments.weights.read_bytes()
    found = config_of(data) or DetectorConfig()
    config = found.model_copy(update=changes)
    return deserialize(data, config), config


def packaged(
    model: FasterRCNN,
    config: DetectorConfig,
    names: list[str],
    fitting: list[NDArray[np.uint8]],
    regions: int,
) -> Iterator[DetectorEngine]:
    on_cpu = [name for name in names if name in CPU_ENGINES]
    full, precise = convert(model) if on_cpu else None, ARCHITECTURES[config.architecture].precise
    for name in names:
        built = detector_file(regions)
        if full is not None and name in on_cpu:
            networks = full
            if name == "openvino-int8":
                networks = quantize(
                    model,
                    full,
                    range(len(fitting)),
                    lambda index: torch.from_numpy(fitting[index]).permute(2, 0, 1) / 255,
                    precise,
                )
            built |= to_files(networks, precise)
        with tempfile.TemporaryDirectory() as folder:
            files = {}
            for role, data in built.items():
                files[role] = Path(folder, role)
                files[role].write_bytes(data)
            yield assemble(name, deepcopy(model), config, files, EVALUATION_FLOOR)


def show(
    rows: list[Taken], pictures: list[tuple[NDArray[np.uint8], Boxes]], *, trained: bool
) -> None:
    size = max(4 * row.engine.streams * row.engine.batch for row in rows)
    for row in rows:
        # The first picture of a thread pays for what it will use again.
        run(row, [pixels for pixels, _ in pictures[:size]], counts=False)
    for start in range(0, len(pictures), size):
        for row in rows:
            run(row, [pixels for pixels, _ in pictures[start : start + size]])
    print(
        f"{len(pictures)} pictures, {rows[0].engine.input_size} px, {cores()} cores\n"
        "engine           processor s  ratio   wall s  ratio    AP50  drift px: median, 99 %"
    )
    truths = [truth for _, truth in pictures]
    for row in rows:
        line = f"{row.engine.name:16s}"
        for taken, base in ((row.processor, rows[0].processor), (row.wall, rows[0].wall)):
            line += f" {taken / len(pictures):10.3f} {base / taken:6.2f}"
        if trained:
            ap50 = average_precision(match_all(truths, row.found))["ap50"]
            median, most = drift(rows[0].found, row.found)
            line += f"  {'none' if ap50 is None else f'{ap50:.4f}'}  {median:.2f}, {most:.1f}"
        print(line, flush=True)


def run(row: Taken, images: list[NDArray[np.uint8]], *, counts: bool = True) -> None:
    with ThreadPoolExecutor(row.engine.streams) as pool:
        processor, wall = time.process_time(), time.perf_counter()
        batch = row.engine.batch
        parts = [images[start : start + batch] for start in range(0, len(images), batch)]
        found = [one for some in pool.map(row.engine, parts) for one in some]
        processor, wall = time.process_time() - processor, time.perf_counter() - wall
    if counts:
        row.processor += processor
        row.wall += wall
        row.found += found


if __name__ == "__main__":
    main()
