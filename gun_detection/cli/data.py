"""Commands about data and the installation."""

import dataclasses
from typing import Annotated

import typer

from gun_detection.cli.options import (
    AsJson,
    Out,
    read_settings,
)
from gun_detection.cli.output import progress, show, show_rows, write


def upgrade(as_json: AsJson = False) -> None:
    """Bring the database to this version's schema."""
    from gun_detection.database import upgrade

    before, after = upgrade(read_settings())
    text = f"already at {after}" if before == after else f"upgraded from {before} to {after}"
    show({"before": before, "after": after}, as_json, f"The database is {text}.")


def ingest(
    source: Annotated[
        str | None,
        typer.Argument(
            help="synthetic[:N[:seed]], kaggle[:owner/name], s3://bucket/prefix, "
            "or a folder or an archive."
        ),
    ] = None,
    output: Out = None,
    as_json: AsJson = False,
) -> None:
    """Check a source and store it as a data set version."""
    from gun_detection import stages

    with progress("ingest", as_json) as advance:
        result = stages.ingest(source, read_settings(), advance)
    write(result, output)
    text = "Stored data set" if result["created"] else "Nothing new: this is data set"
    show(result, as_json, f"{text} {result['dataset_id'][:16]}.")


def datasets(as_json: AsJson = False) -> None:
    """List the data set versions, newest first."""
    from sqlalchemy import select

    from gun_detection.database import open_session
    from gun_detection.database.models import DatasetVersion

    with open_session(read_settings()) as session:
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
    show_rows(rows, as_json, "There is no data set version yet.")


def doctor(as_json: AsJson = False) -> None:
    """Check settings, database, storage and hardware; exit code 1 when something is wrong."""
    from gun_detection.doctor import examine

    checks = [dataclasses.asdict(check) for check in examine(read_settings())]
    show_rows(checks, as_json, "")
    if not all(check["ok"] for check in checks):
        raise typer.Exit(1)
