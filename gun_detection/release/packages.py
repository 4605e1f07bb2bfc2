"""Packages of model versions for engines: which one scores, and how it is loaded.

A package's files lie under `models/<id>/engines/<engine>/`, each named after its contents.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from sqlalchemy import select
from torch import nn
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.database import open_session
from gun_detection.database.models import EnginePackage, ModelVersion
from gun_detection.detector.architectures import (
    DetectorConfig,
    input_size,
    limit_proposals,
    select_device,
)
from gun_detection.detector.cuda import CudaDetector
from gun_detection.detector.engines import (
    CPU_ENGINES,
    GPU_BATCH,
    GPU_ENGINES,
    GPU_STREAMS,
    REFERENCE,
    cores,
)
from gun_detection.detector.inference import Predictor
from gun_detection.detector.running import DetectorEngine, one_thread_each, reference, runnable
from gun_detection.errors import ModelError, SettingsError
from gun_detection.release.answers import ANSWERS, differs
from gun_detection.release.champion import get_model
from gun_detection.release.copies import copies, make_room, note_use
from gun_detection.release.registry import WEIGHT_SUFFIXES, load_model, open_file
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from gun_detection.training.hardware import device_name

DETECTOR = "detector.json"

logger = logging.getLogger(__name__)

# The files, by their sha256, of packages whose engines answer otherwise on this machine.
_unfit: set[frozenset[str]] = set()


def open_engine(version: ModelVersion, settings: Settings, storage: Storage) -> DetectorEngine:
    """The engine that `settings.engine` asks for, for a process that scores with many threads.

    `auto` takes the accepted package that costs the least, or the reference where none costs less
    than that. One whose engine answers otherwise here than where it was accepted is passed over.
    Raises `ModelError` for an engine whose package was refused, never made, or passed over,
    `SettingsError` for one that this machine cannot run, and `TerminalError` (`SHA256_MISMATCH`)
    for other files than were packaged.
    """
    while True:
        chosen = _chosen(version, settings)
        name, sums = (chosen.engine, chosen.files) if chosen else (REFERENCE, {})
        files = {
            role(file): _fetch(version.id, name, file, sha256, settings, storage)
            for file, sha256 in sums.items()
        }
        engine = load_engine(version, name, files, settings, storage, settings.score_floor)
        if engine.streams > 1:
            one_thread_each()
        # Packages of before there were answers have none.
        other = differs(engine, files[ANSWERS], settings.score_floor) if ANSWERS in files else None
        if other is None:
            logger.info("%s runs on the engine %s (%s)", version.id, engine.name, engine.device)
            if chosen is None:
                _say_what_lacks(version, settings)
            return engine
        logger.error(
            "the engine %s does not find here what it found where %s was packaged with it, and "
            "another takes its place: %s",
            name,
            version.id,
            other,
        )
        _unfit.add(frozenset(sums.values()))


def open_file_engine(
    path: Path, settings: Settings
) -> tuple[DetectorEngine, DetectorConfig, float]:
    """(reference engine, detector, threshold) of a weights file, which needs no database."""
    model, config, threshold = open_file(path)
    engine = reference(model, config, settings.score_floor, select_device(settings.device))
    if engine.streams > 1:
        one_thread_each()
    return engine, config, threshold


def open_by_name(name: str, settings: Settings) -> tuple[str, DetectorEngine, float]:
    """(name, engine, operating threshold) of `champion`, a version, or a weights file."""
    path = Path(name)
    if path.suffix in WEIGHT_SUFFIXES:
        engine, _, threshold = open_file_engine(path, settings)
        return path.name, engine, threshold
    with open_session(settings) as session:
        version = get_model(session, name)
    return version.id, open_engine(version, settings, Storage(settings)), version.threshold


def engine_for(version: ModelVersion, settings: Settings) -> str:
    """The name of the engine that `open_engine` would open; raises as it does."""
    chosen = _chosen(version, settings)
    return chosen.engine if chosen else REFERENCE


def _chosen(version: ModelVersion, settings: Settings) -> EnginePackage | None:
    with open_session(settings) as session:
        rows = session.scalars(select(EnginePackage).where(EnginePackage.model_id == version.id))
        return _choose(rows.all(), version, settings)


def _say_what_lacks(version: ModelVersion, settings: Settings) -> None:
    """Warn of a GPU that the reference runs on because nobody made a package for it."""
    if settings.engine != "auto" or select_device(settings.device).type != "cuda":
        return
    with open_session(settings) as session:
        mine = EnginePackage.model_id == version.id, EnginePackage.engine.in_(GPU_ENGINES)
        made = session.scalar(select(EnginePackage.id).where(*mine).limit(1))
    if made is None:
        logger.warning(
            "%s has no package for the GPU, and the reference engine looks at pictures several "
            "times slower: run `gun-detection package %s` on a machine with such a GPU "
            "(docs/deployment.md)",
            version.id,
            version.id,
        )


def load_engine(
    version: ModelVersion,
    name: str,
    files: Mapping[str, Path],
    settings: Settings,
    storage: Storage,
    floor: float,
) -> DetectorEngine:
    """An engine from its package's files by role, down to a score of `floor`."""
    config = DetectorConfig.model_validate(version.config["detector"])
    model = load_model(version, settings, storage)
    if name == REFERENCE:
        return reference(model, config, floor, select_device(settings.device))
    return assemble(name, model, config, files, floor)


