"""`gun-detection …`: every stage of the loop by hand, the same calls that the DAGs make.

Exit codes: 0 done, 1 failed, 2 wrong use. With `--json` standard output holds one JSON document.
"""

import dataclasses
import getpass
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gun_detection import __version__
from gun_detection.errors import GunDetectionError, SettingsError, explain_os_error
from gun_detection.logs import configure_logging
from gun_detection.settings import Settings, load_settings

# torch, SQLAlchemy and the like are imported by the commands that need them: help stays quick.

app = typer.Typer(
    name="gun-detection",
    help="Find guns in images: data sets, training, evaluation, gate, promotion and scoring.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
database = typer.Typer(help="The database that holds everything but files.", no_args_is_help=True)
app.add_typer(database, name="db")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="Data set version; the newest by default.")
]
Preset = Annotated[
    str | None, typer.Option(help="smoke, cpu, gpu or seed; by default the settings' own.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the preset; repeatable."),
]
Model = Annotated[
    str, typer.Argument(help="`champion`, a model version, or a .safetensors or .pth file.")
]
Split = Annotated[str, typer.Option(help="holdout or validation.")]
Version = Annotated[str, typer.Argument(help="A model version; see `gun-detection models`.")]
Reason = Annotated[str, typer.Option(help="Why; goes into the promotion log.")]
Threshold = Annotated[
    float | None, typer.Option(min=0, max=1, help="Score threshold; the model's own by default.")
]


def _version(show: bool) -> None:
    if show:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@database.command()
def upgrade(as_json: AsJson = False) -> None:
    """Bring the database to this version's schema."""
    from gun_detection.database import upgrade

    before, after = upgrade(_settings())
    text = f"already at {after}" if before == after else f"upgraded from {before} to {after}"
    _show({"before": before, "after": after}, as_json, f"The database is {text}.")


