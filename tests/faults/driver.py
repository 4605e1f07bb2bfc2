"""The process that scores a shard, with a simulated engine and a point at which it dies.

`python -m tests.faults.driver FOLDER SHARD_ID [--take-over]`, like the real worker. `FAULT` holds
JSON: the `point`, the `signal` that is sent there, at which passing (`nth`), and a `marker`: a
file that is made before, so that only one process dies. `POISON` is the sha256 of pixels: whoever
looks at them dies, each time; `*` is all pixels.
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import event

from gun_detection.detector.inference import Detections
from gun_detection.images import SandboxedDecoder
from gun_detection.reading import Reader
from gun_detection.scoring import flow, ledger, pipeline, worker
from tests.scoring.simulated import Simulated

FAULT: dict[str, Any] = json.loads(os.environ.get("FAULT", "{}"))
POISON = os.environ.get("POISON", "")
_passed = 0


def reach(point: str) -> None:
    """Die here, if this is the point and it is time to."""
    global _passed
    if FAULT.get("point") != point or Path(FAULT["marker"]).exists():
        return
    _passed += 1
    if _passed >= FAULT["nth"]:
        Path(FAULT["marker"]).touch()
        die(signal.Signals(FAULT["signal"]))


def die(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    # Until the signal has arrived.
    time.sleep(60)


def after(owner: Any, name: str, point: str) -> None:
    """Reach a point whenever this function of the owner has returned."""
    real = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        result = real(*arguments, **named)
        reach(point)
        return result

    setattr(owner, name, call)


class Mortal(Simulated):
    """Dies of the poison, and at the point `infer`."""

    def __call__(self, images: Any) -> list[Detections]:
        for image in images:
            if POISON in ("*", hashlib.sha256(image.tobytes()).hexdigest()):
                die(signal.SIGSEGV)
        results = super().__call__(images)
        reach("infer")
        return results


def _upsert(statement: str) -> bool:
    return "INSERT INTO ledger" in statement


def main() -> None:
    # Several for each shard.
    flow.BATCH = 32
    after(worker, "claim_shard", "lease")
    after(Reader, "get", "read")
    after(SandboxedDecoder, "decode", "decode")
    after(ledger, "copy_arrays", "copy")
    after(pipeline, "write_outcomes", "written")
    after(pipeline, "finish_shard", "acknowledge")

    @event.listens_for(sqlalchemy.Engine, "after_cursor_execute")
    def _(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if _upsert(statement):
            reach("upsert")

    replace: Callable[..., Any] = lambda model, settings, storage: Mortal(seconds=0.002)  # noqa: E731
    worker.open_engine = replace
    worker.main(sys.argv[1:])


if __name__ == "__main__":
    main()
