"""Starts a training in several processes through `torchrun`, and waits for what comes of it."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from gun_detection.children import run_child
from gun_detection.errors import GunDetectionError, TransientError
from gun_detection.scratch import scratch
from gun_detection.settings import Settings
from gun_detection.training.loop import Progress, State
from gun_detection.training.worker import Job

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
    with scratch(settings, "training") as folder:
        content = {
            "dataset_id": job.dataset_id,
            "config": job.config.model_dump(mode="json"),
            "name": job.name,
        }
        (folder / "job.json").write_text(json.dumps(content))
        ended = run_child(
            _command(processes, folder),
            folder,
            _environment(settings, processes),
            lambda progress: on_progress(Progress(**progress)),
        )
        if ended.code != 0:
            raise ended.error or _lost(ended.code, ended.lines)
        state = State(**json.loads((folder / "state.json").read_text()))
        return load_file(folder / "best.safetensors"), state


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


def _lost(code: int, lines: list[str]) -> GunDetectionError:
    # When one process is killed, the others fail for want of it: both are tried again. What
    # torchrun adds at the end says nothing of the cause.
    causes = [line for line in lines if line.startswith("[rank")] or lines
    end = "\n".join(causes[-_LAST_LINES:])
    return TransientError(
        f"a training process was lost (exit code {code}); the end of the log:\n{end}",
        reason="WORKER_LOST",
    )
