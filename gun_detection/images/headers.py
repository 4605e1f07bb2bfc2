"""What a picture file says about itself, read from its bytes without decoding a pixel.

Own code and not a decoder's, for two reasons: a decoder may allocate the whole canvas before it
tells the size, and versions of decoders differ in what they accept and how they rotate. Here a
file that ends early is refused, whatever the decoder would make up for the missing part.
"""

import struct
from dataclasses import dataclass

from gun_detection.errors import ImageError
from gun_detection.images.jpeg import parse_jpeg
from gun_detection.images.png import PNG_MAGIC, parse_png
from gun_detection.images.reasons import (
    MOST_PARTS,
    Reason,
    corrupt,
    too_many_parts,
    truncated,
    unsupported,
)


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Width and height are those of the upright picture, in pixels."""

    format: str
    width: int
    height: int
    frames: int
    orientation: int


_BMP_HEADER_SIZES = {12, 40, 52, 56, 64, 108, 124}
_OTHER_MAGICS = (
    ("GIF", b"GIF8"),
    ("TIFF", b"II*\0"),
    ("TIFF", b"MM\0*"),
    ("TIFF", b"II+\0"),
    ("TIFF", b"MM\0+"),
    ("PSD", b"8BPS"),
    ("JPEG 2000", b"\0\0\0\x0cjP  \r\n"),
    ("JPEG 2000", b"\xff\x4f\xff\x51"),
    ("JPEG XL", b"\0\0\0\x0cJXL "),
    ("JPEG XL", b"\xff\x0a"),
    ("icon", b"\0\0\1\0"),
    ("FITS", b"SIMPLE  ="),
    ("PostScript", b"%!PS"),
    ("SVG", b"<svg"),
    ("QOI", b"qoif"),
    ("DDS", b"DDS "),
)
_HEIF_BRANDS = {b"avif", b"avis", b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}


def parse_header(data: bytes) -> ImageHeader:
    """Read the header of a JPEG, PNG, WebP or BMP and check that the file is whole.

    Raises `ImageError` with reason EMPTY, NOT_IMAGE, UNSUPPORTED_FORMAT, TRUNCATED or CORRUPT.
    """
    name = sniff(data)
    try:
        width, height, frames, exif = _PARSERS[name](data)
    except struct.error:
        raise truncated(name) from None
    if width <= 0 or height <= 0:
        raise ImageError(f"this {name} says it is {width}x{height} pixels", reason=Reason.CORRUPT)
    orientation = exif_orientation(exif)
    if orientation >= 5:
        width, height = height, width
    return ImageHeader(name, width, height, frames, orientation)


def sniff(data: bytes) -> str:
    """JPEG, PNG, WEBP or BMP, by content; raises `ImageError` for everything else."""
    if not data:
        raise ImageError("the file is empty: upload it again", reason=Reason.EMPTY)
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(PNG_MAGIC):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADER_SIZES:
        return "BMP"
    known = next((name for name, magic in _OTHER_MAGICS if data.startswith(magic)), None)
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        known = "HEIF or AVIF"
    if known:
        raise unsupported(known)
    raise ImageError("this is not a picture", reason=Reason.NOT_IMAGE)


def exif_orientation(exif: bytes) -> int:
    """The orientation (1 to 8) in an EXIF block, 1 where there is none or it cannot be read."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def _parse_webp(data: bytes) -> tuple[int, int, int, bytes]:
    (total,) = struct.unpack_from("<I", data, 4)
    if 8 + total > len(data):
        raise truncated("WEBP")
    size: tuple[int, int] | None = None
    frames, exif, position = 0, b"", 12
    for _ in range(MOST_PARTS):
        if position + 8 > 8 + total:
            break
        kind, length = struct.unpack_from("<4sI", data, position)
        position += 8
        if position + length > 8 + total:
            raise truncated("WEBP")
        if size is None:
            size = _webp_size(kind, data[position : position + 10])
        frames += kind == b"ANMF"
        if kind == b"EXIF":
            exif = data[position : position + length]
        position += length + length % 2
    else:
        raise too_many_parts("WEBP")
    if size is None:
        raise truncated("WEBP")
    return *size, max(1, frames), exif


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int]:
    """(width, height) from the first 10 bytes of the chunk that must come first."""
    if kind == b"VP8X":
        width, height = body[4:7], body[7:10]
        return int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
    if kind == b"VP8L" and body[:1] == b"\x2f":
        (bits,) = struct.unpack_from("<I", body, 1)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    raise corrupt("this WebP does not start with its header")


def _parse_bmp(data: bytes) -> tuple[int, int, int, bytes]:
    offset, header = struct.unpack_from("<II", data, 10)
    if header == 12:
        width, height, _, depth = struct.unpack_from("<HHHH", data, 18)
        compression = stored = 0
    else:
        width, height, _, depth, compression, stored = struct.unpack_from("<iiHHII", data, 18)
    if compression not in (0, 1, 2, 3):
        raise unsupported("this kind of BMP")
    # A negative height says that the rows run from top to bottom.
    height = abs(height)
    if compression in (0, 3):
        stored = (width * depth + 31) // 32 * 4 * height
    if offset + stored > len(data):
        raise truncated("BMP")
    return width, height, 1, b""


_PARSERS = {"JPEG": parse_jpeg, "PNG": parse_png, "WEBP": _parse_webp, "BMP": _parse_bmp}
