"""The command line without a platform that runs."""

import os
import shlex
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from urllib.request import proxy_bypass_environment

import pytest

import embedded.__main__
from embedded.config import REPOSITORY, Ports, load_platform, port_variable
from embedded.processes import write_service
from embedded.stack import Stack


@pytest.fixture
def variables(directory: Path) -> dict[str, str]:
    ports = {port_variable(name): str(port) for name, port in asdict(Ports.free()).items()}
    return dict(os.environ) | ports | {"PLATFORM_DIR": str(directory)}


def _run(variables: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "embedded", *arguments],
        env=variables,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_stopped_platform_is_not_healthy_and_stops_again(variables: dict[str, str]) -> None:
    status = _run(variables, "status")
    assert status.returncode == 1
    assert status.stdout.count("not healthy") == 9
    down = _run(variables, "down")
    assert (down.returncode, down.stdout) == (0, "Nothing was running.\n")


@pytest.mark.usefixtures("purged")
def test_a_taken_port_is_one_clear_line(variables: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        done = _run(variables | {"PLATFORM_TENSORBOARD_PORT": port}, "up")
    assert done.returncode == 1
    assert done.stdout == (
        f"error: port {port} is taken: stop the program that listens there, "
        "or set PLATFORM_TENSORBOARD_PORT to another port\n"
    )


def test_the_environment_is_for_a_shell(variables: dict[str, str], directory: Path) -> None:
    exports = _run(variables, "env").stdout
    script = (
        f"{exports}\necho $GUN_DETECTION_HOME; echo $AIRFLOW_HOME; "
        "command -v airflow; psql --version"
    )
    done = subprocess.run(
        ["/bin/bash", "-eu", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": ""},
    )
    *lines, version = done.stdout.splitlines()
    assert lines == [
        str(directory / "home"),
        str(directory / "airflow"),
        str(Path(sys.executable).with_name("airflow")),
    ]
    assert version.startswith("psql (PostgreSQL) 18")


def test_the_shell_gets_the_settings_that_the_services_have(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = """it's $(reboot) `id` "a"\nb.yaml"""
    monkeypatch.setenv("GUN_DETECTION_KEEP_MODELS", "50")
    monkeypatch.setenv("GUN_DETECTION_GATE_POLICY", policy)
    monkeypatch.setenv("GUN_DETECTION_DATA_BUCKET", "mine")
    monkeypatch.setenv("KAGGLE_KEY", "hidden")
    # As the last start wrote them, at other ports.
    stack = Stack(load_platform())
    for services in stack.groups.values():
        for service in services:
            write_service(service, stack.platform.services)
    exports = _run(variables, "env").stdout
    assert "KAGGLE" not in exports
    shown = ("KEEP_MODELS", "GATE_POLICY", "DATA_BUCKET", "S3_ENDPOINT_URL")
    echo = "; ".join(f'printf "%s\\0" "$GUN_DETECTION_{name}"' for name in shown)
    done = subprocess.run(
        ["/bin/bash", "-eu", "-c", f"{exports}\n{echo}"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": ""},
    )
    address = f"http://127.0.0.1:{variables['PLATFORM_S3_PORT']}"
    assert done.stdout.split("\0") == ["50", policy, "gun-detection-data", address, ""]


def test_the_shell_reaches_the_platform_behind_a_proxy(variables: dict[str, str]) -> None:
    variables |= {"http_proxy": "http://127.0.0.1:9", "NO_PROXY": "corp.example", "no_proxy": ""}
    exports = _run(variables, "env").stdout.splitlines()
    for name in ("NO_PROXY", "no_proxy"):
        assert f"export {name}=corp.example,127.0.0.1,localhost" in exports


def test_commands_reach_the_platform_behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    seen = []
    monkeypatch.setattr(
        embedded.__main__, "app", lambda: seen.append(proxy_bypass_environment("127.0.0.1"))
    )
    embedded.__main__.main()
    assert seen == [True]


def test_the_library_takes_what_the_environment_sets(variables: dict[str, str]) -> None:
    for line in _run(variables, "env").stdout.splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        variables[name] = shlex.split(value)[0]
    code = (
        "from gun_detection.settings import load_settings; print(load_settings().s3_endpoint_url)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"http://127.0.0.1:{variables['PLATFORM_S3_PORT']}"


def test_an_unknown_component_is_refused(variables: dict[str, str]) -> None:
    done = _run(variables, "logs", "webserver")
    assert done.returncode == 2
    assert "webserver" in done.stderr


def test_a_purge_deletes_the_state(variables: dict[str, str], directory: Path) -> None:
    _run(variables, "status")
    assert directory.exists()
    assert _run(variables, "down", "--purge").returncode == 0
    assert not directory.exists()
