"""Commands that decide on a champion and let it work."""

import getpass
from pathlib import Path
from typing import Annotated

import typer

from gun_detection.cli.options import (
    MOST_ROWS,
    AsJson,
    Dataset,
    Reason,
    Version,
    read_settings,
)
from gun_detection.cli.output import progress, show, show_decision, show_rows

# What the DAGs do beside it, and no command can.
_UNTOLD = (
    " Nobody is told of it, and what another champion has scored is scored again from the next "
    "run of rescore_uploads on (05:00 UTC)."
)


def gate(
    candidate: Version,
    dataset: Dataset = None,
    policy: Annotated[
        str | None,
        typer.Option(help="standard, trial or a YAML file; by default the settings' own."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a candidate against the champion; a rejection is a result, and exit code 0."""
    from gun_detection import stages

    result = stages.gate(read_settings(), candidate, dataset, policy, getpass.getuser())
    show_decision(result, as_json)


def promote(
    model: Version,
    reason: Reason = "",
    force: Annotated[
        bool, typer.Option("--force", help="Without a passed gate; takes a --reason.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a model version champion."""
    from gun_detection import stages

    if force and not reason.strip():
        raise typer.BadParameter(
            "say why, as no gate does: it goes into the promotion log", param_hint="--reason"
        )
    settings = read_settings()
    decision = None if force else stages.require_passed(settings, model)
    reason = reason or "promoted by hand"
    result = stages.promote(settings, model, getpass.getuser(), reason, decision)
    show(result, as_json, f"The champion is {result['champion_id']}.{_UNTOLD}")


def rollback(
    reason: Reason,
    to: Annotated[
        str | None, typer.Option(help="An earlier champion; the last by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Go back to an earlier champion, from the next scoring run on."""
    from gun_detection import stages

    result = stages.rollback(read_settings(), getpass.getuser(), reason, to)
    show(result, as_json, f"The champion is {result['champion_id']}.{_UNTOLD}")


def card(
    model: Version,
    output: Annotated[Path, typer.Option("--out", help="Folder for the card and its pictures.")],
    as_json: AsJson = False,
) -> None:
    """Write the model card of a version, as HTML and as Markdown."""
    from gun_detection import stages

    files = stages.model_card(read_settings(), model)
    for name, data in files.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    document = {"files": [str(output / name) for name in files]}
    show(document, as_json, f"Wrote {output / 'card.html'} and {output / 'card.md'}.")


def package(
    model: Version,
    engine: Annotated[
        str | None,
        typer.Option(help="One engine; by default those that GUN_DETECTION_ENGINE may choose."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a version ready for the fast engines, each checked against the reference."""
    from gun_detection import stages

    with progress("package", as_json) as advance:
        result = stages.package(read_settings(), model, engine, advance)
    show_rows(result["packages"], as_json, "The engine is eager: there is nothing to package.")


def prune(
    keep: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_ROWS, help="Newest versions to keep; default as the settings."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete the weights of old model versions; those of champions stay."""
    from gun_detection import stages

    result = stages.prune(read_settings(), keep, dry_run=dry_run)
    verb = "Would delete" if dry_run else "Deleted"
    names = ", ".join(result["deleted"]) or "nothing"
    show(result, as_json, f"{verb} the weights of {names}.")
