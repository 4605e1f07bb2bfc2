"""What `up` does to a platform that runs; in place of the servers sleeps one process."""

import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from embedded.config import PlatformError, Ports, load_platform, remember_ports
from embedded.processes import Service
from embedded.stack import Stack
from embedded.supervision import ProcessState
from gun_detection.errors import SettingsError

_SLEEP = shutil.which("sleep") or "/bin/sleep"


def _stack() -> Stack:
    """A stack of one service, which has a port and follows the settings."""
    stack = Stack(load_platform())
    environment = stack.environment | {"PORT": str(stack.platform.ports.tensorboard)}
    stack.__dict__["groups"] = {
        "tensorboard": [Service("tensorboard", (_SLEEP, "600"), environment, ("tensorboard",))]
    }
    return stack


def _nothing(step: str) -> AbstractContextManager[object]:
    raise AssertionError(f"{step} was started")


@pytest.fixture
def running(purged: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    monkeypatch.setenv("PLATFORM_TENSORBOARD_PORT", str(Ports.free().tensorboard))
    stack = _stack()
    remember_ports(stack.platform)
    stack.supervisor.start(attached=True)
    stack.supervisor.start_group("tensorboard")
    until = time.monotonic() + 60
    while _state(stack).state != "RUNNING":
        assert time.monotonic() < until, _state(stack)
        time.sleep(0.1)
    yield stack
    stack.down()


def _state(stack: Stack) -> ProcessState:
    return stack.supervisor.states()["tensorboard"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("GUN_DETECTION_WATCH_SECOND", "5"), ("GUN_DETECTION_WATCH_SECONDS", "often")],
)
def test_a_wrong_setting_stops_nothing(
    running: Stack, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _state(running)
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        _stack().up(_nothing)
    assert _state(running).pid == before.pid


def test_a_taken_port_stops_nothing(running: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _state(running)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("PLATFORM_TENSORBOARD_PORT", str(server.getsockname()[1]))
        with pytest.raises(PlatformError, match="PLATFORM_TENSORBOARD_PORT"):
            _stack().up(_nothing)
    assert _state(running).pid == before.pid


def test_what_a_running_service_listens_on_is_its_own(
    running: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = running.platform.ports.tensorboard
    with socket.create_server(("127.0.0.1", port)):
        _stack()._check_ports()
        running.down()
        with pytest.raises(PlatformError, match=f"port {port} is taken"):
            _stack()._check_ports()