@app.command()
def ingest(
    source: Annotated[
        str | None,
        typer.Argument(
            help="synthetic[:N[:seed]], kaggle[:owner/name], s3://bucket/prefix, "
            "or a folder or an archive."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a source and store it as a data set version."""
    from gun_detection import stages

    with _progress("ingest", as_json) as advance:
        result = stages.ingest(source, _settings(), advance)
    text = "Stored data set" if result["created"] else "Nothing new: this is data set"
    _show(result, as_json, f"{text} {result['dataset_id'][:16]}.")


@app.command()
def train(
    preset: Preset = None,
    overrides: Overrides = None,
    dataset: Dataset = None,
    again: Annotated[bool, typer.Option(help="Train although this was trained before.")] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume/--restart", help="Go on with a training that was interrupted."),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Train a candidate on a data set version."""
    from gun_detection import stages
    from gun_detection.training.config import parse_override

    changes = dict(parse_override(text) for text in overrides or [])
    with _progress("train", as_json) as advance:
        result = stages.train(
            _settings(),
            dataset,
            preset,
            changes,
            lambda now: advance(now.step, now.steps),
            again=again,
            resume=resume,
        )
    text = "Trained" if result["created"] else "Trained before:"
    _show(result, as_json, f"{text} {result['model_id']}.")


@app.command()
def evaluate(
    model: Model,
    folder: Annotated[
        Path | None, typer.Option(help="Evaluate on this labelled folder or archive instead.")
    ] = None,
    dataset: Dataset = None,
    split: Split = "holdout",
    threshold: Threshold = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model: average precision, false positives, precision and recall."""
    _check_split(split)
    if folder is None:
        from gun_detection import stages

        with _progress("evaluate", as_json) as advance:
            row = stages.evaluate(_settings(), model, dataset, split, advance)  # type: ignore[arg-type]
        _show_metrics(row, as_json)
        return
    from gun_detection.detector.inference import EVALUATION_FLOOR
    from gun_detection.evaluation.evaluate import evaluate_folder
    from gun_detection.storage import Storage

    settings = _settings()
    name, predictor, limit = _open_model(model, settings, EVALUATION_FLOOR)
    with _progress("evaluate", as_json) as advance:
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
    _show_metrics(document, as_json)


@app.command()
def compare(
    first: Version,
    second: Version,
    dataset: Dataset = None,
    split: Split = "holdout",
    as_json: AsJson = False,
) -> None:
    """Compare two model versions on the same pictures; a difference is clear when its interval
    leaves zero out."""
    from gun_detection import stages

    _check_split(split)
    result = stages.compare(_settings(), first, second, dataset, split)  # type: ignore[arg-type]
    if as_json:
        _show(result, as_json)
    else:
        _show_rows(result["differences"], as_json, "")


@app.command()
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

    _show(stages.threshold(_settings(), model, target, value, dataset), as_json)


@app.command()
def gate(
    candidate: Version,
    dataset: Dataset = None,
    min_ap50: Annotated[
        float | None, typer.Option(min=0, max=1, help="AP50 floor instead of the settings'.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a candidate against the champion; a rejection is a result, and exit code 0."""
    from gun_detection import stages

    result = stages.gate(_settings(), candidate, dataset, min_ap50)
    _show(result, as_json, result["explanation"])


@app.command()
def promote(
    model: Version,
    reason: Reason = "promoted by hand",
    force: Annotated[bool, typer.Option("--force", help="Without a passed gate.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a model version champion."""
    from gun_detection import stages

    settings = _settings()
    decision = None if force else stages.require_passed(settings, model)
    result = stages.promote(settings, model, getpass.getuser(), reason, decision)
    _show(result, as_json, f"The champion is {result['champion_id']}.")


@app.command()
def rollback(
    reason: Reason,
    to: Annotated[
        str | None, typer.Option(help="An earlier champion; the last by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Go back to an earlier champion, from the next scoring run on."""
    from gun_detection import stages

    result = stages.rollback(_settings(), getpass.getuser(), reason, to)
    _show(result, as_json, f"The champion is {result['champion_id']}.")


@app.command()
def score(
    bucket: Annotated[str | None, typer.Option(help="Bucket; the uploads by default.")] = None,
    prefix: Annotated[str, typer.Option(help="Only keys that start with this.")] = "",
    threshold: Threshold = None,
    as_json: AsJson = False,
) -> None:
    """Score every upload that the champion has not scored."""
    from gun_detection import stages

    settings = _settings()
    plan = stages.plan_scoring(settings, bucket, prefix, threshold)
    with _progress("score", as_json) as advance:
        before = 0
        for shard_id in plan["shard_ids"]:
            result = stages.score_shard(
                settings,
                shard_id,
                lambda done, _, before=before: advance(before + done, plan["planned"]),  # type: ignore[misc]
            )
            before += result["scored"] + result["quarantined"]
    _show(stages.finish_scoring(settings, plan["run_id"]), as_json)


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    model: Annotated[str, typer.Option(help="As for `evaluate`.")] = "champion",
    threshold: Threshold = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder for copies with the boxes drawn in.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find guns in local pictures; nothing is stored in the database."""
    from gun_detection.images import SandboxedDecoder, draw_boxes, encode_png

    settings = _settings()
    name, predictor, limit = _open_model(model, settings, settings.score_floor)
    limit = limit if threshold is None else threshold
    results: list[dict[str, Any]] = []
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    with SandboxedDecoder(settings) as decoder, _progress("predict", as_json) as advance:
        for number, path in enumerate(images, start=1):
            try:
                pixels = decoder.decode(path.read_bytes()).pixels
            except (OSError, GunDetectionError) as error:
                results.append({"file": str(path), "error": str(error)})
                continue
            [found] = predictor([pixels])
            kept = found.above(limit)
            rows = [
                {"box": [round(float(v), 1) for v in box], "score": round(float(score), 4)}
                for box, score in zip(kept.boxes, kept.scores, strict=True)
            ]
            results.append({"file": str(path), "detections": rows})
            if output is not None:
                drawn = draw_boxes(pixels, kept.boxes, kept.scores, limit)
                (output / f"{number:04d}-{path.stem}.png").write_bytes(encode_png(drawn))
            advance(number, len(images))
    document = {"model": name, "threshold": limit, "review": "unreviewed", "images": results}
    if as_json:
        _show(document, as_json)
    else:
        _print_predictions(document)
    if any("error" in result for result in results):
        raise typer.Exit(1)


@app.command("import-model")
def import_model(
    file: Annotated[Path, typer.Argument(help="A .pth state dict or a .safetensors file.")],
    architecture: Annotated[str, typer.Option(help="Architecture of a .pth.")] = "resnet50_fpn",
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Operating threshold.")] = 0.7,
    as_json: AsJson = False,
) -> None:
    """Publish trained weights from elsewhere as a model version, to be gated like any other."""
    from gun_detection.database import open_session
    from gun_detection.release.registry import import_file
    from gun_detection.storage import Storage

    settings = _settings()
    with open_session(settings) as session:
        model = import_file(file, architecture, threshold, settings, Storage(settings), session)
    _show({"model_id": model.id}, as_json, f"Imported as {model.id}.")


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the model versions, newest first, with the champion marked."""
    from sqlalchemy import select

    from gun_detection.database import open_session
    from gun_detection.database.models import Evaluation, ModelVersion
    from gun_detection.release.registry import current_champion

    with open_session(_settings()) as session:
        champion = current_champion(session)
        last = (
            select(Evaluation.metrics["ap50"].as_float())
            .where(Evaluation.model_id == ModelVersion.id, Evaluation.split == "holdout")
            .order_by(Evaluation.id.desc())
            .limit(1)
            .scalar_subquery()
        )
        rows = [
            {
                "model": model.id,
                "champion": champion is not None and model.id == champion.id,
                "created": f"{model.created_at:%Y-%m-%d %H:%M}",
                "dataset": (model.dataset_id or "")[:12],
                "holdout_ap50": ap50,
                "threshold": model.threshold,
            }
            for model, ap50 in session.execute(
                select(ModelVersion, last).order_by(ModelVersion.created_at.desc())
            )
        ]
    _show_rows(rows, as_json, "There is no model version yet.")


@app.command()
def datasets(as_json: AsJson = False) -> None:
    """List the data set versions, newest first."""
    from sqlalchemy import select

    from gun_detection.database import open_session
    from gun_detection.database.models import DatasetVersion

    with open_session(_settings()) as session:
        rows = [
            {
                "dataset": item.id if as_json else item.id[:16],
                "created": f"{item.created_at:%Y-%m-%d %H:%M}",
                "source": item.source,
                "images": item.images,
                "boxes": item.boxes,
                "train": item.train_images,
                "validation": item.validation_images,
                "holdout": item.holdout_images,
                "rejected": item.rejected_images,
                "duplicates": item.duplicates,
            }
            for item in session.scalars(
                select(DatasetVersion).order_by(DatasetVersion.created_at.desc())
            )
        ]
    _show_rows(rows, as_json, "There is no data set version yet.")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check settings, database, storage and hardware; exit code 1 when something is wrong."""
    from gun_detection.doctor import examine

    checks = [dataclasses.asdict(check) for check in examine(_settings())]
    _show_rows(checks, as_json, "")
    if not all(check["ok"] for check in checks):
        raise typer.Exit(1)


def main() -> None:
    """The program: a known error becomes one line and an exit code."""
    try:
        app()
    except SettingsError as error:
        _fail(error.message, error.reason, 2)
    except GunDetectionError as error:
        _fail(error.message, error.reason, 1)
    except OSError as error:
        _fail(explain_os_error(error), "OS_ERROR", 1)


def _fail(message: str, reason: str, code: int) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"error": {"reason": reason, "message": message}}))
    err.print(f"[red]error:[/] {escape(message)}", soft_wrap=True)
    raise SystemExit(code)


def _check_split(split: str) -> None:
    if split not in ("holdout", "validation"):
        raise typer.BadParameter("take holdout or validation", param_hint="--split")


def _settings() -> Settings:
    settings = load_settings()
    configure_logging(settings)
    return settings


def _open_model(name: str, settings: Settings, floor: float) -> tuple[str, Any, float]:
    """(name, predictor, threshold) of `champion`, a version or a file."""
    from gun_detection.detector.architectures import select_device
    from gun_detection.detector.inference import Predictor
    from gun_detection.release.registry import open_model

    found, detector, threshold = open_model(name, settings)
    return found, Predictor(detector, select_device(settings.device), floor), threshold


@contextmanager
def _progress(task: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; yields a function of (done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal) as bar:
        number = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(number, completed=done, total=total)


def _show(document: Mapping[str, Any], as_json: bool, headline: str | None = None) -> None:
    if as_json:
        print(json.dumps(document))
        return
    if headline:
        out.print(escape(headline), soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in document.items():
        if not isinstance(value, list | dict) or not headline:
            table.add_row(name.replace("_", " "), escape(_text(value)))
    out.print(table)


def _show_metrics(document: Mapping[str, Any], as_json: bool) -> None:
    """Numbers with their 95 % intervals; slices and the like are in the report."""
    if as_json:
        print(json.dumps(document))
        return
    intervals = document["intervals"]
    table = Table("", "value", "95 % interval", box=None, pad_edge=False)
    numbers = {k: v for k, v in document.items() if not isinstance(v, list | dict)}
    numbers |= {f"recall_at_fppi_{k}": v for k, v in document["recall_at_fppi"].items()}
    for name, value in numbers.items():
        span = intervals.get(name)
        text = f"{span[0]:.3f} to {span[1]:.3f}" if span else ""
        table.add_row(name.replace("_", " "), escape(_text(value)), text)
    out.print(table)


def _show_rows(rows: list[dict[str, Any]], as_json: bool, empty: str) -> None:
    if as_json:
        print(json.dumps(rows))
    elif not rows:
        out.print(empty)
    else:
        table = Table(*(name.replace("_", " ") for name in rows[0]), box=None)
        for row in rows:
            table.add_row(*(escape(_text(value)) for value in row.values()))
        out.print(table)


def _print_predictions(document: dict[str, Any]) -> None:
    table = Table("file", "guns", "scores", box=None)
    for result in document["images"]:
        if "error" in result:
            table.add_row(escape(result["file"]), "–", f"[red]{escape(result['error'])}[/]")
        else:
            scores = ", ".join(f"{row['score']:.2f}" for row in result["detections"])
            table.add_row(escape(result["file"]), str(len(result["detections"])), scores)
    out.print(table)
    out.print(
        f"[dim]{document['model']}, threshold {document['threshold']:.2f}. "
        "Unreviewed: a person has to look.[/]"
    )


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    return "–" if value is None else str(value)


if __name__ == "__main__":
    main()
