"""The process that scores a shard, with a simulated engine and a point at which it dies.

`python -m tests.faults.driver SHARD_ID [--take-over]`, like the real worker; with `survey` for the
id it lists the uploads instead, as the first task of a run does. `FAULT` holds JSON:
the `point`, the `signal` that is sent there or the seconds by which the clock jumps (`jump`), at
which passing (`nth`), and a `marker`: a file that is made before, so that only one process is
struck. `POISON` are sha256 of pixels, with commas between them: whoever looks at those dies, each
time; `*` is all pixels.
`PACKAGE` is a file of the engine's package, with its sha256, that is fetched before, and `PAUSES`
are those for which a database that is away is waited for.
"""

import ctypes
import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import event

from gun_detection import stages
from gun_detection.database.models import ModelVersion
from gun_detection.detector.detections import Detections
from gun_detection.images import SandboxedDecoder
from gun_detection.reading import Reader
from gun_detection.scoring import flow, ledger, listing, pipeline, worker
from gun_detection.scoring.sources import Source
from gun_detection.settings import Settings, load_settings
from gun_detection.storage import Storage
from tests.scoring.simulated import Simulated

FAULT: dict[str, Any] = json.loads(os.environ.get("FAULT", "{}"))
POISON = os.environ.get("POISON", "").split(",")
PACKAGE: list[str] = json.loads(os.environ.get("PACKAGE", "[]"))
_passed = 0
# Several threads reach the same point.
_reaching = threading.Lock()


def reach(point: str) -> None:
    """Die here, or let the clock jump, if this is the point and it is time to; once."""
    global _passed
    if FAULT.get("point") != point:
        return
    with _reaching:
        if Path(FAULT["marker"]).exists():
            return
        _passed += 1
        if _passed < FAULT["nth"]:
            return
        Path(FAULT["marker"]).touch()
    if "jump" in FAULT:
        # Of the library that is loaded before every other one: see `clock.c`.
        ctypes.CDLL(None).jump(ctypes.c_long(FAULT["jump"]))
    else:
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
            if "*" in POISON or hashlib.sha256(image.tobytes()).hexdigest() in POISON:
                die(signal.SIGSEGV)
        results = super().__call__(images)
        reach("infer")
        return results


def _upsert(statement: str) -> bool:
    return "INSERT INTO ledger" in statement


def open_engine(model: ModelVersion, settings: Settings, storage: Storage) -> Mortal:
    if PACKAGE:
        # Takes seconds to load.
        from gun_detection.release import packages

        file, sha256 = PACKAGE
        packages._fetch(model.id, Mortal.name, file, sha256, settings, storage)
    return Mortal(seconds=0.002)


def survey() -> None:
    changed: Any = listing
    changed._CHUNK = 32
    after(Source, "wants", "list")
    after(listing, "_note", "note")
    stages.survey_uploads(load_settings())


def main() -> None:
    # Several for each shard.
    flow.BATCH = 32
    if "PAUSES" in os.environ:
        patient: Any = pipeline
        patient._WRITE_PAUSES = json.loads(os.environ["PAUSES"])
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

    reach("start")
    if sys.argv[1] == "survey":
        survey()
    else:
        worker.main(sys.argv[1:], open_engine)


if __name__ == "__main__":
    main()
