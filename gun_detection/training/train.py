"""The whole recipe: data set version in, model version out."""

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from torch import Tensor

from gun_detection.database import open_session
from gun_detection.database.models import DatasetVersion, GateDecision, ModelVersion
from gun_detection.detector.architectures import build_detector, select_device
from gun_detection.detector.inference import EVALUATION_FLOOR, Predictor
from gun_detection.errors import NotFoundError, TransientError
from gun_detection.evaluation.matching import match_all
from gun_detection.evaluation.threshold import OperatingTarget, choose_threshold
from gun_detection.release.champion import current_champion
from gun_detection.release.gate import why_again
from gun_detection.release.registry import NewModel, publish
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from gun_detection.training.checkpoints import Checkpoints
from gun_detection.training.config import TrainingConfig
from gun_detection.training.hardware import device_name
from gun_detection.training.launch import run_distributed
from gun_detection.training.loop import Progress, State
from gun_detection.training.step import select_precision
from gun_detection.training.validate import predict_all
from gun_detection.training.worker import Job, open_data, run

# torch has no class for it.
_LOST_READER = "DataLoader worker"
_DATASET_ID = re.compile("[0-9a-f]+")
_PACKAGES = ("gun-detection", "torch", "torchvision", "numpy", "pillow", "faster-coco-eval")


@dataclass(frozen=True)
class Need:
    """Whether there is something to learn or to judge, and why or why not."""

    needed: bool
    reason: str


def latest_dataset(session: Session) -> DatasetVersion:
    """The newest data set version; raises `NotFoundError` when there is none."""
    newest = select(DatasetVersion).order_by(DatasetVersion.created_at.desc()).limit(1)
    dataset = session.scalar(newest)
    if dataset is None:
        raise NotFoundError(
            "there is no data set yet: run the ingest_dataset DAG or `gun-detection ingest`",
            reason="NO_DATASET",
        )
    return dataset


def get_dataset(session: Session, name: str | None) -> DatasetVersion:
    """The data set version with this id, or the only one whose id begins so; the newest for none.

    Raises `NotFoundError`.
    """
    if not name:
        return latest_dataset(session)
    # What is no part of an id is not asked for: PostgreSQL takes no NUL.
    found = (
        session.scalars(
            select(DatasetVersion).where(func.starts_with(DatasetVersion.id, name)).limit(2)
        ).all()
        if _DATASET_ID.fullmatch(name)
        else []
    )
    if not found:
        raise NotFoundError(f"there is no data set version {name!r}: see `gun-detection datasets`")
    if len(found) > 1:
        raise NotFoundError(
            f"more than one data set version begins with {name!r}: give more of its id, as "
            "`gun-detection datasets` shows it"
        )
    return found[0]


def find_trained(
    session: Session, dataset_id: str, config: TrainingConfig, *, deleted: bool = False
) -> ModelVersion | None:
    """The model that this recipe gave on this data set, if it was trained before.

    One whose weights were `deleted` since is of no use but to know that it was judged.
    """
    found = select(ModelVersion).where(
        ModelVersion.dataset_id == dataset_id, ModelVersion.config_hash == config.hash()
    )
    if not deleted:
        found = found.where(ModelVersion.deleted_at.is_(None))
    return session.scalar(found.order_by(ModelVersion.created_at.desc()).limit(1))


def training_need(session: Session, dataset_id: str, config: TrainingConfig) -> Need:
    """Training again on the same data with the same recipe would give the same model.

    That one is judged again where it may end otherwise, as long as its weights are there.
    """
    model = find_trained(session, dataset_id, config, deleted=True)
    if model is None:
        return Need(True, f"no model has this recipe on data set {dataset_id[:12]}")
    last = session.scalar(
        select(GateDecision)
        .where(GateDecision.candidate_id == model.id)
        .order_by(GateDecision.id.desc())
        .limit(1)
    )
    if last is None:
        return Need(True, f"{model.id} was trained but has not been through the gate")
    if model.deleted_at is None and (why := why_again(session, last)):
        return Need(True, why)
    return Need(
        False,
        f"neither data nor configuration changed: {model.id} was trained on "
        f"{dataset_id[:12]} and judged",
    )