def assemble(
    name: str, model: FasterRCNN, config: DetectorConfig, files: Mapping[str, Path], floor: float
) -> DetectorEngine:
    """An engine, other than the reference, of this detector, which it takes over."""
    # Packages of before there was a choice have none.
    if DETECTOR in files:
        limit_proposals(model, json.loads(files[DETECTOR].read_bytes())["max_proposals"])
    device = device_of(name)
    detector: nn.Module
    if device.type == "cuda":
        detector, streams, batch = CudaDetector(model), GPU_STREAMS, GPU_BATCH
    else:
        # It takes seconds to import, and the others do without.
        from gun_detection.detector.openvino import OpenVinoDetector, from_files

        half = name != "openvino-f32" and "openvino-bf16" in runnable(device)
        streams, batch = cores(), 1
        detector = OpenVinoDetector(model, from_files(files), "bf16" if half else "f32", streams)
    return DetectorEngine(
        name,
        Predictor(detector, device, floor, mirrored=config.mirrored),
        input_size(config),
        device=device_name(device),
        streams=streams,
        batch=batch,
    )


def detector_file(max_proposals: int) -> dict[str, bytes]:
    """What an engine changes of the detector, by the role of its file."""
    return {DETECTOR: json.dumps({"max_proposals": max_proposals}).encode()}


def device_of(engine: str) -> torch.device:
    return torch.device("cpu" if engine in CPU_ENGINES else "cuda")


def require_runnable(engine: str) -> None:
    """Raise `SettingsError` for an engine that there is not, or that this machine cannot run."""
    known = GPU_ENGINES + CPU_ENGINES
    if engine not in known:
        raise SettingsError(
            f"there is no engine {engine!r}: choose from auto, {REFERENCE}, {', '.join(known)}"
        )
    device = device_of(engine)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            f"the engine {engine} needs a GPU, and this machine has none: choose auto"
        )
    if engine not in runnable(device):
        raise SettingsError(
            f"the processor lacks the instructions for the engine {engine}: choose auto"
        )


def role(file: str) -> str:
    """`trunk.bin` of `trunk-<sha256>.bin`."""
    path = Path(file)
    return path.stem.partition("-")[0] + path.suffix


def package_key(model_id: str, engine: str, file: str) -> str:
    return f"models/{model_id}/engines/{engine}/{file}"


def cached_file(file: str, settings: Settings) -> Path:
    return copies(settings) / "engines" / file


def _choose(
    packages: Sequence[EnginePackage], version: ModelVersion, settings: Settings
) -> EnginePackage | None:
    """The package to score with; None is the reference."""
    wanted = settings.engine
    if wanted == REFERENCE:
        return None
    if wanted == "auto":
        able = runnable(select_device(settings.device))
        good = [
            row
            for row in packages
            if row.accepted and row.engine in able and _fits(row) and _cost(row) < 1
        ]
        return min(good, key=_cost, default=None)
    require_runnable(wanted)
    found = next((row for row in packages if row.engine == wanted), None)
    if found is None:
        raise ModelError(
            f"{version.id} has no package for the engine {wanted}: run `gun-detection package "
            f"{version.id}`, or set GUN_DETECTION_ENGINE to auto",
            reason="NOT_PACKAGED",
        )
    if not found.accepted:
        raise ModelError(
            f"the engine {wanted} was refused for {version.id}, {found.reason}: "
            "set GUN_DETECTION_ENGINE to auto",
            reason="PACKAGE_REFUSED",
        )
    if not _fits(found):
        raise ModelError(
            f"the engine {wanted} does not find here what it found where {version.id} was packaged "
            f"({found.toolchain}): run `gun-detection package {version.id}` on this machine, or "
            "set GUN_DETECTION_ENGINE to auto",
            reason="ENGINE_DIFFERS",
        )
    return found


def _fits(row: EnginePackage) -> bool:
    return frozenset(row.files.values()) not in _unfit


def _cost(row: EnginePackage) -> float:
    """The time of a picture, as a multiple of the reference's."""
    assert row.milliseconds is not None
    assert row.reference_milliseconds is not None
    return row.milliseconds / row.reference_milliseconds


def _fetch(
    model_id: str, engine: str, file: str, sha256: str, settings: Settings, storage: Storage
) -> Path:
    """A stored file in the local cache; its sha256 is checked every time."""
    path = cached_file(file, settings)
    if path.exists():
        note_use(path)
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() == sha256:
                return path
    # A damaged copy is only a copy.
    key = package_key(model_id, engine, file)
    storage.download(settings.data_bucket, key, path, sha256=sha256)
    make_room(settings)
    return path
