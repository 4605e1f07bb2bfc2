"""PNG: its chunks, its header, and whether its compressed data holds all rows."""

import struct
import zlib
from collections.abc import Iterator

from gun_detection.errors import ImageError
from gun_detection.images.reasons import MOST_PARTS, Reason, corrupt, too_many_parts, truncated

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# What the pixels of the first frame depend on, all of it.
_PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Of each of the seven passes of an interlaced PNG: first column, first row, and their steps.
_PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def parse_png(data: bytes) -> tuple[int, int, int, bytes]:
    """(width, height, frames, EXIF) as stored."""
    frames, exif, seen = 1, b"", set()
    width = height = 0
    for kind, body in png_chunks(data):
        if kind == b"IHDR":
            width, height = struct.unpack_from(">II", body)
        elif kind == b"acTL" and len(body) == 8 and b"IDAT" not in seen:
            frames = max(1, int.from_bytes(body[:4], "big"))
        elif kind == b"eXIf":
            exif = bytes(body)
        seen.add(kind)
    if b"IDAT" not in seen:
        raise corrupt("this PNG has no picture data")
    return width, height, frames, exif


def png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(kind, body) of every chunk from the header to the end, checksums checked."""
    view, position = memoryview(data), len(PNG_MAGIC)
    for _ in range(MOST_PARTS):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        (checksum,) = struct.unpack_from(">I", data, end)
        if position == len(PNG_MAGIC) and (kind, length) != (b"IHDR", 13):
            raise corrupt("this PNG does not start with its header")
        # An upper-case first letter marks the chunks that no decoder can do without.
        if kind[:1].isupper() and zlib.crc32(view[position + 4 : end]) != checksum:
            raise corrupt("a checksum of this PNG is wrong: upload it again")
        yield kind, view[position + 8 : end]
        if kind == b"IEND":
            return
        position = end + 4
    raise too_many_parts("PNG")


def png_pixel_data(data: bytes) -> bytes:
    """The file without metadata, which may be damaged or a bomb and does not change a pixel.

    Raises `ImageError` with reason TRUNCATED where rows are missing; Pillow makes them black.
    """
    missing, inflate = 0, zlib.decompressobj()
    parts: list[bytes | memoryview] = [PNG_MAGIC]
    for kind, body in png_chunks(data):
        if kind not in _PIXEL_CHUNKS:
            continue
        checksum = zlib.crc32(body, zlib.crc32(kind))
        parts += [struct.pack(">I4s", len(body), kind), body, struct.pack(">I", checksum)]
        if kind == b"IHDR":
            missing = _row_bytes(*struct.unpack(">IIBBBBB", body))
        # Never more at once than is missing: the data may be a bomb.
        while kind == b"IDAT" and body and missing > 0:
            got = len(inflate.decompress(body, min(missing, 2**20)))
            missing -= got
            body = memoryview(inflate.unconsumed_tail)
            if inflate.eof or not got:
                break
    if missing > 0:
        raise truncated("PNG")
    return b"".join(parts)


def _row_bytes(
    width: int, height: int, depth: int, colour: int, _method: int, _filter: int, interlaced: int
) -> int:
    """Length of the inflated data: each row has one byte for its filter."""
    if colour not in _CHANNELS:
        raise ImageError(f"PNG colour type {colour} does not exist", reason=Reason.CORRUPT)
    bits = depth * _CHANNELS[colour]
    total = 0
    for x, y, step_x, step_y in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total
