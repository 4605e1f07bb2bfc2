"""Commands that decide on a champion and let it work."""

import getpass
from typing import Annotated

import typer

from gun_detection.cli.options import (
    AsJson,
    Dataset,
    Reason,
    Threshold,
    Version,
    read_settings,
)
from gun_detection.cli.output import progress, show


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

    result = stages.gate(read_settings(), candidate, dataset, min_ap50)
    show(result, as_json, result["explanation"])


def promote(
    model: Version,
    reason: Reason = "promoted by hand",
    force: Annotated[bool, typer.Option("--force", help="Without a passed gate.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a model version champion."""
    from gun_detection import stages

    settings = read_settings()
    decision = None if force else stages.require_passed(settings, model)
    result = stages.promote(settings, model, getpass.getuser(), reason, decision)
    show(result, as_json, f"The champion is {result['champion_id']}.")


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
    show(result, as_json, f"The champion is {result['champion_id']}.")


def score(
    bucket: Annotated[str | None, typer.Option(help="Bucket; the uploads by default.")] = None,
    prefix: Annotated[str, typer.Option(help="Only keys that start with this.")] = "",
    threshold: Threshold = None,
    as_json: AsJson = False,
) -> None:
    """Score every upload that the champion has not scored."""
    from gun_detection import stages

    settings = read_settings()
    plan = stages.plan_scoring(settings, bucket, prefix, threshold)
    with progress("score", as_json) as advance:
        before = 0
        for shard_id in plan["shard_ids"]:
            result = stages.score_shard(
                settings,
                shard_id,
                lambda done, _, before=before: advance(before + done, plan["planned"]),  # type: ignore[misc]
            )
            before += result["scored"] + result["quarantined"]
    show(stages.finish_scoring(settings, plan["run_id"]), as_json)
