"""What a program uses while it runs: time, processors, memory, and how busy the GPU is."""

import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Used:
    """What a process and its children used: seconds by the clock and of all processors, bytes.

    `gpu` is the share of the time, from when the GPU first computed to when it last did, in which
    it did.
    """

    seconds: float
    cpu: float
    peak: int
    gpu: float | None


def measure(command: list[str]) -> Used:
    """Run a command to its end, which must be a good one."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        largest: list[int] = [0]
        over = threading.Event()
        watching = threading.Thread(target=_watch, args=(process.pid, largest, over))
        watching.start()
        with _watched_gpu() as busy:
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
        over.set()
        watching.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        assert process.returncode == 0, log.read().decode(errors="replace")[-3000:]
    gpu = sum(busy) / len(busy) / 100 if busy else None
    return Used(seconds, used.ru_utime + used.ru_stime, largest[0], gpu)


@contextmanager
def _watched_gpu() -> Iterator[list[int]]:
    """Gives a list that holds, once it is left, how busy the GPU was: percent of each tenth of a
    second from the first in which it computed to the last."""
    busy: list[int] = []
    if not torch.cuda.is_available():
        yield busy
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen([*query, "--loop-ms=100"], stdout=file)
        try:
            yield busy
        finally:
            process.terminate()
            process.wait()
        file.seek(0)
        seen = [int(line) for line in file.read().split()]
    active = [number for number, value in enumerate(seen) if value]
    if active:
        busy += seen[active[0] : active[-1] + 1]


def _watch(pid: int, largest: list[int], over: threading.Event) -> None:
    """Note the largest sum of proportional set sizes."""
    while not over.wait(0.3):
        # Processes end meanwhile; the next look is soon.
        with suppress(OSError, ValueError):
            largest[0] = max(largest[0], sum(map(_memory, _family(pid))))


def _family(pid: int) -> Iterator[int]:
    yield pid
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in listed.read_text().split():
            yield from _family(int(child))


def _memory(pid: int) -> int:
    [line] = re.findall(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    return int(line) * 1024
