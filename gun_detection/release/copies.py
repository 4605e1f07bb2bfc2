"""Local copies of weights and packages: those that were used last, up to so many bytes."""

import os
import time
from contextlib import suppress
from pathlib import Path

from gun_detection.settings import Settings

_MOST_BYTES = 2**30
# Between the look at a copy and its reading.
_IN_USE = 600.0


def copies(settings: Settings) -> Path:
    return settings.home / "cache"


def note_use(path: Path) -> None:
    with suppress(OSError):
        os.utime(path)


def make_room(settings: Settings) -> None:
    """Delete the copies that were used longest ago, where there are too many bytes of them.

    Where files lie in memory, as in some clouds, one champion after the other would fill it.
    """
    found = []
    for kind in ("models", "engines"):
        for path in (copies(settings) / kind).glob("*"):
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
    left = sum(size for _, size, _ in found)
    for used, size, path in sorted(found):
        if left <= _MOST_BYTES or time.time() - used < _IN_USE:
            return
        path.unlink(missing_ok=True)
        left -= size
