"""Starts a training in several processes through `torchrun`, and waits for what comes of it."""

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from gun_detection import errors
from gun_detection.errors import GunDetectionError, TransientError
from gun_detection.settings import Settings
from gun_detection.training.loop import Progress, State
from gun_detection.training.worker import Job

_PR_SET_PDEATHSIG = 1
_LAST_LINES = 15


def run_distributed(
    job: Job,
    processes: int,
    settings: Settings,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> tuple[dict[str, Tensor], State]:
    """`worker.run` in so many processes on this machine.

    Raises what the workers raised, or `TransientError` when one of them was killed.
    """
    with tempfile.TemporaryDirectory(prefix="gun-detection-training-") as name:
        folder = Path(name)
        content = {
            "dataset_id": job.dataset_id,
            "config": job.config.model_dump(mode="json"),
            "name": job.name,
        }
        (folder / "job.json").write_text(json.dumps(content))
        with (folder / "log").open("w+") as log:
            with subprocess.Popen(
                _command(processes, folder),
                env=_environment(settings, processes),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                preexec_fn=_end_with_parent,
            ) as process:
                _relay(process, on_progress)
            code = process.returncode
            log.seek(0)
            lines = log.read().splitlines()
        if code != 0:
            raise _failure(folder, code, lines)
        state = State(**json.loads((folder / "state.json").read_text()))
        return load_file(folder / "best.safetensors"), state


def _relay(process: subprocess.Popen[str], on_progress: Callable[[Progress], None]) -> None:
    """Pass progress and log on until the processes end; they do not outlive an interruption."""
    assert process.stdout is not None
    try:
        for line in process.stdout:
            content = _parse(line)
            if "progress" in content:
                on_progress(Progress(**content["progress"]))
            elif "log" in content:
                entry = content["log"]
                logging.getLogger(entry["name"]).log(entry["level"], "%s", entry["message"])
    except BaseException:
        process.terminate()
        raise


def _parse(line: str) -> dict[str, Any]:
    """What the first process says of itself; others print as they like."""
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _command(processes: int, folder: Path) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [
        *torchrun,
        f"--nproc-per-node={processes}",
        "--max-restarts=0",
        "-m",
        "gun_detection.training.worker",
        str(folder),
    ]


def _environment(settings: Settings, processes: int) -> dict[str, str]:
    """Secrets travel in the environment, where other users cannot see them."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {"OMP_NUM_THREADS": str(threads)} | dict(os.environ) | settings.to_environment()


def _end_with_parent() -> None:
    # A worker that lives on after its task was killed would hold the GPU against the next attempt.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _failure(folder: Path, code: int, lines: list[str]) -> GunDetectionError:
    file = folder / "error.json"
    if file.exists():
        content = json.loads(file.read_text())
        kind: type[GunDetectionError] = getattr(errors, content["kind"])
        return kind(content["message"], reason=content["reason"])
    # When one process is killed, the others fail for want of it: both are tried again. What
    # torchrun adds at the end says nothing of the cause.
    causes = [line for line in lines if line.startswith("[rank")] or lines
    end = "\n".join(causes[-_LAST_LINES:])
    return TransientError(
        f"a training process was lost (exit code {code}); the end of the log:\n{end}",
        reason="WORKER_LOST",
    )
