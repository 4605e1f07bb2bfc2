"""The figures of scoring: how long each stage worked and was waited for, and what was slow."""

import heapq
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STAGES = ("read", "decode", "infer", "write")
_SLOWEST = 5


class Meter:
    """The figures of one shard; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._working: defaultdict[str, float] = defaultdict(float)
        self._waiting: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()
        self._slowest: list[tuple[float, str]] = []

    @contextmanager
    def stage(self, name: str, slots: threading.Semaphore | None = None) -> Iterator[None]:
        """A stage of one picture: waiting for one of the slots, then work."""
        asked = time.monotonic()
        if slots is not None:
            slots.acquire()
        began = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            if slots is not None:
                slots.release()
            self.add(name, working=ended - began, waiting=began - asked)

    def add(self, name: str, *, working: float = 0.0, waiting: float = 0.0) -> None:
        """Seconds of a stage that were measured elsewhere."""
        with self._lock:
            self._working[name] += working
            self._waiting[name] += waiting

    def count(self, **numbers: int) -> None:
        with self._lock:
            self._counts.update(numbers)

    def picture(self, address: str, seconds: float) -> None:
        """Remember the slowest pictures, from before their reading to after their inference."""
        with self._lock:
            heapq.heappush(self._slowest, (seconds, address))
            if len(self._slowest) > _SLOWEST:
                heapq.heappop(self._slowest)

    def stats(self, engine: str, device: str) -> dict[str, Any]:
        """JSON types. `working` and `waiting` are seconds by stage, summed over the threads;
        divided by `seconds` they are how many pictures were at work, or in its queue, on average.
        """
        with self._lock:
            return {
                "seconds": round(time.monotonic() - self._start, 3),
                "pictures": self._counts["scored"] + self._counts["quarantined"],
                "scored": self._counts["scored"],
                "quarantined": self._counts["quarantined"],
                "detections": self._counts["detections"],
                "repeated": self._counts["repeated"],
                "bytes": self._counts["bytes"],
                "working": {name: round(self._working[name], 3) for name in STAGES},
                "waiting": {name: round(self._waiting[name], 3) for name in STAGES},
                "slowest": [
                    {"seconds": round(seconds, 3), "address": address}
                    for seconds, address in sorted(self._slowest, reverse=True)
                ],
                "engines": [engine],
                "devices": [device],
            }


def combine(parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The figures of several shards as one; `seconds` are those of all workers together."""
    if not parts:
        return None
    sums = ("seconds", "pictures", "scored", "quarantined", "detections", "repeated", "bytes")
    combined: dict[str, Any] = {name: sum(part[name] for part in parts) for name in sums}
    combined["seconds"] = round(combined["seconds"], 3)
    for name in ("working", "waiting"):
        combined[name] = {
            stage: round(sum(part[name][stage] for part in parts), 3) for stage in STAGES
        }
    slow = [row for part in parts for row in part["slowest"]]
    combined["slowest"] = sorted(slow, key=lambda row: -row["seconds"])[:_SLOWEST]
    for name in ("engines", "devices"):
        combined[name] = sorted({value for part in parts for value in part[name]})
    return combined
