"""A whole platform, with a real Airflow, in a temporary folder and on free ports."""

import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from embedded import environment as embedded_environment
from embedded.airflow import Airflow
from embedded.config import REPOSITORY, Ports, load_platform, port_variable
from embedded.stack import Stack
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.integration.receiver import Receiver, receive

# As long as people are waited for in the tests: also on a slow machine, where the question is
# looked at and answered in several requests, more than that takes.
SECONDS_TO_ANSWER = 120
# After which a run counts as late; most runs of the tests are shorter.
SECONDS_TO_RUN = 40
SOURCES, ENGINE = "GUN_DETECTION_SOURCES_FILE", "GUN_DETECTION_ENGINE"
PRESET = "GUN_DETECTION_TRAINING_PRESET"
# Looked at between the nights; the other bucket is scored when a test says so.
WATCHED = "watched-uploads"
LATE_HOURS = "GUN_DETECTION_LATE_HOURS"
APPROVAL_HOURS = "GUN_DETECTION_APPROVAL_HOURS"
WEBHOOK_PATH = "hooks/T0/secret-of-the-webhook"


@dataclass(frozen=True, slots=True)
class RunningPlatform:
    """`airflow` is signed in as admin; `environment` is what the tasks see.

    They read what is in `folder` where they run as another user, too.
    """

    folder: Path
    stack: Stack
    airflow: Airflow
    settings: Settings
    environment: dict[str, str]
    receiver: Receiver


def _webhook(port: int) -> dict[str, Any]:
    """As operators store it in Airflow, which each process has to ask for it in its own way."""
    return {
        "connection_id": "gun_detection_webhook",
        "conn_type": "http",
        "schema": "http",
        "host": "127.0.0.1",
        "port": port,
        "password": WEBHOOK_PATH,
    }


def _sources(folder: Path) -> str:
    path = folder / "sources.yaml"
    path.write_text(f"buckets: [{{bucket: uploads, watch: false}}, {{bucket: {WATCHED}}}]")
    # Tasks run as another user where this one is root.
    folder.chmod(0o755)
    return str(path)


def _dags(folder: Path) -> str:
    """The DAG files with another hour for the nights: none begins while the tests run.

    A night would train a model, or score what a test has put there for its own run.
    """
    hour = (datetime.now(UTC).hour + 12) % 24
    copies = folder / "dags"
    copies.mkdir()
    for file in (REPOSITORY / "dags").glob("*.py"):
        nights = re.sub(r'at_hours\("0 \d+ ', f'at_hours("0 {hour} ', file.read_text())
        (copies / file.name).write_text(nights)
    return str(copies)


@pytest.fixture(scope="session")
def platform() -> Iterator[RunningPlatform]:
    """Started once (about half a minute); it ends with this process, even when it is killed."""
    with (
        tempfile.TemporaryDirectory(prefix="gun-detection-platform-") as folder,
        receive() as receiver,
        # As long as the platform, as tests make a stack of it anew.
        pytest.MonkeyPatch.context() as session,
    ):
        owned, dags = embedded_environment.owned_environment, _dags(Path(folder))
        session.setattr(
            embedded_environment,
            "owned_environment",
            lambda *of: owned(*of) | {"AIRFLOW__CORE__DAGS_FOLDER": dags},
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PLATFORM_DIR", str(Path(folder) / "platform"))
            for name, port in asdict(Ports.free()).items():
                patch.setenv(port_variable(name), str(port))
            patch.setenv(APPROVAL_HOURS, str(SECONDS_TO_ANSWER / 3600))
            patch.setenv(LATE_HOURS, str(SECONDS_TO_RUN / 3600))
            patch.setenv(SOURCES, _sources(Path(folder)))
            # Packages for the others take a minute for each champion.
            patch.setenv(ENGINE, "eager")
            # Of a training that a test says nothing of.
            patch.setenv(PRESET, "smoke")
            stack = Stack(load_platform())
            # Made once, while the variables above are there.
            environment = stack.environment
        try:
            stack.up(nullcontext, attached=True)
            Storage(stack.settings).ensure_bucket(WATCHED)
            with stack.airflow() as airflow:
                airflow.request("POST", "/connections", json=_webhook(receiver.port))
                yield RunningPlatform(
                    Path(folder), stack, airflow, stack.settings, environment, receiver
                )
        finally:
            stack.down()
            stack.purge()


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def wait_for_messages(platform: RunningPlatform, subject: str, number: int = 1) -> list[str]:
    """So many messages about it: they are sent when Airflow knows already how a task ended."""
    wait_until(lambda: len(platform.receiver.about(subject)) >= number)
    return platform.receiver.about(subject)


def kill(platform: RunningPlatform, component: str) -> int:
    """Kill its process, whose id this is; one that is being started again is waited for."""

    pids: list[int] = []

    def runs() -> bool:
        pids.append(platform.stack.supervisor.states()[component].pid)
        return pids[-1] > 0

    # A process id of 0 would stand for this process and those that it started.
    wait_until(runs)
    os.kill(pids[-1], signal.SIGKILL)
    return pids[-1]


def browser() -> httpx.Client:
    """Asks like a browser, and waits as long where Airflow is busy."""
    return httpx.Client(trust_env=False, timeout=120)


# A few steps: this is about the loop, not about the detector.
QUICK = {"preset": "smoke", "overrides": {"max_steps": 2}, "policy": "trial"}


def run(platform: RunningPlatform, dag_id: str, conf: dict[str, Any]) -> dict[str, Any]:
    """What each task of a finished run returned; "skipped" for those that were."""
    platform.airflow.wait_for_dag(dag_id, timeout=300)
    run_id = platform.airflow.trigger(dag_id, conf)
    state = platform.airflow.wait(dag_id, run_id, timeout=600)
    tasks = platform.airflow.task_instances(dag_id, run_id)
    logs = "".join(
        platform.airflow.task_log(dag_id, run_id, task["task_id"], attempt=task["try_number"])
        for task in tasks
        if task["state"] == "failed" and task["map_index"] < 0
    )
    assert state == "success", logs[-3000:]
    skipped = {task["task_id"]: "skipped" for task in tasks if task["state"] == "skipped"}
    return {"run_id": run_id} | skipped | platform.airflow.results(dag_id, run_id)


@pytest.fixture(scope="session")
def champion(platform: RunningPlatform) -> dict[str, Any]:
    """The results of the first ingest and retrain, after which there is a champion."""
    ingested = run(platform, "ingest_dataset", {"source": "synthetic:80:3"})["ingest"]
    trained = run(platform, "retrain", QUICK | {"dataset_id": ingested["dataset_id"]})
    return {"ingest": ingested, **trained}
