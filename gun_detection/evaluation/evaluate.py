"""Evaluate a model version on a frozen split, or a model on a folder; with a report for people."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from sqlalchemy import Select, select
from sqlalchemy.exc import IntegrityError

from gun_detection.database import open_session
from gun_detection.database.models import DatasetVersion, Evaluation, ModelVersion
from gun_detection.datasets.checks import check_sample
from gun_detection.datasets.groups import Split
from gun_detection.datasets.layouts import Sample
from gun_detection.datasets.manifest import load_manifest, source_of
from gun_detection.datasets.sources import open_source
from gun_detection.datasets.torch_dataset import DetectionDataset
from gun_detection.detector.inference import EVALUATION_FLOOR, Predictor
from gun_detection.errors import DatasetError, ImageError, LabelError, NotFoundError
from gun_detection.evaluation.metrics import EVALUATOR_VERSION, Metrics, compute_metrics
from gun_detection.evaluation.report import render_report
from gun_detection.evaluation.samples import Labelled, Samples, measure
from gun_detection.evaluation.slices import compute_slices
from gun_detection.images import SandboxedDecoder
from gun_detection.release.registry import load_predictor
from gun_detection.settings import Settings
from gun_detection.storage import Storage

logger = logging.getLogger(__name__)


def evaluate_version(
    model: ModelVersion,
    dataset_id: str,
    settings: Settings,
    storage: Storage,
    split: Split = "holdout",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """The recorded evaluation of this model on this split, made now where there is none yet.

    No transaction is open while the detector looks at the pictures, which can take hours.
    """
    with open_session(settings) as session:
        dataset = session.get(DatasetVersion, dataset_id)
    if dataset is None:
        raise NotFoundError(
            f"there is no data set version {dataset_id!r}: see `gun-detection datasets`"
        )
    query = select(Evaluation).where(
        Evaluation.model_id == model.id,
        Evaluation.dataset_id == dataset_id,
        Evaluation.split == split,
        Evaluation.evaluator_version == EVALUATOR_VERSION,
    )
    if (known := _find(query, settings)) is not None:
        logger.info("%s was evaluated on the %s of %s before", model.id, split, dataset_id[:12])
        return known
    manifest = load_manifest(storage, settings.data_bucket, dataset_id)
    predictor = load_predictor(model, settings, storage, EVALUATION_FLOOR)
    # Large pictures as scoring decodes them, which is smaller; people are shown the whole.
    pictures = DetectionDataset(manifest, split, settings, storage, fit=predictor.input_size)
    whole = DetectionDataset(manifest, split, settings, storage)
    samples = measure(
        predictor,
        (load_labelled(pictures, index) for index in range(len(pictures))),
        lambda done: progress(done, len(pictures)),
    )
    groups = [sample.group for sample in samples.items]
    metrics = compute_metrics(samples.matched, model.threshold, groups)
    slices = compute_slices(samples.items, model.threshold)
    report = render_report(
        f"{model.id} on the {split} of {dataset.source}",
        metrics,
        slices,
        samples.items,
        lambda index: load_labelled(whole, index).pixels,
        _notes(model, samples),
    )
    if (known := _find(query, settings)) is not None:
        logger.info("%s was evaluated meanwhile by somebody else", model.id)
        return known
    prefix = f"evaluations/{model.id}/{dataset_id[:16]}-{split}-v{EVALUATOR_VERSION}"
    bucket = settings.data_bucket
    storage.put(bucket, f"{prefix}.json", samples.to_json(), content_type="application/json")
    key = f"{prefix}.html"
    storage.put(bucket, key, report.encode(), content_type="text/html; charset=utf-8")
    row = Evaluation(
        model_id=model.id,
        dataset_id=dataset_id,
        holdout_id=dataset.holdout_id,
        split=split,
        evaluator_version=EVALUATOR_VERSION,
        metrics=metrics.model_dump(mode="json")
        | {
            "slices": [item.model_dump(mode="json") for item in slices],
            "milliseconds_per_image": milliseconds(samples),
            "device": samples.device,
        },
        report_key=key,
    )
    try:
        with open_session(settings) as session:
            session.add(row)
    except IntegrityError:
        known = _find(query, settings)
        if known is None:
            raise
        logger.info("%s was evaluated meanwhile by somebody else", model.id)
        return known
    logger.info("%s on the %s: AP50 %s", model.id, split, metrics.ap50)
    return row


def _find(query: Select[Evaluation], settings: Settings) -> Evaluation | None:
    with open_session(settings) as session:
        return session.scalar(query)


def load_samples(evaluation: Evaluation, settings: Settings, storage: Storage) -> Samples:
    """The pictures of a recorded evaluation with what was found in each."""
    key = evaluation.report_key.removesuffix(".html") + ".json"
    return Samples.from_json(storage.get(settings.data_bucket, key))


@dataclass(frozen=True)
class FolderEvaluation:
    """Metrics on the usable pictures of a folder; `rejected` counts the others by reason."""

    samples: Samples
    metrics: Metrics
    rejected: dict[str, int]
    milliseconds_per_image: float


def evaluate_folder(
    predictor: Predictor,
    threshold: float,
    spec: str,
    settings: Settings,
    storage: Storage,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FolderEvaluation:
    """Evaluate on a folder or an archive in any known label format, without storing anything.

    What an ingest would refuse is refused for the same reason, but every file counts, also copies
    of another. Raises `DatasetError` when none is usable.
    """
    rejected: dict[str, int] = {}
    with open_source(spec, settings, storage) as source, SandboxedDecoder(settings) as decoder:
        total = len(source)

        def usable() -> Iterator[Labelled]:
            for done, sample in enumerate(source, start=1):
                progress(done, total)
                try:
                    yield _look_at(sample, decoder, predictor.input_size)
                except (ImageError, LabelError) as error:
                    rejected[error.reason] = rejected.get(error.reason, 0) + 1

        samples = measure(predictor, usable())
    if not samples.items:
        raise DatasetError(f"{spec}: no usable picture in it ({rejected or 'it is empty'})")
    return FolderEvaluation(
        samples, compute_metrics(samples.matched, threshold), rejected, milliseconds(samples)
    )


def _look_at(sample: Sample, decoder: SandboxedDecoder, fit: tuple[int, int]) -> Labelled:
    checked = check_sample(sample, sample.read(), lambda data: decoder.decode(data, fit=fit))
    if checked.image is None or checked.boxes is None:
        # The last one says why the picture is left out as a whole.
        fault = checked.problems[-1]
        raise LabelError(fault.message, reason=fault.reason)
    image = checked.image
    size = image.width, image.height
    return Labelled(sample.name, sample.name, "", image.pixels, checked.boxes, size)


def load_labelled(pictures: DetectionDataset, index: int) -> Labelled:
    """A picture of a split with its boxes, decoded."""
    entry = pictures.entries[index]
    image, _ = pictures[index]
    return Labelled(
        entry.name,
        entry.group,
        source_of(entry),
        image.permute(1, 2, 0).numpy(),
        entry.box_array(),
        (entry.width, entry.height),
    )


def milliseconds(samples: Samples) -> float:
    """The median time of a picture, from pixels to detections."""
    times = [sample.seconds for sample in samples.items]
    return round(1000 * float(np.median(times)), 1)


def _notes(model: ModelVersion, samples: Samples) -> list[str]:
    """What belongs beside the numbers: where they were measured, how the threshold came about."""
    notes = [f"Measured on {samples.device}."]
    point = model.training.get("operating_point")
    if point:
        target = point["target"]
        goal = target["kind"] if target["kind"] == "f1" else f"{target['kind']} {target['value']}"
        text = f"The threshold was chosen on validation pictures for the target {goal}"
        notes.append(f"{text}: {point['note']}." if point["note"] else f"{text}.")
    return notes
