"""Decoded pictures on the local disk, so that an epoch does not decode them again."""

import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from gun_detection.settings import Settings

Pixels = NDArray[np.uint8]

# Databases and logs of the same disk need some.
_RESERVE = 2**31
# By access times, which most systems note once a day.
_UNUSED = 30 * 86400.0


class PixelCache:
    """Pictures of at most `side` pixels, uint8 (H, W, 3), by the sha256 of their file.

    With those of other sides it grows to `pixel_cache_gb` and then takes in no more; what nobody
    has read for 30 days goes. Processes that read for a training share the room that there is when
    they begin. A damaged file in it is made anew; a full disk only means that nothing is kept.
    """

    def __init__(self, settings: Settings, side: int) -> None:
        self._folder = settings.home / "cache" / "pixels" / str(side)
        self._side, self._most = side, settings.pixel_cache_gb * 1e9
        self._room, self._process = 0.0, 0
        for file in self._files():
            with suppress(OSError):
                status = file.stat()
                if time.time() - max(status.st_atime, status.st_mtime) > _UNUSED:
                    file.unlink()

    def get(self, sha256: str, decode: Callable[[], Pixels]) -> Pixels:
        """The pixels of a file; `decode` gives them in full size where they are not kept."""
        path = self._folder / sha256[:2] / f"{sha256}.npy"
        try:
            return _checked(np.load(path, allow_pickle=False), self._side)
        except (FileNotFoundError, ValueError, EOFError):
            pixels = shrink(decode(), self._side)
        self._keep(path, pixels)
        return pixels

    def _keep(self, path: Path, pixels: Pixels) -> None:
        if self._process != os.getpid():
            self._room, self._process = self._share(), os.getpid()
        if pixels.nbytes > self._room:
            return
        buffer = io.BytesIO()
        np.save(buffer, pixels, allow_pickle=False)
        if keep(path, buffer.getvalue()):
            self._room -= pixels.nbytes
        else:
            self._room = 0

    def _files(self) -> Iterator[Path]:
        """Those of every side."""
        return self._folder.parent.glob("*/*/*.npy")

    def _share(self) -> float:
        """This process's share of the room that is left, in bytes."""
        used = 0
        for file in self._files():
            with suppress(FileNotFoundError):
                used += file.stat().st_size
        worker = get_worker_info()
        return (self._most - used) / (worker.num_workers if worker else 1)


def _checked(pixels: Pixels, side: int) -> Pixels:
    if pixels.ndim != 3 or pixels.dtype != np.uint8 or max(pixels.shape[:2]) > side:
        raise ValueError("not a cached picture")
    return pixels


def shrink(pixels: Pixels, side: int) -> Pixels:
    """The picture with a longer side of at most `side` pixels."""
    height, width = pixels.shape[:2]
    if max(height, width) <= side:
        return pixels
    factor = side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    smaller: Pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    return smaller


def keep(path: Path, data: bytes) -> bool:
    """Write a copy of what can be had again, unless the disk is wanted for what cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < _RESERVE:
            return False
        write_whole(path, data)
    except OSError:
        return False
    return True


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, whoever else writes the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
