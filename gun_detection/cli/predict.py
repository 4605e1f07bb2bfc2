"""The command that looks at local pictures."""

from pathlib import Path
from typing import Annotated

import typer

from gun_detection.cli.options import AsJson, Threshold, read_settings
from gun_detection.cli.output import progress, show, show_predictions


def predict(
    images: Annotated[list[Path], typer.Argument(help="Picture files, and folders of them.")],
    model: Annotated[str, typer.Option(help="As for `evaluate`.")] = "champion",
    threshold: Threshold = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for pictures with the boxes drawn in, JSON and CSV of all."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find guns in local pictures; nothing is stored in the database."""
    from gun_detection.release.packages import open_by_name
    from gun_detection.scoring.local import document, find_pictures, look_at, write_files

    settings = read_settings()
    pictures = find_pictures(images, besides=output)
    name, engine, limit = open_by_name(model, settings)
    limit = limit if threshold is None else threshold
    overlays = None
    if output is not None:
        overlays = output / "overlays"
        overlays.mkdir(parents=True, exist_ok=True)
    with progress("predict", as_json) as advance:
        looked = look_at(pictures, engine, settings, limit, overlays, advance)
    found = document(looked, name, limit)
    if output is not None:
        write_files(output, found)
    if as_json:
        show(found, as_json)
    else:
        show_predictions(found)
    if any(one.error for one in looked):
        raise typer.Exit(1)
