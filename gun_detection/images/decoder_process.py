"""The child of `SandboxedDecoder`: reads pictures from stdin, writes pixels to stdout."""

import json
import os
import resource
import signal
import sys
import warnings

from gun_detection.errors import ImageError
from gun_detection.images.decoding import DecodeLimits, decode, read_header
from gun_detection.images.pipes import HEAD_BYTES, read_message, write_message
from gun_detection.images.reasons import Reason

# The parent kills a late child; this is for a child whose parent was killed first.
_GRACE_SECONDS = 5.0
# Upper bounds of what decoding was measured to take: WebP 21 bytes a pixel, Python 131 MiB.
_BYTES_PER_PIXEL = 24
_BASE_BYTES = 150 * 2**20


def main(arguments: list[str]) -> None:
    """`max_pixels max_bytes min_side memory_mb timeout`; serves until stdin ends."""
    limits = DecodeLimits(*map(int, arguments[:3]))
    memory, timeout = int(arguments[3]) * 2**20, float(arguments[4])
    # Printing by a decoder must not end up between the pixels.
    answers = os.dup(1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.write(answers, b"R")
    try:
        while True:
            fit = json.loads(read_message(0, HEAD_BYTES))["fit"]
            data = read_message(0, limits.max_bytes)
            signal.setitimer(signal.ITIMER_REAL, timeout + _GRACE_SECONDS)
            _serve(bytes(data), fit, limits, answers)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (EOFError, BrokenPipeError):
        return


def _serve(data: bytes, fit: tuple[int, int] | None, limits: DecodeLimits, answers: int) -> None:
    try:
        image = decode(data, limits, fit)
    except ImageError as error:
        answer = _explain(error, data, limits)
        write_message(answers, _head(reason=answer.reason, message=answer.message))
        return
    head = _head(
        shape=image.pixels.shape,
        width=image.width,
        height=image.height,
        format=image.format,
        frames=image.frames,
    )
    write_message(answers, head)
    write_message(answers, image.pixels.data.cast("B"))


def _explain(error: ImageError, data: bytes, limits: DecodeLimits) -> ImageError:
    """libjpeg and libwebp report a lack of memory as if the picture were damaged."""
    memory, _ = resource.getrlimit(resource.RLIMIT_AS)
    if error.reason == Reason.CORRUPT:
        header = read_header(data, limits)
        if header.width * header.height * _BYTES_PER_PIXEL + _BASE_BYTES > memory:
            return ImageError(
                "this picture is damaged or needs more memory than allowed",
                reason=Reason.DECODE_MEMORY,
            )
    return error


def _head(**values: str | int | tuple[int, ...]) -> bytes:
    return json.dumps(values).encode()


if __name__ == "__main__":
    main(sys.argv[1:])
