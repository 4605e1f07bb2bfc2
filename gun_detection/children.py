"""Work in a process of its own: it ends with its parent and speaks in JSON lines.

The child prints `{"progress": …}` and `{"log": …}` lines, and `{"error": …}` or `{"result": …}` at
its end: what came of it is known also where the disk is full.
"""

import ctypes
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gun_detection import errors
from gun_detection.errors import GunDetectionError

_PR_SET_PDEATHSIG = 1


@dataclass
class Ended:
    """What came of a child: its exit code, the lines of its standard error, and what it said at
    its end, which is neither for one that was killed; whether that was for its silence."""

    code: int
    lines: list[str]
    silent: bool = False
    error: GunDetectionError | None = None
    result: Any = None


def run_child(
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    on_progress: Callable[[dict[str, Any]], None],
    patience: float | None = None,
) -> Ended:
    """Run to the end. Log records are passed on; standard error goes to a file in the folder.

    A child that says nothing for longer than `patience` seconds hangs, and is killed.
    """
    with (folder / "log").open("w+", errors="replace") as log:
        with (
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                preexec_fn=end_with_parent,
            ) as process,
            _Patience(process, patience) as waiting,
        ):
            said = _relay(process, on_progress, waiting.heard)
        log.seek(0)
        lines = log.read().splitlines()
    error = _error(said.get("error"))
    return Ended(process.returncode, lines, waiting.lost, error, said.get("result"))


class _Patience:
    """Kills a process that nothing was `heard` of for so many seconds; None waits for ever."""

    def __init__(self, process: subprocess.Popen[str], seconds: float | None) -> None:
        self.lost = False
        self._process, self._seconds = process, seconds
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._seconds is not None:
            self._thread.join()

    def heard(self) -> None:
        self._last = time.monotonic()

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._over.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() - self._last > self._seconds:
                self.lost = True
                self._process.kill()
                return


def report_error(error: GunDetectionError) -> None:
    """In the child: say what it fails with."""
    content = {"kind": type(error).__name__, "message": error.message, "reason": error.reason}
    _say(error=content)


def report_result(result: Any) -> None:
    """In the child: say what it made."""
    _say(result=result)


def report_progress(**content: Any) -> None:
    """In the child: say how far it is."""
    _say(progress=content)


def relay_logs() -> None:
    """In the child: send what the package logs on to the parent."""
    logging.getLogger("gun_detection").addHandler(_Relay())


class _Relay(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        content = {"name": record.name, "level": record.levelno, "message": record.getMessage()}
        _say(log=content)


def _say(**content: Any) -> None:
    # At once with the end of its line: another thread may speak at the same time.
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def _error(content: dict[str, Any] | None) -> GunDetectionError | None:
    if content is None:
        return None
    kind: type[GunDetectionError] = getattr(errors, content["kind"])
    return kind(content["message"], reason=content["reason"])


def _relay(
    process: subprocess.Popen[str],
    on_progress: Callable[[dict[str, Any]], None],
    heard: Callable[[], None],
) -> dict[str, Any]:
    """Pass progress and log on until the process ends; what else it said.

    It does not outlive an interruption.
    """
    assert process.stdout is not None
    said: dict[str, Any] = {}
    try:
        for line in process.stdout:
            heard()
            content = _parse(line)
            if "progress" in content:
                on_progress(content["progress"])
            elif "log" in content:
                entry = content["log"]
                logging.getLogger(entry["name"]).log(entry["level"], "%s", entry["message"])
            else:
                said |= content
    except BaseException:
        process.terminate()
        raise
    return said


def _parse(line: str) -> dict[str, Any]:
    """What the child says of itself; libraries in it print as they like."""
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def end_with_parent() -> None:
    """Have this process sent SIGTERM when the thread that started it ends, however it does."""
    # A worker that lives on after its task was killed would hold the GPU against the next attempt.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
