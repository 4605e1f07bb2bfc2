"""From data to a measured model: ingest, train, evaluate, compare, choose a threshold."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gun_detection.database import open_session
from gun_detection.database.models import Evaluation
from gun_detection.errors import SettingsError
from gun_detection.settings import Settings
from gun_detection.stages.links import report_url, tensorboard_url
from gun_detection.storage import Storage

# The detector's packages take seconds to import: only the stages that run it do.
if TYPE_CHECKING:
    from gun_detection.datasets.groups import Split
    from gun_detection.training.loop import Progress

Json = dict[str, Any]


def ingest(
    source: str | None, settings: Settings, progress: Callable[[int, int], None] | None = None
) -> Json:
    """Make a data set version of a source (the settings' own by default)."""
    from gun_detection.datasets.ingest import ingest as ingest_source

    spec = source or settings.dataset_source
    with open_session(settings) as session:
        result = ingest_source(spec, settings, Storage(settings), session, progress)
    return {
        "dataset_id": result.dataset_id,
        "created": result.created,
        "holdout_id": result.holdout_id,
        "source": spec,
        **result.counts,
        **{f"{name}_images": split["images"] for name, split in result.report["splits"].items()},
        "report_url": report_url(settings, result.page_key),
    }


def check_need(
    settings: Settings,
    dataset_id: str | None = None,
    preset: str | None = None,
    overrides: Json | None = None,
    policy: str | None = None,
) -> Json:
    """Whether the newest (or the given) data set and this recipe have not been judged yet.

    The gate's policy is read here, too: a faulty one is no surprise after hours of training.
    """
    from gun_detection.release.policy import load_policy
    from gun_detection.training.config import resolve_config
    from gun_detection.training.train import get_dataset, training_need

    load_policy(policy or settings.gate_policy)
    config = resolve_config(settings, preset, overrides)
    with open_session(settings) as session:
        dataset_id = get_dataset(session, dataset_id).id
        need = training_need(session, dataset_id, config)
    return {
        "needed": need.needed,
        "reason": need.reason,
        "dataset_id": dataset_id,
        "config_hash": config.hash(),
    }


def train(
    settings: Settings,
    dataset_id: str | None = None,
    preset: str | None = None,
    overrides: Json | None = None,
    on_progress: "Callable[[Progress], None]" = lambda _: None,
    *,
    again: bool = False,
    resume: bool = True,
) -> Json:
    """Train a candidate; the model of an earlier training of the same is it, unless `again`.

    A training that was interrupted goes on where it was, unless not to `resume`.
    """
    from gun_detection.training.config import resolve_config
    from gun_detection.training.train import find_trained, get_dataset
    from gun_detection.training.train import train as train_model

    config = resolve_config(settings, preset, overrides)
    with open_session(settings) as session:
        dataset_id = get_dataset(session, dataset_id).id
        model = None if again else find_trained(session, dataset_id, config)
    created = model is None
    if model is None:
        model = train_model(
            dataset_id, config, settings, Storage(settings), on_progress, resume=resume
        )
    history = model.training["history"]
    return {
        "model_id": model.id,
        "created": created,
        "dataset_id": dataset_id,
        "threshold": model.threshold,
        "validation_ap50": max((row["validation_ap50"] for row in history), default=None),
        "seconds": model.training["wall_seconds"],
        "history": history,
        "events": model.training["events"],
        "tensorboard_url": tensorboard_url(settings, model.training["tensorboard_run"]),
    }


def evaluate(
    settings: Settings,
    model: str,
    dataset_id: str | None = None,
    split: "Split" = "holdout",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Json:
    """Measure a model version on a data set's frozen split (the newest by default)."""
    from gun_detection.evaluation.evaluate import evaluate_version
    from gun_detection.release.champion import get_model
    from gun_detection.training.train import get_dataset

    with open_session(settings) as session:
        dataset_id = get_dataset(session, dataset_id).id
        version = get_model(session, model)
    row = evaluate_version(version, dataset_id, settings, Storage(settings), split, progress)
    return _evaluation(row, settings)


def curve(settings: Settings, evaluation_id: int) -> list[Json]:
    """What each threshold would have given in a recorded evaluation, highest first."""
    from gun_detection.evaluation.curves import Curve
    from gun_detection.evaluation.evaluate import load_samples

    with open_session(settings) as session:
        row = session.get_one(Evaluation, evaluation_id)
    return Curve(load_samples(row, settings, Storage(settings)).matched).points()


def compare(
    settings: Settings,
    first: str,
    second: str,
    dataset_id: str | None = None,
    split: "Split" = "holdout",
) -> Json:
    """Two model versions on the same pictures, with the interval of each difference."""
    from gun_detection.evaluation.compare import compare as compare_samples
    from gun_detection.evaluation.evaluate import evaluate_version, load_samples
    from gun_detection.release.champion import get_model
    from gun_detection.training.train import get_dataset

    storage = Storage(settings)
    with open_session(settings) as session:
        dataset_id = get_dataset(session, dataset_id).id
        versions = [get_model(session, name) for name in (first, second)]
    rows = [evaluate_version(v, dataset_id, settings, storage, split) for v in versions]
    samples = [load_samples(row, settings, storage).items for row in rows]
    thresholds = versions[0].threshold, versions[1].threshold
    differences = compare_samples(samples[0], samples[1], thresholds)
    return {
        "first": versions[0].id,
        "second": versions[1].id,
        "dataset_id": dataset_id,
        "split": split,
        "differences": [
            item.model_dump(mode="json") | {"clear": item.clear} for item in differences
        ],
    }


def threshold(
    settings: Settings,
    model: str,
    kind: str,
    value: float,
    dataset_id: str | None = None,
) -> Json:
    """The threshold of a model for a target, chosen on the validation split."""
    from pydantic import ValidationError

    from gun_detection.evaluation.evaluate import evaluate_version, load_samples
    from gun_detection.evaluation.threshold import OperatingTarget, choose_threshold
    from gun_detection.release.champion import get_model
    from gun_detection.training.train import get_dataset

    try:
        target = OperatingTarget.model_validate({"kind": kind, "value": value})
    except ValidationError as error:
        raise SettingsError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    storage = Storage(settings)
    with open_session(settings) as session:
        version = get_model(session, model)
        dataset_id = get_dataset(session, dataset_id or version.dataset_id).id
    row = evaluate_version(version, dataset_id, settings, storage, "validation")
    point = choose_threshold(load_samples(row, settings, storage).matched, target)
    return {
        "model_id": version.id,
        "own_threshold": version.threshold,
        **point.model_dump(mode="json"),
    }


def _evaluation(row: Evaluation, settings: Settings) -> Json:
    return {
        "evaluation_id": row.id,
        "model_id": row.model_id,
        "dataset_id": row.dataset_id,
        "split": row.split,
        **row.metrics,
        "report_url": report_url(settings, row.report_key),
    }
