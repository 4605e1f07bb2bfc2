"""The embedded platform survives what a machine does to it."""

import os
import signal
from contextlib import nullcontext

import pytest

from embedded.config import USERS, PlatformError
from embedded.stack import Stack
from gun_detection.storage import Storage
from tests.integration.conftest import (
    APPROVAL_HOURS,
    ENGINE,
    LATE_HOURS,
    PRESET,
    SOURCES,
    RunningPlatform,
    browser,
    kill,
    wait_until,
)

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(1800)]


def _healthy(stack: Stack) -> bool:
    return all(row.healthy for row in stack.status())


def test_every_component_is_healthy_and_a_second_start_changes_nothing(
    platform: RunningPlatform,
) -> None:
    # What the tests before did may keep it busy.
    wait_until(lambda: _healthy(platform.stack))
    before = {row.name: row.pid for row in platform.stack.status()}
    assert platform.stack.up(nullcontext, attached=True) is False
    assert {row.name: row.pid for row in platform.stack.status()} == before


def test_every_user_signs_in_and_nobody_else(platform: RunningPlatform) -> None:
    for user in USERS:
        with platform.stack.airflow(user) as client:
            assert client.token()
    wrong = {"username": "admin", "password": "admin"}
    with browser() as client:
        answer = client.post(f"{platform.airflow.url}/auth/token", json=wrong)
    assert answer.status_code == 401


def test_a_viewer_is_refused_what_an_operator_may_do(platform: RunningPlatform) -> None:
    with (
        platform.stack.airflow("viewer") as viewer,
        pytest.raises(PlatformError, match="403"),
    ):
        viewer.ensure_pool("theirs", 1, "")
    with platform.stack.airflow("operator") as operator:
        assert operator.request("GET", "/pools/gpu")["slots"] == 1


@pytest.mark.parametrize("name", ["postgres", "seaweedfs", "api-server", "scheduler"])
def test_a_killed_component_is_started_again(platform: RunningPlatform, name: str) -> None:
    storage, bucket = Storage(platform.settings), platform.settings.data_bucket
    storage.put(bucket, f"before/{name}", b"kept")
    pid = kill(platform, name)
    wait_until(lambda: platform.stack.supervisor.states()[name].pid not in (0, pid))
    wait_until(lambda: _healthy(platform.stack))
    assert storage.get(bucket, f"before/{name}") == b"kept"


def test_a_start_recovers_from_a_killed_supervisor(platform: RunningPlatform) -> None:
    supervisor = platform.stack.supervisor
    supervisor_pid = int((platform.stack.platform.directory / "supervisord.pid").read_text())
    os.kill(supervisor_pid, signal.SIGKILL)
    wait_until(lambda: not supervisor.running())
    assert platform.stack.up(nullcontext, attached=True) is True
    wait_until(lambda: _healthy(platform.stack))


def test_changed_settings_reach_the_services(
    platform: RunningPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUN_DETECTION_DATASET_SOURCE", '/some "folder" with 100% o\'dd; names')
    for name in (APPROVAL_HOURS, ENGINE, LATE_HOURS, PRESET, SOURCES):
        # What other tests rely on stays.
        monkeypatch.setenv(name, platform.environment[name])
    changed = Stack(platform.stack.platform)
    servers = {row.name: row.pid for row in changed.status()[:2]}
    assert changed.up(nullcontext, attached=True) is True
    rows = changed.status()
    assert {row.name: row.pid for row in rows[:2]} == servers
    scheduler = next(row for row in rows if row.name == "scheduler")
    with open(f"/proc/{scheduler.pid}/environ", "rb") as file:
        variables = file.read().split(b"\0")
    wanted = f"GUN_DETECTION_DATASET_SOURCE={os.environ['GUN_DETECTION_DATASET_SOURCE']}"
    assert wanted.encode() in variables
