"""Commands that score uploads and look after what could not be scored."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from gun_detection.cli.options import MOST_ROWS, AsJson, read_settings
from gun_detection.cli.output import err, progress, show, show_rows
from gun_detection.errors import GunDetectionError
from gun_detection.text import printable_lines


def _named(bucket: str | None) -> str | None:
    """A callback: a variable that is not set would have all buckets taken for the one named."""
    if bucket == "":
        raise typer.BadParameter("it is empty: name a bucket, or leave this out for all of them")
    return bucket


Bucket = Annotated[
    str | None,
    typer.Option(help="Bucket; all that are configured by default.", callback=_named),
]
Prefix = Annotated[str | None, typer.Option(help="Only keys that start with this.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="List and say what would be scored, no more.")
]
SummaryThreshold = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        min=0,
        max=1,
        help="For the counts of this run's summary; the model's own by default. What is stored "
        "does not depend on it.",
    ),
]
Jobs = Annotated[
    int,
    typer.Option(min=1, help="Shards scored at the same time; a fast GPU has time for several."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Score more than the cap without asking.")]
Model = Annotated[str, typer.Option(help="Version that scores; one that is or was champion.")]
Reasons = Annotated[
    list[str] | None, typer.Option("--reason", help="Reason code; may be given several times.")
]
Run = Annotated[str | None, typer.Option("--run", help="Only what this run quarantined.")]


def score(
    bucket: Bucket = None,
    prefix: Prefix = None,
    threshold: SummaryThreshold = None,
    model: Model = "champion",
    jobs: Jobs = 1,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Score every upload that no model has scored."""
    _run("new", bucket, prefix, threshold, model, jobs, dry_run, yes, as_json)


def rescore(
    bucket: Bucket = None,
    prefix: Prefix = None,
    threshold: SummaryThreshold = None,
    model: Model = "champion",
    jobs: Jobs = 1,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Score with the present champion what an earlier one has scored, the newest first."""
    _run("rescore", bucket, prefix, threshold, model, jobs, dry_run, yes, as_json)


def _run(
    kind: Literal["new", "rescore"],
    bucket: str | None,
    prefix: str | None,
    threshold: float | None,
    model: str,
    jobs: int,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    from gun_detection import stages

    settings = read_settings()
    survey = stages.survey_uploads(settings, kind, bucket, prefix, model)
    if dry_run:
        _show_survey(survey, as_json)
        return
    limit = None
    if survey["confirm"]:
        limit = survey["planned"]
        if not yes and not as_json:
            _show_survey(survey, as_json)
        if not yes and (as_json or not typer.confirm(f"Score all {limit:,}?")):
            limit = survey["confirm_images"]
            err.print(f"Scoring {limit:,} of {survey['planned']:,}; --yes scores all.")
    plan = stages.plan_scoring(settings, survey, bucket, prefix, threshold, limit=limit)
    scored: dict[int, int] = {}
    failed: list[Exception] = []
    with progress("score", as_json) as advance:

        def score_shard(shard_id: int) -> None:
            def note(done: int, _: int) -> None:
                scored[shard_id] = done
                advance(sum(scored.values()), plan["planned"])

            # The other shards go on, as with the tasks of the DAG.
            try:
                stages.score_shard(settings, shard_id, note)
            except Exception as error:
                failed.append(error)
                text = escape(printable_lines(str(error)))
                err.print(f"[red]shard {shard_id} failed:[/] {text}", soft_wrap=True)

        if jobs == 1:
            for shard_id in plan["shard_ids"]:
                score_shard(shard_id)
        else:
            _in_parallel(score_shard, plan["shard_ids"], jobs)
    try:
        result = stages.finish_scoring(settings, plan["run_id"])
    except GunDetectionError as error:
        if not failed:
            raise
        # It names what is missing, but not why.
        err.print(escape(printable_lines(error.message)), soft_wrap=True)
    if failed:
        raise failed[0]
    show(result, as_json, result["text"])


def _in_parallel(function: Callable[[int], None], shard_ids: list[int], jobs: int) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for _ in pool.map(function, shard_ids):
                pass
        except KeyboardInterrupt:
            # The processes that score end with this one; what they have written stays.
            os._exit(130)


def _show_survey(survey: dict[str, Any], as_json: bool) -> None:
    hidden = ("text", "confirm", "confirm_images", "confirm_minutes")
    show({k: v for k, v in survey.items() if k not in hidden}, as_json)


quarantine = typer.Typer(help="Uploads that could not be scored, and why.", no_args_is_help=True)


@quarantine.command("list")
def list_quarantine(
    reasons: Reasons = None,
    bucket: Bucket = None,
    prefix: Prefix = None,
    run: Run = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST_ROWS, help="Most rows; everything by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what is in quarantine, the newest first."""
    from gun_detection import stages

    conditions = _conditions(reasons, bucket, prefix, run)
    rows = stages.list_quarantine(read_settings(), limit, **conditions)
    if not as_json:
        shown = ("upload_id", "bucket", "key", "reason", "tries", "scored_at", "message")
        rows = [{name: row[name] for name in shown} for row in rows]
    show_rows(rows, as_json, _nothing(conditions))


@quarantine.command("retry")
def retry_quarantine(
    upload_ids: Annotated[
        list[int] | None, typer.Argument(help="Uploads; or choose by the options.")
    ] = None,
    reasons: Reasons = None,
    bucket: Bucket = None,
    prefix: Prefix = None,
    run: Run = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything in quarantine.")] = False,
    as_json: AsJson = False,
) -> None:
    """Have uploads judged anew by the next scoring run."""
    from gun_detection import stages

    conditions = _conditions(reasons, bucket, prefix, run)
    if not upload_ids and not any(conditions.values()) and not everything:
        raise typer.BadParameter("name uploads, choose by an option, or say --all")
    if upload_ids and (any(conditions.values()) or everything):
        raise typer.BadParameter("name uploads, or choose by options: not both")
    result = stages.retry_quarantine(read_settings(), upload_ids or (), **conditions)
    nothing = "None of these is in quarantine." if upload_ids else _nothing(conditions)
    waiting = result["waiting"]
    show(result, as_json, f"{waiting} uploads wait for the next run." if waiting else nothing)


@quarantine.command("export")
def export_quarantine(
    output: Annotated[Path, typer.Option("--out", help="Folder for the table and the files.")],
    reasons: Reasons = None,
    bucket: Bucket = None,
    prefix: Prefix = None,
    run: Run = None,
    as_json: AsJson = False,
) -> None:
    """Write a table of what is in quarantine, and the files themselves: treat them as hostile."""
    from gun_detection import stages

    conditions = _conditions(reasons, bucket, prefix, run)
    result = stages.export_quarantine(read_settings(), output, **conditions)
    show(result, as_json, f"Wrote {result['rows']} rows and {result['files']} files to {output}.")


def _conditions(
    reasons: list[str] | None, bucket: str | None, prefix: str | None, run: str | None
) -> dict[str, Any]:
    return {"reasons": reasons or [], "bucket": bucket, "prefix": prefix or "", "run_id": run}


def _nothing(conditions: dict[str, Any]) -> str:
    """What to say where nothing was found: a reason with a slip of the pen finds nothing either."""
    if any(conditions.values()):
        return "Nothing in quarantine fits these options; without them `list` shows all of it."
    return "Nothing is in quarantine."
