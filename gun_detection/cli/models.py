"""Commands that make, measure and use models."""

from pathlib import Path
from typing import Annotated

import typer

from gun_detection.cli.options import (
    AsJson,
    Dataset,
    Model,
    Out,
    Overrides,
    Preset,
    Recipe,
    Split,
    Threshold,
    Version,
    check_split,
    read_settings,
)
from gun_detection.cli.output import (
    progress,
    show,
    show_metrics,
    show_rows,
    write,
)


def train(
    preset: Preset = None,
    recipe: Recipe = None,
    overrides: Overrides = None,
    dataset: Dataset = None,
    again: Annotated[bool, typer.Option(help="Train although this was trained before.")] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume/--restart", help="Go on with a training that was interrupted."),
    ] = True,
    output: Out = None,
    history: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the numbers of each validation to this file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a candidate on a data set version."""
    from gun_detection import stages
    from gun_detection.training.config import parse_override, read_recipe

    changes = read_recipe(recipe) if recipe else {}
    changes |= dict(parse_override(text) for text in overrides or [])
    with progress("train", as_json) as advance:
        result = stages.train(
            read_settings(),
            dataset,
            preset,
            changes,
            lambda now: advance(now.step, now.steps),
            again=again,
            resume=resume,
        )
    write(result, output)
    write(result["history"], history)
    text = "Trained" if result["created"] else "Trained before:"
    show(result, as_json, f"{text} {result['model_id']}.")


def evaluate(
    model: Model,
    folder: Annotated[
        Path | None, typer.Option(help="Evaluate on this labelled folder or archive instead.")
    ] = None,
    dataset: Dataset = None,
    split: Split = "holdout",
    threshold: Threshold = None,
    output: Out = None,
    curve: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what each threshold gives to this file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model: average precision, false positives, precision and recall."""
    check_split(split)
    if folder is None and threshold is not None:
        raise typer.BadParameter("--threshold goes with --folder: a version is measured at its own")
    settings = read_settings()
    if folder is None:
        from gun_detection import stages

        with progress("evaluate", as_json) as advance:
            row = stages.evaluate(settings, model, dataset, split, advance)  # type: ignore[arg-type]
        write(row, output)
        if curve is not None:
            write(stages.curve(settings, row["evaluation_id"]), curve)
        show_metrics(row, as_json)
        return
    from gun_detection.detector.inference import EVALUATION_FLOOR
    from gun_detection.evaluation.curves import Curve
    from gun_detection.evaluation.evaluate import evaluate_folder
    from gun_detection.release.registry import open_predictor
    from gun_detection.storage import Storage

    name, predictor, limit = open_predictor(model, settings, EVALUATION_FLOOR)
    with progress("evaluate", as_json) as advance:
        result = evaluate_folder(
            predictor,
            limit if threshold is None else threshold,
            str(folder),
            settings,
            Storage(settings),
            advance,
        )
    document = {
        "model": name,
        **result.metrics.model_dump(mode="json"),
        "milliseconds_per_image": result.milliseconds_per_image,
        "rejected": result.rejected,
    }
    write(document, output)
    write(Curve(result.samples.matched).points(), curve)
    show_metrics(document, as_json)


def compare(
    first: Version,
    second: Version,
    dataset: Dataset = None,
    split: Split = "holdout",
    as_json: AsJson = False,
) -> None:
    """Compare two model versions on the same pictures, with the interval of each difference."""
    from gun_detection import stages

    check_split(split)
    result = stages.compare(read_settings(), first, second, dataset, split)  # type: ignore[arg-type]
    if as_json:
        show(result, as_json)
    else:
        show_rows(result["differences"], as_json, "")


def threshold(
    model: Version,
    target: Annotated[str, typer.Option(help="fppi, precision, f1 or fixed.")] = "fppi",
    value: Annotated[
        float, typer.Option(min=0, help="False positives per gun-free picture, or precision.")
    ] = 0.05,
    dataset: Dataset = None,
    as_json: AsJson = False,
) -> None:
    """Find the threshold of a model for a target, on the validation pictures."""
    from gun_detection import stages

    show(stages.threshold(read_settings(), model, target, value, dataset), as_json)


def import_model(
    file: Annotated[Path, typer.Argument(help="A .pth state dict or a .safetensors file.")],
    architecture: Annotated[str, typer.Option(help="Architecture of a .pth.")] = "resnet50_fpn",
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Operating threshold; default as recorded, or 0.7."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Publish trained weights from elsewhere as a model version, to be gated like any other."""
    from gun_detection.database import open_session
    from gun_detection.release.registry import import_file
    from gun_detection.storage import Storage

    settings = read_settings()
    with open_session(settings) as session:
        model = import_file(file, architecture, threshold, settings, Storage(settings), session)
    show({"model_id": model.id}, as_json, f"Imported as {model.id}.")


def models(as_json: AsJson = False) -> None:
    """List the model versions, newest first, with what became of each."""
    from sqlalchemy import text

    from gun_detection.database import open_session

    with open_session(read_settings()) as session:
        found = session.execute(text("SELECT * FROM model_states ORDER BY created_at DESC"))
        rows = [
            {
                "model": row.model_id,
                "state": row.state,
                "created": f"{row.created_at:%Y-%m-%d %H:%M}",
                "dataset": (row.dataset_id or "")[:12],
                "holdout_ap50": row.holdout_ap50,
                "threshold": row.threshold,
                "weights": "deleted" if row.deleted_at else "kept",
            }
            for row in found
        ]
    show_rows(rows, as_json, "There is no model version yet.")
