"""Messages between the decoder's parent and child: a length in 8 bytes, then the bytes.

Where `until` is given, a moment of `time.monotonic`, the pipe does not block (`os.set_blocking`).
"""

import os
import select
import struct
import time

# Most bytes of a message that says what the next one is.
HEAD_BYTES = 2**16

_LENGTH = struct.Struct("<Q")


def write_message(pipe: int, data: bytes | memoryview, until: float | None = None) -> None:
    """Raises `BrokenPipeError` when the other side is gone, `TimeoutError` when it is late."""
    for part in (memoryview(_LENGTH.pack(len(data))), memoryview(data)):
        sent = 0
        while sent < len(part):
            try:
                sent += os.write(pipe, part[sent:])
            except BlockingIOError:
                wait_for(pipe, select.POLLOUT, until)


def read_message(pipe: int, most: int, until: float | None = None) -> bytearray:
    """Raises `EOFError` when the other side is gone or sends more than `most` bytes,
    `TimeoutError` when it is late.
    """
    head = bytearray(_LENGTH.size)
    _read_into(pipe, memoryview(head), until)
    (length,) = _LENGTH.unpack(head)
    if length > most:
        raise EOFError(f"a message of {length} bytes where at most {most} are due")
    data = bytearray(length)
    _read_into(pipe, memoryview(data), until)
    return data


def wait_for(pipe: int, event: int, until: float | None) -> None:
    """Until the pipe can be read or written; raises `TimeoutError` when that moment has passed."""
    waiting = select.poll()
    waiting.register(pipe, event)
    left = None if until is None else max(0.0, until - time.monotonic()) * 1000
    if not waiting.poll(left):
        raise TimeoutError("the other side of the pipe is late")


def _read_into(pipe: int, target: memoryview, until: float | None) -> None:
    """Fill `target`; raises `EOFError` when the other side is gone before that."""
    done = 0
    while done < len(target):
        try:
            count = os.readv(pipe, [target[done:]])
        except BlockingIOError:
            wait_for(pipe, select.POLLIN, until)
            continue
        if count == 0:
            raise EOFError("the other side of the pipe is gone")
        done += count
