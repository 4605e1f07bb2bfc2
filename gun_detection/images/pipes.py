"""Messages between the decoder's parent and child: a length in 8 bytes, then the bytes."""

import os
import struct

# Most bytes of a message that says what the next one is.
HEAD_BYTES = 2**16

_LENGTH = struct.Struct("<Q")


def write_message(pipe: int, data: bytes | memoryview) -> None:
    """Raises `BrokenPipeError` when the other side is gone."""
    for part in (memoryview(_LENGTH.pack(len(data))), memoryview(data)):
        sent = 0
        while sent < len(part):
            sent += os.write(pipe, part[sent:])


def read_message(pipe: int, most: int) -> bytearray:
    """Raises `EOFError` when the other side is gone or sends more than `most` bytes."""
    head = bytearray(_LENGTH.size)
    read_into(pipe, memoryview(head))
    (length,) = _LENGTH.unpack(head)
    if length > most:
        raise EOFError(f"a message of {length} bytes where at most {most} are due")
    data = bytearray(length)
    read_into(pipe, memoryview(data))
    return data


def read_into(pipe: int, target: memoryview) -> None:
    """Fill `target`; raises `EOFError` when the other side is gone before that."""
    done = 0
    while done < len(target):
        count = os.readv(pipe, [target[done:]])
        if count == 0:
            raise EOFError("the other side of the pipe is gone")
        done += count
