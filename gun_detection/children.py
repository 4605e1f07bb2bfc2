"""Work in a process of its own: it ends with its parent and speaks in JSON lines.

The child prints `{"progress": …}` and `{"log": …}` lines, and leaves `error.json` in its folder
when it fails with an error of this package.
"""

import ctypes
import json
import logging
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gun_detection import errors
from gun_detection.errors import GunDetectionError

_PR_SET_PDEATHSIG = 1


def run_child(
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    on_progress: Callable[[dict[str, Any]], None],
) -> tuple[int, list[str]]:
    """Run to the end: (exit code, lines of its standard error). Log records are passed on."""
    with (folder / "log").open("w+", errors="replace") as log:
        with subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            preexec_fn=_end_with_parent,
        ) as process:
            _relay(process, on_progress)
        log.seek(0)
        return process.returncode, log.read().splitlines()


def reported_error(folder: Path) -> GunDetectionError | None:
    """The error that the child left behind."""
    file = folder / "error.json"
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    kind: type[GunDetectionError] = getattr(errors, content["kind"])
    return kind(content["message"], reason=content["reason"])


def report_error(folder: Path, error: GunDetectionError) -> None:
    """In the child: leave an error behind."""
    content = {"kind": type(error).__name__, "message": error.message, "reason": error.reason}
    (folder / "error.json").write_text(json.dumps(content))


def report_progress(**content: Any) -> None:
    """In the child: say how far it is."""
    print(json.dumps({"progress": content}), flush=True)


def relay_logs() -> None:
    """In the child: send what the package logs on to the parent."""
    logging.getLogger("gun_detection").addHandler(_Relay())


class _Relay(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        content = {"name": record.name, "level": record.levelno, "message": record.getMessage()}
        print(json.dumps({"log": content}), flush=True)


def _relay(process: subprocess.Popen[str], on_progress: Callable[[dict[str, Any]], None]) -> None:
    """Pass progress and log on until the process ends; it does not outlive an interruption."""
    assert process.stdout is not None
    try:
        for line in process.stdout:
            content = _parse(line)
            if "progress" in content:
                on_progress(content["progress"])
            elif "log" in content:
                entry = content["log"]
                logging.getLogger(entry["name"]).log(entry["level"], "%s", entry["message"])
    except BaseException:
        process.terminate()
        raise


def _parse(line: str) -> dict[str, Any]:
    """What the child says of itself; libraries in it print as they like."""
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _end_with_parent() -> None:
    # A worker that lives on after its task was killed would hold the GPU against the next attempt.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
