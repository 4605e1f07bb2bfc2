"""Evaluate a model version on a frozen split, or a model on a folder; with a report for people."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from gun_detection.database.models import DatasetVersion, Evaluation, ModelVersion
from gun_detection.datasets.groups import Split
from gun_detection.datasets.manifest import load_manifest
from gun_detection.datasets.sources import open_source
from gun_detection.datasets.torch_dataset import DetectionDataset
from gun_detection.detector.architectures import select_device
from gun_detection.detector.inference import Detections, Predictor
from gun_detection.errors import DatasetError, ImageError, LabelError, NotFoundError
from gun_detection.evaluation.metrics import EVALUATOR_VERSION, Metrics, compute_metrics
from gun_detection.evaluation.report import Picture, render_report
from gun_detection.images import SandboxedDecoder
from gun_detection.release.registry import load_model
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from gun_detection.training.loop import predict_all

logger = logging.getLogger(__name__)


def evaluate_version(
    model: ModelVersion,
    dataset_id: str,
    settings: Settings,
    storage: Storage,
    session: Session,
    split: Split = "holdout",
) -> Evaluation:
    """The recorded evaluation of this model on this split, made now where there is none yet."""
    dataset = session.get(DatasetVersion, dataset_id)
    if dataset is None:
        raise NotFoundError(
            f"there is no data set version {dataset_id!r}: see `gun-detection datasets`"
        )
    known = session.scalar(
        select(Evaluation).where(
            Evaluation.model_id == model.id,
            Evaluation.dataset_id == dataset_id,
            Evaluation.split == split,
            Evaluation.evaluator_version == EVALUATOR_VERSION,
        )
    )
    if known is not None:
        logger.info("%s was evaluated on the %s of %s before", model.id, split, dataset_id[:12])
        return known
    manifest = load_manifest(storage, settings.data_bucket, dataset_id)
    pictures = DetectionDataset(manifest, split, settings, storage)
    predictor = Predictor(load_model(model, settings, storage), select_device(settings.device))
    truths, found = predict_all(predictor, pictures)
    metrics = compute_metrics(truths, found, model.threshold)
    report = render_report(
        f"{model.id} on the {split} of {dataset.source}",
        metrics,
        truths,
        found,
        lambda index: _picture(pictures, index),
    )
    key = f"evaluations/{model.id}/{dataset_id[:16]}-{split}-v{EVALUATOR_VERSION}.html"
    storage.put(settings.data_bucket, key, report.encode(), content_type="text/html; charset=utf-8")
    row = Evaluation(
        model_id=model.id,
        dataset_id=dataset_id,
        holdout_id=dataset.holdout_id,
        split=split,
        evaluator_version=EVALUATOR_VERSION,
        metrics=metrics.model_dump(),
        report_key=key,
    )
    session.add(row)
    session.flush()
    logger.info("%s on the %s: %s", model.id, split, metrics)
    return row


@dataclass(frozen=True)
class FolderEvaluation:
    """Metrics on the usable pictures of a folder; `rejected` counts the others by reason."""

    metrics: Metrics
    rejected: dict[str, int]


def evaluate_folder(
    predictor: Predictor,
    threshold: float,
    spec: str,
    settings: Settings,
    storage: Storage,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FolderEvaluation:
    """Evaluate on a folder or an archive in any known label format, without storing anything.

    Every file counts, also copies of another. Raises `DatasetError` when none is usable.
    """
    truths: list[NDArray[np.float64]] = []
    found: list[Detections] = []
    rejected: dict[str, int] = {}
    with open_source(spec, settings, storage) as source, SandboxedDecoder(settings) as decoder:
        for done, sample in enumerate(source, start=1):
            progress(done, len(source))
            try:
                label = sample.label()
                if isinstance(label, LabelError):
                    raise label
                pixels = decoder.decode(sample.read()).pixels
            except (ImageError, LabelError) as error:
                rejected[error.reason] = rejected.get(error.reason, 0) + 1
                continue
            height, width = pixels.shape[:2]
            # Loose labels may pass the edge a little; no detection can.
            truths.append(label.pixels(width, height).clip(0, [width, height, width, height]))
            found += predictor([pixels])
    if not truths:
        raise DatasetError(f"{spec}: no usable picture in it ({rejected or 'it is empty'})")
    return FolderEvaluation(compute_metrics(truths, found, threshold), rejected)


def _picture(pictures: DetectionDataset, index: int) -> Picture:
    image, _ = pictures[index]
    return Picture(pictures.entries[index].name, image.permute(1, 2, 0).numpy())
