"""Gives processes that score a shard an engine that only waits; for the benchmarks of scale.

Python runs this at its start where the folder is on PYTHONPATH. SIMULATED_SECONDS and
SIMULATED_STREAMS say how long a picture takes and how many are looked at at once; into the file
SIMULATED_CPU each process writes a line with its CPU seconds, those of its decoders included.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gun_detection.detector.detections import Detections


class WaitingEngine:
    """Marks as many boxes as the first pixel's red says, modulo 4."""

    name, device, batch, input_size = "simulated", "nowhere", 1, (800, 1333)

    def __init__(self, *_: object) -> None:
        self.streams = int(os.environ["SIMULATED_STREAMS"])
        self._seconds = float(os.environ["SIMULATED_SECONDS"])

    def __call__(self, images: "Sequence[NDArray[np.uint8]]") -> "list[Detections]":
        time.sleep(self._seconds * len(images))
        return [_found(image) for image in images]


def _found(image: "NDArray[np.uint8]") -> "Detections":
    import numpy as np

    from gun_detection.detector.detections import Detections

    count = int(image[0, 0, 0]) % 4
    boxes = np.tile(np.array([2, 2, 20, 20], np.float32), (count, 1))
    return Detections(boxes, np.full(count, 0.9, np.float32))


def _write_cpu() -> None:
    used = os.times()
    seconds = used.user + used.system + used.children_user + used.children_system
    with Path(os.environ["SIMULATED_CPU"]).open("a") as file:
        file.write(f"{seconds}\n")


def _leave(code: int) -> NoReturn:
    # Decoders that were forked from it count as its children.
    if os.getpid() == _PID:
        _write_cpu()
    _EXIT(code)


_PID, _EXIT = os.getpid(), os._exit
if "gun_detection.scoring.worker" in sys.orig_argv:
    from gun_detection.release import packages

    packages.open_engine = WaitingEngine  # type: ignore[assignment]
    # The worker leaves by it, past all that is registered for an end.
    os._exit = _leave
