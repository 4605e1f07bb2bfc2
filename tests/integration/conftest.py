"""A whole platform, with a real Airflow, in a temporary folder and on free ports."""

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from embedded.airflow import Airflow
from embedded.config import Ports, load_platform, port_variable
from embedded.stack import Stack
from gun_detection.settings import Settings


@dataclass(frozen=True, slots=True)
class RunningPlatform:
    """`airflow` is signed in as admin; `environment` is what the tasks see."""

    stack: Stack
    airflow: Airflow
    settings: Settings
    environment: dict[str, str]


@pytest.fixture(scope="session")
def platform() -> Iterator[RunningPlatform]:
    """Started once (about half a minute); it ends with this process, even when it is killed."""
    with tempfile.TemporaryDirectory(prefix="gun-detection-platform-") as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PLATFORM_DIR", str(Path(folder) / "platform"))
            for name, port in asdict(Ports.free()).items():
                patch.setenv(port_variable(name), str(port))
            stack = Stack(load_platform())
        try:
            stack.up(nullcontext, attached=True)
            with stack.airflow() as airflow:
                yield RunningPlatform(stack, airflow, stack.settings, stack.environment)
        finally:
            stack.down()
            stack.purge()


# A few steps: this is about the loop, not about the detector.
QUICK = {"preset": "smoke", "overrides": {"max_steps": 2}, "min_ap50": 0.0}


def run(platform: RunningPlatform, dag_id: str, conf: dict[str, Any]) -> dict[str, Any]:
    """What each task of a finished run returned; "skipped" for those that were."""
    platform.airflow.wait_for_dag(dag_id)
    run_id = platform.airflow.trigger(dag_id, conf)
    state = platform.airflow.wait(dag_id, run_id, timeout=600)
    tasks = platform.airflow.task_instances(dag_id, run_id)
    logs = "".join(
        platform.airflow.task_log(dag_id, run_id, task["task_id"], attempt=task["try_number"])
        for task in tasks
        if task["state"] == "failed" and task["map_index"] < 0
    )
    assert state == "success", logs[-3000:]
    results: dict[str, Any] = {"run_id": run_id}
    for task in tasks:
        if task["state"] == "skipped":
            results[task["task_id"]] = "skipped"
        elif task["map_index"] < 0:
            results[task["task_id"]] = platform.airflow.xcom(dag_id, run_id, task["task_id"])
    return results


@pytest.fixture(scope="session")
def champion(platform: RunningPlatform) -> dict[str, Any]:
    """The results of the first ingest and retrain, after which there is a champion."""
    ingested = run(platform, "ingest_dataset", {"source": "synthetic:80:3"})["ingest"]
    trained = run(platform, "retrain", QUICK | {"dataset_id": ingested["dataset_id"]})
    return {"ingest": ingested, **trained}
