"""`make demo`: once round the whole loop in the real Airflow, and one table of what came of it."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sqlalchemy import text

from embedded.airflow import FINISHED, Airflow
from embedded.config import PlatformError
from embedded.stack import Report, Stack
from gun_detection.database import open_session
from gun_detection.datasets.manifest import image_key, load_manifest
from gun_detection.datasets.synthetic import hold_on_side, upload_pictures
from gun_detection.settings import Settings
from gun_detection.storage import Storage

PREFIX = "demo/"
_PICTURES = 24
_TIMEOUT = 3600.0


@dataclass
class Run:
    """A finished DAG run: what its tasks returned, their states, and how long it took."""

    state: str
    seconds: float
    results: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, str] = field(default_factory=dict)


def demo(stack: Stack, console: Console, report: Report, data: str | None) -> None:
    """Ingest `data` (drawn pictures by default), retrain, upload pictures, score them.

    Safe to run again: nothing is doubled. Raises `PlatformError` when a stage fails.
    """
    start = time.monotonic()
    source = _source(data)
    stack.up(report)
    settings = stack.settings
    with stack.airflow() as airflow:

        def run(dag_id: str, conf: dict[str, Any]) -> Run:
            return _run(airflow, console, dag_id, conf)

        ingested = run("ingest_dataset", {"source": source})
        dataset = ingested.results["ingest"]
        # Real pictures are too hard for minutes on a CPU: the loop is shown, and AP50 as it is.
        policy = None if source.startswith("synthetic") else "trial"
        trained = run("retrain", {"dataset_id": dataset["dataset_id"], "policy": policy})
        with report("Upload pictures"):
            _upload(settings, dataset["dataset_id"], drawn=source.startswith("synthetic"))
        scored = run("score_uploads", {"bucket": settings.uploads_bucket, "prefix": PREFIX})
    console.print()
    runs = {"ingest": ingested, "retrain": trained, "score": scored}
    console.print(_table(settings, dataset, runs, time.monotonic() - start))


def _source(data: str | None) -> str:
    """The specification for the ingest DAG; a path becomes absolute, as tasks run elsewhere."""
    if not data or data.startswith(("synthetic", "kaggle", "s3://")):
        return data or "synthetic"
    path = Path(data).expanduser().resolve()
    if not path.exists():
        raise PlatformError(
            f"DATA={data}: there is no such folder or archive; "
            "give a path, kaggle, s3://bucket/prefix or synthetic",
            reason="NOT_FOUND",
        )
    if os.geteuid() == 0 or os.access(path, os.R_OK):
        return str(path)
    raise PlatformError(f"DATA={data} cannot be read by this user: change its rights")


def _run(airflow: Airflow, console: Console, dag_id: str, conf: dict[str, Any]) -> Run:
    """Trigger a DAG, show how it goes, and collect what its tasks returned."""
    start = time.monotonic()
    airflow.wait_for_dag(dag_id)
    run_id = airflow.trigger(dag_id, conf)
    with console.status(f"{dag_id} …") as status:
        while (state := airflow.dag_run(dag_id, run_id)["state"]) not in FINISHED:
            if time.monotonic() - start > _TIMEOUT:
                raise PlatformError(f"{dag_id} is still {state}: look at {airflow.url}")
            status.update(f"{dag_id}: {escape(_activity(airflow, dag_id, run_id))}")
            time.sleep(1)
    tasks = airflow.task_instances(dag_id, run_id)
    run = Run(state, time.monotonic() - start)
    run.tasks = {task["task_id"]: task["state"] for task in tasks}
    if state != "success":
        failed = [task["task_id"] for task in tasks if task["state"] == "failed"]
        raise PlatformError(
            f"{dag_id} failed in {', '.join(failed)}: "
            f"look at {airflow.url}/dags/{dag_id}/runs/{run_id}"
        )
    run.results = airflow.results(dag_id, run_id)
    console.print(f"[green]✓[/] {dag_id} [dim]({run.seconds:.0f} s)[/]")
    return run


def _activity(airflow: Airflow, dag_id: str, run_id: str) -> str:
    """What is running, with the last line of progress in its log."""
    running = [t for t in airflow.task_instances(dag_id, run_id) if t["state"] == "running"]
    if not running:
        return "waiting"
    task = running[0]
    log = airflow.task_log(
        dag_id, run_id, task["task_id"], attempt=task["try_number"], map_index=task["map_index"]
    )
    progress = [line for line in log.splitlines() if line.endswith("s left")]
    return f"{task['task_id']} {progress[-1] if progress else ''}"


def _upload(settings: Settings, dataset_id: str, *, drawn: bool) -> None:
    """Put pictures into the uploads bucket, unless they are there: good ones and three odd ones."""
    storage = Storage(settings)
    if drawn:
        pictures = {p.name: p.data for p in upload_pictures(_PICTURES, seed=1)}
    else:
        entries = load_manifest(storage, settings.data_bucket, dataset_id).split("holdout")
        pictures = {
            f"{dataset_id[:8]}/{entry.name}": storage.get(
                settings.data_bucket, image_key(entry.sha256)
            )
            for entry in entries[:_PICTURES]
        }
    good = next(iter(pictures.values()))
    odd = {
        "corrupt.jpg": good[: len(good) // 2],
        "notes.jpg": b"These are only words, whatever the name says.\n",
        "rotated.jpg": hold_on_side(good),
    }
    for name, content in (pictures | odd).items():
        storage.put_if_absent(
            settings.uploads_bucket, PREFIX + name, content, content_type="image/jpeg"
        )


def _table(
    settings: Settings, dataset: dict[str, Any], runs: dict[str, Run], total: float
) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(name, escape(value))

    _dataset_rows(row, dataset)
    _model_rows(row, runs["retrain"])
    _scoring_rows(row, settings)
    times = ", ".join(f"{name} {run.seconds:.0f} s" for name, run in runs.items())
    row("time", f"{times}, all told {total:.0f} s")
    return table


def _dataset_rows(row: Callable[[str, str], None], dataset: dict[str, Any]) -> None:
    new = "stored" if dataset["created"] else "unchanged, nothing new stored"
    row("data set", f"{dataset['dataset_id'][:16]} from {dataset['source']} ({new})")
    row(
        "",
        f"{dataset['images']} images with {dataset['boxes']} guns: "
        f"{dataset['train_images']} train, {dataset['validation_images']} validation, "
        f"{dataset['holdout_images']} holdout",
    )
    row(
        "",
        f"{dataset['duplicates']} surplus copies, {dataset['rejected_images']} images and "
        f"{dataset['rejected_boxes']} boxes rejected, {dataset['clipped_boxes']} boxes clipped",
    )


def _model_rows(row: Callable[[str, str], None], retrain: Run) -> None:
    if retrain.tasks["train"] == "skipped":
        row("candidate", "none: neither data nor configuration changed since the last one")
        return
    trained, metrics = retrain.results["train"], retrain.results["evaluate_candidate"]
    row("candidate", f"{trained['model_id']}, threshold {trained['threshold']:.2f}")
    row("", f"holdout AP50 {_number(metrics['ap50'])}, AP {_number(metrics['ap'])}")
    alarms = _number(metrics["false_positives_per_negative"])
    row("", f"false positives per gun-free picture {alarms} ({metrics['negatives']} pictures)")
    decision = retrain.results["gate"]
    policy = f"policy {decision['policy']}, {len(decision['rules'])} rules"
    if decision["passed"]:
        row("gate", f"passed ({policy}), against {decision['champion_id'] or 'no champion'}")
    else:
        row("gate", f"{decision['explanation'].partition(' ')[2]} ({policy})")
    row("", decision["decision_url"])


def _scoring_rows(row: Callable[[str, str], None], settings: Settings) -> None:
    where = "FROM current_outcomes WHERE bucket = :bucket AND key LIKE 'demo/%'"
    bucket = {"bucket": settings.uploads_bucket}
    with open_session(settings) as session:
        champion = session.execute(text("SELECT model_id FROM current_champion")).scalar_one()
        counts = session.execute(
            text(f"SELECT outcome, COUNT(*) AS total {where} GROUP BY 1"), bucket
        )
        outcomes = {row.outcome: int(row.total) for row in counts}
        reasons = session.execute(
            text(f"SELECT key, reason {where} AND reason IS NOT NULL ORDER BY key"), bucket
        ).all()
        detections, images = session.execute(
            text(
                "SELECT COUNT(*), COUNT(DISTINCT key) FROM current_detections "
                "WHERE bucket = :bucket AND key LIKE 'demo/%'"
            ),
            bucket,
        ).one()
    row("champion", champion)
    row("scored", f"{outcomes.get('scored', 0)} pictures")
    bad = ", ".join(f"{key.rsplit('/', 1)[-1]} {reason}" for key, reason in reasons)
    row("quarantined", f"{outcomes.get('quarantined', 0)}: {bad}")
    row(
        "detections", f"{detections} in {images} pictures, all unreviewed until a person has looked"
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