def train(
    dataset_id: str,
    config: TrainingConfig,
    settings: Settings,
    storage: Storage,
    on_progress: Callable[[Progress], None] = lambda _: None,
    *,
    resume: bool = True,
) -> ModelVersion:
    """Train on a data set version and publish the best epoch as a model version.

    Goes on from the last checkpoint of the same recipe and data, unless not to `resume`. On a
    machine with several GPUs it trains on all of them. The operating threshold is chosen on the
    validation split; the holdout is not touched.
    Raises `TrainingError`, `DatasetError`, `ModelError` or `NotFoundError`, and `TransientError`
    when a training process was lost.
    """
    name = f"{config.detector.architecture}-{dataset_id[:8]}-{config.hash()[:8]}"
    checkpoints = Checkpoints(storage, settings.data_bucket, name)
    if not resume:
        checkpoints.delete()
    device = select_device(settings.device)
    processes = settings.training_processes or (
        torch.cuda.device_count() if device.type == "cuda" else 1
    )
    job = Job(dataset_id, config, name)
    if processes > 1:
        best, state = run_distributed(job, processes, settings, on_progress)
    else:
        best, state = _in_this_process(job, settings, storage, on_progress)
    model = build_detector(config.detector)
    model.load_state_dict(best)
    data = open_data(dataset_id, config, settings, storage)
    predictor = Predictor(model, device, EVALUATION_FLOOR, mirrored=config.detector.mirrored)
    truths, found = predict_all(predictor, data.validation)
    matched = match_all(truths, found)
    point = choose_threshold(matched, config.target)
    if point.threshold < settings.score_floor:
        # Below it, scoring stores nothing.
        fixed = OperatingTarget(kind="fixed", value=settings.score_floor)
        note = f"{point.threshold:g} was chosen, which is below the score floor"
        notes = {"target": config.target, "note": "; ".join(filter(None, [point.note, note]))}
        point = choose_threshold(matched, fixed).model_copy(update=notes)
    record = _record(state, device, processes, config) | {
        "tensorboard_run": name,
        "operating_point": point.model_dump(mode="json"),
    }
    with open_session(settings) as session:
        champion = current_champion(session)
    new = NewModel(
        model=model.cpu(),
        detector=config.detector,
        config=config.model_dump(mode="json"),
        config_hash=config.hash(),
        dataset_id=dataset_id,
        parent_id=champion.id if champion else None,
        threshold=point.threshold,
        training=record,
    )
    # In a session of its own: a transaction would be open while the weights are uploaded.
    with open_session(settings) as session:
        published = publish(new, settings, storage, session)
    checkpoints.delete()
    return published


def _in_this_process(
    job: Job, settings: Settings, storage: Storage, on_progress: Callable[[Progress], None]
) -> tuple[dict[str, Tensor], State]:
    """What a device or a lost reader of pictures ends goes on in a new process, as elsewhere."""
    try:
        return run(job, settings, storage, on_progress)
    except RuntimeError as error:
        lost = isinstance(error, torch.AcceleratorError) or _LOST_READER in str(error)
        if not lost or isinstance(error, torch.OutOfMemoryError):
            raise
        message = f"the training was lost, and goes on from its last checkpoint: {error}"
        raise TransientError(message, reason="WORKER_LOST") from error


def _record(
    state: State, device: torch.device, processes: int, config: TrainingConfig
) -> dict[str, Any]:
    """What is kept of how it went."""
    cuda = device.type == "cuda"
    return {
        "best_epoch": state.best_epoch,
        "history": state.history,
        "events": state.events,
        "device": device.type,
        "hardware": device_name(device),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "precision": select_precision(config.precision, device),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "steps": state.step,
        "images": state.images,
        "wall_seconds": round(state.seconds, 1),
        "cpu_seconds": round(state.cpu_seconds, 1),
        "gpu_seconds": round(state.seconds * processes, 1) if cuda else 0.0,
        "images_per_second": round(state.images / max(state.seconds, 1e-9), 2),
        "peak_memory_mb": state.peak_memory_mb,
    }
