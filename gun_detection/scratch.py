"""Folders for temporary files that do not outlive a killed process for long."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gun_detection.settings import Settings

# Younger folders may not be locked yet.
_YOUNG = 60.0


@contextmanager
def scratch(settings: Settings, name: str) -> Iterator[Path]:
    """A new folder below the home of the settings, which goes when the block ends.

    What killed processes left there goes first: of theirs the kernel has freed the locks.
    """
    root = settings.home / "tmp"
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=root) as folder:
        handle = os.open(folder, os.O_RDONLY)
        try:
            _lock(handle)
            yield Path(folder)
        finally:
            os.close(handle)


def _lock(handle: int) -> bool:
    """Whether nobody else holds it; some network file systems have no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(root: Path) -> None:
    for folder in root.iterdir():
        # Others look through it at the same time.
        with suppress(OSError):
            if time.time() - folder.stat().st_ctime < _YOUNG:
                continue
            handle = os.open(folder, os.O_RDONLY)
            try:
                if _lock(handle):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)
