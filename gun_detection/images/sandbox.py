"""Decoding in a child process, where a hostile picture can do no harm."""

import fcntl
import json
import os
import queue
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from gun_detection.errors import ImageError, ServiceUnavailableError
from gun_detection.images.decoding import DecodedImage, DecodeLimits, read_header
from gun_detection.images.pipes import HEAD_BYTES, read_message, wait_for, write_message
from gun_detection.images.reasons import Reason

if TYPE_CHECKING:
    from gun_detection.settings import Settings

_START_SECONDS = 60.0
# Of the pipe that carries pixels: a picture passes in pieces of this size, each a switch of
# processes. A user who has 64 MiB of pipes, most of a machine's decoders together, gets new ones of
# 8 KiB, which are measured to take twice the time.
_PIXEL_PIPE_BYTES = 2**18
_FATAL = {Reason.DECODER_CRASHED, Reason.DECODE_TIMEOUT, Reason.DECODE_MEMORY}


class SandboxedDecoder:
    """Decodes in a child process with a limit on memory and time, for pictures of strangers.

    A context manager for one thread at a time. The child starts with the first picture, serves
    one after the other, and a new one takes over after a crash or a timeout. It sees none of this
    process's environment and ends with it.
    """

    def __init__(self, settings: "Settings") -> None:
        self._limits = DecodeLimits.from_settings(settings)
        self._memory_mb = settings.decode_memory_mb
        self._timeout = settings.decode_timeout
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child; the next `decode` would start another."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()

    def decode(self, data: bytes, fit: tuple[int, int] | None = None) -> DecodedImage:
        """As the function `decode`; also raises `ImageError` with reason DECODER_CRASHED,
        DECODE_TIMEOUT or DECODE_MEMORY, and `ServiceUnavailableError` if no child can start.
        """
        # The checks of the header cost little and keep most junk away from the child.
        read_header(data, self._limits)
        child = self._running_child()
        answer: DecodedImage | ImageError | None = None
        try:
            answer = _exchange(child, data, fit, self._limits, time.monotonic() + self._timeout)
        except (BrokenPipeError, EOFError):
            answer = ImageError(
                "the decoding process died of this picture", reason=Reason.DECODER_CRASHED
            )
        except TimeoutError:
            answer = ImageError(
                f"decoding took longer than {self._timeout:g} s", reason=Reason.DECODE_TIMEOUT
            )
        finally:
            # After a broken conversation (also one broken by an exception from a signal handler)
            # the rest of this answer would be taken for the next one.
            if answer is None or (isinstance(answer, ImageError) and answer.reason in _FATAL):
                self.close()
        if isinstance(answer, ImageError):
            raise answer
        return answer

    def _running_child(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        limits = [self._limits.max_pixels, self._limits.max_bytes, self._limits.min_side]
        arguments = [*limits, self._memory_mb, self._timeout]
        self._child = _start(
            [sys.executable, "-m", "gun_detection.images.decoder_process", *map(str, arguments)]
        )
        if not _starts(self._child):
            self.close()
            raise ServiceUnavailableError(
                "the decoding process does not start; its own message is in the log above",
                reason="DECODER_UNAVAILABLE",
            )
        return self._child


class DecoderPool:
    """So many sandboxed decoders for threads to share; a context manager."""

    def __init__(self, settings: "Settings", decoders: int) -> None:
        self._all = [SandboxedDecoder(settings) for _ in range(decoders)]
        # The last that was used comes first: no more of them start than are needed at once.
        self._free: queue.LifoQueue[SandboxedDecoder] = queue.LifoQueue()
        for decoder in self._all:
            self._free.put(decoder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for decoder in self._all:
            decoder.close()

    def decode(self, data: bytes, fit: tuple[int, int] | None = None) -> DecodedImage:
        """As `SandboxedDecoder.decode`, when one of them is free."""
        decoder = self._free.get()
        try:
            return decoder.decode(data, fit=fit)
        finally:
            self._free.put(decoder)


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    """A child with a pipe for pictures and one for pixels, which do not block."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=_child_environment(),
    )
    request, answer = _descriptors(child)
    # The kernel refuses it to a user who has many; then the pipe is as small as it comes.
    with suppress(PermissionError):
        fcntl.fcntl(answer, fcntl.F_SETPIPE_SZ, _PIXEL_PIPE_BYTES)
    for pipe in (request, answer):
        os.set_blocking(pipe, False)
    return child


def _starts(child: subprocess.Popen[bytes]) -> bool:
    _, answers = _descriptors(child)
    try:
        wait_for(answers, select.POLLIN, time.monotonic() + _START_SECONDS)
    except TimeoutError:
        return False
    return os.read(answers, 1) == b"R"


def _child_environment() -> dict[str, str]:
    """Enough to import this package, and nothing that could be a secret."""
    environment = {
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "PYTHONSAFEPATH": "1",
        # Each thread of OpenBLAS reserves address space, which the limit counts.
        "OPENBLAS_NUM_THREADS": "1",
        # Memory is kept from picture to picture (up to 64 MiB of it): asking the kernel for
        # fresh pages each time was measured to cost more than the decoding.
        "MALLOC_MMAP_THRESHOLD_": str(2**25),
        "MALLOC_TRIM_THRESHOLD_": str(2**26),
    }
    libraries = os.environ.get("LD_LIBRARY_PATH")
    return environment | ({"LD_LIBRARY_PATH": libraries} if libraries else {})


def _exchange(
    child: subprocess.Popen[bytes],
    data: bytes,
    fit: tuple[int, int] | None,
    limits: DecodeLimits,
    until: float,
) -> DecodedImage | ImageError:
    """One picture in, one answer out; `EOFError` or `BrokenPipeError` when the child dies,
    `TimeoutError` when it is still at work at that moment.
    """
    request, answer = _descriptors(child)
    write_message(request, json.dumps({"fit": fit}).encode(), until)
    write_message(request, data, until)
    head = json.loads(read_message(answer, HEAD_BYTES, until))
    if "reason" in head:
        return ImageError(head["message"], reason=head["reason"])
    pixels = np.frombuffer(read_message(answer, 3 * limits.max_pixels, until), np.uint8)
    return DecodedImage(pixels.reshape(head.pop("shape")), **head)


def _descriptors(child: subprocess.Popen[bytes]) -> tuple[int, int]:
    """(where pictures go, where answers come from)."""
    if child.stdin is None or child.stdout is None:
        raise BrokenPipeError("the decoding process has no pipes")
    return child.stdin.fileno(), child.stdout.fileno()
