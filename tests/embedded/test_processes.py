"""Services as children: they get exactly their environment, and never outlive their parent."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embedded import processes
from embedded.launch import kill_processes_of, processes_of
from embedded.processes import (
    Service,
    code_revision,
    marker_of,
    revision,
    start_service,
    stop_service,
)

_SLEEP = (sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)")


def _wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_service_gets_its_own_environment_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUN_DETECTION_HOME", "of the caller")
    code = "import json, os; print(json.dumps([dict(os.environ), os.getcwd()]))"
    odd = "100% \"odd\" 'value'; #\n"
    service = Service(
        "show", (sys.executable, "-c", code), {"LC_ALL": "C.UTF-8", "ODD": odd}, directory=tmp_path
    )
    assert start_service(service, tmp_path).wait() == 0
    environment, folder = json.loads((tmp_path / "show.log").read_text())
    assert environment.pop("PLATFORM_SERVICE") == f"{tmp_path}:show"
    assert environment == {"LC_ALL": "C.UTF-8", "ODD": odd}
    assert folder == str(tmp_path)


def test_a_service_stops_when_asked(tmp_path: Path) -> None:
    service = Service("sleep", _SLEEP, {}, directory=tmp_path)
    process = start_service(service, tmp_path)
    _wait_for(tmp_path / "sleep.log", "ready")
    stop_service(service, process)
    assert process.returncode == -signal.SIGTERM


def test_a_service_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {_SLEEP[-1]}"
    service = Service("stubborn", (*_SLEEP[:-1], code), {}, directory=tmp_path, patience=1)
    process = start_service(service, tmp_path)
    _wait_for(tmp_path / "stubborn.log", "ready")
    stop_service(service, process)
    assert process.returncode == -signal.SIGKILL


def test_a_service_ends_with_its_killed_parent(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from embedded.processes import Service, start_service
start_service(Service("sleep", {_SLEEP!r}, {{}}, directory=Path({str(tmp_path)!r})),
              Path({str(tmp_path)!r}))
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    _wait_for(tmp_path / "sleep.log", "ready")
    owner = marker_of("sleep", tmp_path)
    assert len(processes_of(owner)) == 1
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while processes_of(owner):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_killed_service_left_behind_ends_at_its_next_start(tmp_path: Path) -> None:
    code = f"import subprocess, sys; subprocess.run({_SLEEP!r}, start_new_session=True)"
    service = Service("forks", (sys.executable, "-c", code), {}, directory=tmp_path)
    owner = marker_of("forks", tmp_path)
    process = start_service(service, tmp_path)
    _wait_for(tmp_path / "forks.log", "ready")
    process.kill()
    process.wait()
    [orphan] = processes_of(owner)
    (tmp_path / "forks.log").unlink()
    process = start_service(service, tmp_path)
    _wait_for(tmp_path / "forks.log", "ready")
    assert orphan not in processes_of(owner)
    assert kill_processes_of(owner) == 2
    process.wait()


def test_the_revision_follows_the_environment(tmp_path: Path) -> None:
    service = Service("sleep", _SLEEP, {"A": "1"})
    assert revision(service, tmp_path) == revision(Service("sleep", _SLEEP, {"A": "1"}), tmp_path)
    assert revision(service, tmp_path) != revision(Service("sleep", _SLEEP, {"A": "2"}), tmp_path)


def test_the_revision_of_the_code_follows_what_services_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "REPOSITORY", tmp_path)
    module = tmp_path / "gun_detection" / "a.py"
    compiled = module.parent / "__pycache__" / "a.pyc"
    for path in (tmp_path / "requirements.txt", module, compiled):
        path.parent.mkdir(exist_ok=True)
        path.write_text("1")
    before = code_revision()
    compiled.write_text("2")
    assert code_revision() == before
    module.write_text("2")
    changed = code_revision()
    (tmp_path / "requirements.txt").write_text("2")
    assert len({before, changed, code_revision()}) == 3


def test_secrets_stay_out_of_messages() -> None:
    assert "hidden" not in repr(Service("sleep", _SLEEP, {"PASSWORD": "hidden"}))
