"""The whole recipe: data set version in, model version out."""

import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from sqlalchemy import select
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import DatasetVersion, GateDecision, ModelVersion
from gun_detection.datasets.manifest import load_manifest
from gun_detection.datasets.torch_dataset import DetectionDataset
from gun_detection.detector.architectures import build_detector, select_device
from gun_detection.detector.inference import Predictor
from gun_detection.detector.weights import initialize
from gun_detection.errors import DatasetError, NotFoundError
from gun_detection.evaluation.metrics import choose_threshold
from gun_detection.release.registry import NewModel, current_champion, publish
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from gun_detection.training.config import TrainingConfig
from gun_detection.training.loop import FitResult, Progress, fit, predict_all

logger = logging.getLogger(__name__)


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


def find_trained(session: Session, dataset_id: str, config: TrainingConfig) -> ModelVersion | None:
    """The model that this recipe gave on this data set, if it was trained before."""
    return session.scalar(
        select(ModelVersion)
        .where(ModelVersion.dataset_id == dataset_id, ModelVersion.config_hash == config.hash())
        .order_by(ModelVersion.created_at.desc())
        .limit(1)
    )


def training_need(session: Session, dataset_id: str, config: TrainingConfig) -> Need:
    """Training again on the same data with the same recipe would give the same model."""
    model = find_trained(session, dataset_id, config)
    if model is None:
        return Need(True, f"no model has this recipe on data set {dataset_id[:12]}")
    judged = session.scalar(
        select(GateDecision.id).where(GateDecision.candidate_id == model.id).limit(1)
    )
    if judged is None:
        return Need(True, f"{model.id} was trained but has not been through the gate")
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
) -> ModelVersion:
    """Train on a data set version and publish the best epoch as a model version.

    The operating threshold is chosen on the validation split; the holdout is not touched.
    Raises `TrainingError`, `DatasetError`, `ModelError` or `NotFoundError`.
    """
    manifest = load_manifest(storage, settings.data_bucket, dataset_id)
    training = DetectionDataset(manifest, "train", settings, storage)
    validation = DetectionDataset(manifest, "validation", settings, storage)
    if not len(training) or not len(validation):
        raise DatasetError(
            f"data set {dataset_id[:12]} has {len(training)} pictures to train on and "
            f"{len(validation)} to validate with: ingest more"
        )
    torch.manual_seed(config.seed)
    model = build_detector(config.detector)
    initialize(model, config.detector, config.initial_weights, storage)
    device = select_device(settings.device)
    name = f"{config.detector.architecture}-{dataset_id[:8]}-{config.hash()[:8]}"
    logger.info(
        "training %s on %s: %d pictures, %d epochs", name, device, len(training), config.epochs
    )
    wall, cpu = time.monotonic(), time.process_time()
    result = fit(
        model, config, training, validation, device, settings.tensorboard_dir / name, on_progress
    )
    truths, found = predict_all(Predictor(model, device), validation)
    threshold = choose_threshold(truths, found)
    record = _record(result, device, name, time.monotonic() - wall, time.process_time() - cpu)
    with open_session(settings) as session:
        champion = current_champion(session)
        new = NewModel(
            model=model.cpu(),
            detector=config.detector,
            config=config.model_dump(mode="json"),
            config_hash=config.hash(),
            dataset_id=dataset_id,
            parent_id=champion.id if champion else None,
            threshold=threshold,
            training=record,
        )
        return publish(new, settings, storage, session)


def _record(
    result: FitResult, device: torch.device, run: str, wall: float, cpu: float
) -> dict[str, Any]:
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {
        "tensorboard_run": run,
        "best_epoch": result.best_epoch,
        "history": result.history,
        "device": device.type,
        "hardware": hardware,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
    }
