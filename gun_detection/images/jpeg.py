"""JPEG: its segments, its header, and whether its compressed data can be all of the picture."""

import re
import struct
from collections.abc import Iterator

from gun_detection.images.reasons import (
    MOST_PARTS,
    corrupt,
    too_many_parts,
    truncated,
    unsupported,
)

# Lossless, hierarchical and differential JPEG: real JPEGs that no common decoder reads.
_UNCOMMON_SOF = {0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF}
_HUFFMAN_SOF = {0xC0, 0xC1, 0xC2}
_SOF = {0xC9, 0xCA} | _HUFFMAN_SOF | _UNCOMMON_SOF
# Application segments but for JFIF's and Adobe's, which tell the colour space.
_METADATA = {*range(0xE1, 0xEE), 0xEF}
# Progressive encoders make about ten. Each costs a pass over the whole picture, even when empty.
_MOST_SCANS = 100
# Skips fill bytes (0xFF), literal 0xFF in compressed data (0), and markers that carry nothing.
_MARKER = re.compile(rb"\xff[^\xff\x00\x01\xd0-\xd8]")


def parse_jpeg(data: bytes) -> tuple[int, int, int, bytes]:
    """(width, height, frames, EXIF) as stored."""
    size: tuple[int, int] | None = None
    exif, scans = b"", 0
    for marker, start, end in _segments(data):
        if marker in _SOF:
            precision, height, width = struct.unpack_from(">BHH", data[start:end])
            if precision != 8 or marker in _UNCOMMON_SOF:
                raise unsupported("this kind of JPEG, lossless or not 8 bits deep,")
            if size is not None:
                raise corrupt("this JPEG has two frame headers")
            size = (width, height)
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", start, end) and not exif:
            exif = data[start:end]
        elif marker == 0xDA:
            scans += 1
            if size is None:
                raise corrupt("this JPEG has picture data before its frame header")
            if scans > _MOST_SCANS:
                raise corrupt(f"this JPEG has more than {_MOST_SCANS} scans")
    if size is None:
        raise corrupt("this JPEG has no frame header")
    return *size, 1, exif


def jpeg_pixel_data(data: bytes) -> bytes:
    """The file without metadata, which may be damaged or crafted and does not change a pixel.

    Raises `ImageError` with reason TRUNCATED where the data is too short for the canvas; libjpeg
    would make up the rest.
    """
    parts, blocks = [data[:2]], 0
    for marker, start, end in _segments(data):
        if marker in _HUFFMAN_SOF:
            height, width = struct.unpack_from(">HH", data, start + 1)
            blocks = -(-width // 8) * -(-height // 8)
        if marker == 0xDA:
            parts.append(data[start - 4 :])
            break
        if marker not in _METADATA:
            parts.append(data[start - 4 : end])
    # A Huffman code has at least one bit, and every block at least one code.
    if 8 * len(parts[-1]) < blocks:
        raise truncated("JPEG")
    return b"".join(parts)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start and end of its body) up to the end of the picture; the rest is not read."""
    position, scanned = 2, False
    for _ in range(MOST_PARTS):
        found = _MARKER.search(data, position)
        if found is None:
            raise truncated("JPEG")
        marker, position = data[found.end() - 1], found.end()
        if marker == 0xD9:
            if not scanned:
                raise corrupt("this JPEG has no picture data")
            return
        (length,) = struct.unpack_from(">H", data, position)
        if position + length > len(data):
            raise truncated("JPEG")
        end = position + max(length, 2)
        yield marker, position + 2, end
        position = end
        scanned = scanned or marker == 0xDA
    raise too_many_parts("JPEG")
