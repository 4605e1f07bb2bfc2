"""What a program uses while it runs: time, processors, memory, and how busy the GPU is."""

import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

# When a part of the work had its first tenth done, and when all: seconds of the epoch.
Span = tuple[float, float]


@dataclass(frozen=True)
class Used:
    """What a process and its children used: seconds by the clock and of all processors, bytes.

    `gpu` is the share of the time, from when the GPU first computed to when it last did, in which
    it did; `gpu_steady` that of the time in which all parts of the work were in full swing.
    """

    seconds: float
    cpu: float
    peak: int
    gpu: float | None
    gpu_steady: float | None


@dataclass(frozen=True)
class Sample:
    """In how much of the time before this moment (seconds of the epoch) the GPU computed."""

    moment: float
    percent: int


def measure(command: list[str], spans: Callable[[], Sequence[Span]]) -> Used:
    """Run a command to its end, which must be a good one, and then ask for `spans` of its work."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        largest: list[int] = [0]
        over = threading.Event()
        watching = threading.Thread(target=_watch, args=(process.pid, largest, over))
        watching.start()
        with _watched_gpu() as samples:
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
        over.set()
        watching.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        assert process.returncode == 0, log.read().decode(errors="replace")[-3000:]
    steady = share(samples, steady_window(spans())) if samples else None
    cpu = used.ru_utime + used.ru_stime
    return Used(seconds, cpu, largest[0], share(samples, active_window(samples)), steady)


def use_one_gpu() -> None:
    """Of several GPUs the first, unless it is said which; before any is used.

    The driver's figures are of one, so all work must be on it.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")


def parse(text: str) -> list[Sample]:
    """The samples in what `nvidia-smi` printed; it has no figure, `[N/A]`, of a part of a GPU."""
    found = re.findall(r"^(\d+/\d+/\d+ [\d:.]+), (\d+)$", text, re.MULTILINE)
    return [
        Sample(datetime.strptime(moment, "%Y/%m/%d %H:%M:%S.%f").timestamp(), int(percent))
        for moment, percent in found
    ]


def active_window(samples: Sequence[Sample]) -> Span | None:
    """From when the GPU first computed to when it last did."""
    moments = [sample.moment for sample in samples if sample.percent]
    return (moments[0], moments[-1]) if moments else None


def steady_window(spans: Sequence[Span]) -> Span | None:
    """From when the slowest had its first tenth done until the first was at its end.

    Before and after that some start, or have ended; None where that leaves nothing.
    """
    if not spans:
        return None
    begin, end = max(tenth for tenth, _ in spans), min(end for _, end in spans)
    return (begin, end) if begin < end else None


def share(samples: Sequence[Sample], window: Span | None) -> float | None:
    """The mean of the samples in this window, of 1; None where there are none."""
    if window is None:
        return None
    begin, end = window
    inside = [sample.percent for sample in samples if begin <= sample.moment <= end]
    return sum(inside) / len(inside) / 100 if inside else None


def check() -> None:
    """Raise `AssertionError` where these figures are not what they are said to be.

    Of two shards one is at work from 12 to 20, the other until 18 and late; the GPU has nothing to
    do at first, something while they start, and the rest of the slower one in the end.
    """
    day = datetime(2026, 3, 1, 12).timestamp()
    busy = [0, 0, 10, 40, 90, 80, 90, 80, 30, 0, 20, 0]
    lines = [f"2026/03/01 12:00:{10 + n}.000, {percent}" for n, percent in enumerate(busy)]
    samples = parse("\n".join([*lines[:3], "2026/03/01 12:00:12.500, [N/A]", *lines[3:], "[N/A]"]))
    assert [sample.percent for sample in samples] == busy
    assert active_window(samples) == (day + 12, day + 20)
    assert share(samples, active_window(samples)) == sum(busy[2:11]) / 9 / 100
    window = steady_window([(day + 12.4, day + 20), (day + 13.9, day + 17.5)])
    assert window == (day + 13.9, day + 17.5)
    assert share(samples, window) == 0.85
    assert steady_window([(day, day + 1), (day + 2, day + 3)]) is None
    assert steady_window([]) is None
    assert active_window(parse("[N/A]\nNo devices were found")) is None


@contextmanager
def _watched_gpu() -> Iterator[list[Sample]]:
    """Gives a list that holds, once it is left, how busy the GPU was, in tenths of a second."""
    samples: list[Sample] = []
    if not torch.cuda.is_available():
        yield samples
        return
    [first, *_] = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    query = ["nvidia-smi", "--query-gpu=timestamp,utilization.gpu", "--format=csv,noheader,nounits"]
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen([*query, "-i", first, "--loop-ms=100"], stdout=file)
        try:
            yield samples
        finally:
            process.terminate()
            process.wait()
        file.seek(0)
        samples += parse(file.read())


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


if __name__ == "__main__":
    check()
