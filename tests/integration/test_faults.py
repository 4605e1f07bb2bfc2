"""Servers and the scheduler are killed in the middle of a scoring run; the run finishes."""

import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import pytest
from sqlalchemy import text

from embedded.config import PlatformError
from gun_detection.database import open_session
from gun_detection.datasets.synthetic import upload_pictures
from gun_detection.errors import TransientError
from gun_detection.storage import Storage
from tests.integration.conftest import SECONDS_TO_RUN, RunningPlatform, kill, wait_until

# The first of them starts the platform and trains its champion.
pytestmark = [pytest.mark.airflow, pytest.mark.timeout(1800)]

PICTURES = 160


def outcomes(platform: RunningPlatform, prefix: str) -> list[tuple[str, int]]:
    with open_session(platform.settings) as session:
        rows = session.execute(
            text(
                "SELECT u.key, COUNT(l.id) FROM upload u LEFT JOIN ledger l ON l.upload_id = u.id "
                "WHERE u.key LIKE :prefix GROUP BY u.key"
            ),
            {"prefix": prefix + "%"},
        )
        return [(row.key, row.count) for row in rows]


def wait_for_outcomes(platform: RunningPlatform, prefix: str) -> None:
    """Return when the run is in the middle: some pictures have an outcome and some have none."""
    deadline = time.monotonic() + 600
    while not any(count for _, count in outcomes(platform, prefix)):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize("victim", ["postgres", "seaweedfs", "scheduler"])
def test_a_scoring_run_survives_a_kill(
    platform: RunningPlatform, victim: str, champion: dict[str, Any]
) -> None:
    storage, bucket = Storage(platform.settings), platform.settings.uploads_bucket
    prefix = f"kill-{victim}/"
    pictures = upload_pictures(PICTURES, seed=sum(victim.encode()))
    for picture in pictures:
        storage.put(bucket, prefix + picture.name, picture.data)
    run_id = platform.airflow.trigger("score_uploads", {"bucket": bucket, "prefix": prefix})
    wait_for_outcomes(platform, prefix)
    kill(platform, victim)
    assert wait(platform, run_id) == "success"
    assert sorted(outcomes(platform, prefix)) == sorted((prefix + p.name, 1) for p in pictures)


@pytest.fixture
def stuck(platform: RunningPlatform) -> Iterator[None]:
    """No task begins until the end of the test."""

    def slots(number: int) -> None:
        path = "/pools/default_pool?update_mask=slots"
        platform.airflow.request("PATCH", path, json={"slots": number})

    before = platform.airflow.request("GET", "/pools/default_pool")["slots"]
    slots(0)
    yield
    slots(before)


@pytest.mark.usefixtures("champion", "stuck")
def test_a_run_that_hangs_is_told_of(platform: RunningPlatform) -> None:
    run_id = platform.airflow.trigger("score_uploads", {"bucket": platform.settings.uploads_bucket})
    wait_until(lambda: bool(platform.receiver.about(run_id)), SECONDS_TO_RUN + 300)
    [told] = platform.receiver.about(run_id)
    line, details, url = told.splitlines()
    assert line.startswith("*score_uploads has not ended after ")
    assert f"{run_id} is running" in details
    assert unquote(url) == f"{platform.airflow.url}/dags/score_uploads/runs/{run_id}"


@pytest.mark.usefixtures("champion")
def test_a_failed_run_is_cleared(platform: RunningPlatform) -> None:
    scope = {"bucket": platform.settings.uploads_bucket, "prefix": "cleared/"}
    run_id = platform.airflow.trigger("score_uploads", scope)
    page = f"/dags/score_uploads/dagRuns/{run_id}"
    platform.airflow.request("PATCH", page, json={"state": "failed"})
    everything = {"dry_run": False, "only_failed": False}
    platform.airflow.request("POST", f"{page}/clear", json=everything)
    assert wait(platform, run_id) == "success"


@pytest.fixture(scope="module")
def killed(platform: RunningPlatform, champion: dict[str, Any]) -> str:
    """A retrain run whose training was killed and went on, and whose candidate was rejected."""
    storage, bucket = Storage(platform.settings), platform.settings.data_bucket
    overrides = {"max_steps": 60, "checkpoint_minutes": 0.05, "seed": 7}
    # No candidate passes this: the other tests know the champion.
    policy = platform.folder / "strict.yaml"
    policy.write_text("rules: [{kind: at_least, metric: ap50, limit: 1, minimum_pictures: 1}]")
    conf = {"preset": "smoke", "overrides": overrides, "policy": str(policy)}
    run_id = platform.airflow.trigger("retrain", conf)
    deadline = time.monotonic() + 600
    # Named by their steps: the first one is of the start.
    while len([o.key for o in storage.list_objects(bucket, "checkpoints/")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    kill(platform, "scheduler")
    assert wait(platform, run_id, "retrain") == "success"
    return run_id


def test_a_training_that_was_killed_goes_on_from_its_checkpoint(
    platform: RunningPlatform, killed: str
) -> None:
    trained = platform.airflow.xcom("retrain", killed, "train")
    assert any(event.startswith("went on from the checkpoint") for event in trained["events"])
    storage, bucket = Storage(platform.settings), platform.settings.data_bucket
    assert not list(storage.list_objects(bucket, "checkpoints/"))


def test_a_rejected_candidate_leaves_the_champion_and_the_run_green(
    platform: RunningPlatform, champion: dict[str, Any], killed: str
) -> None:
    assert platform.airflow.xcom("retrain", killed, "gate")["passed"] is False
    tasks = platform.airflow.task_instances("retrain", killed)
    assert {task["task_id"]: task["state"] for task in tasks}["promote"] == "skipped"
    assert "is rejected" in platform.airflow.task_log("retrain", killed, "approve")
    with open_session(platform.settings) as session:
        now = session.scalar(text("SELECT model_id FROM current_champion"))
    assert now == champion["train"]["model_id"]


def wait(platform: RunningPlatform, run_id: str, dag_id: str = "score_uploads") -> str:
    """The final state; the API itself may be away for a while."""
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        try:
            return platform.airflow.wait(dag_id, run_id, timeout=60)
        except TransientError:
            time.sleep(1)
        except PlatformError as error:
            if error.reason != "TIMEOUT":
                raise
    return "timeout"
