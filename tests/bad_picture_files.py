"""Bytes of files that are no pictures, are damaged, or are made to do harm; by what they are.

Those that take long to make, or much memory, are functions.
"""

import io
import json
import struct
import zipfile
import zlib
from base64 import b64encode
from collections.abc import Callable
from functools import partial

from PIL import Image

from tests.picture_files import (
    FILES,
    HEIGHT,
    WIDTH,
    exif,
    jpeg_of_size,
    png,
    riff,
    saved,
    scene,
    with_chunk,
    with_segment,
)

Make = Callable[[], bytes]
Files = dict[str, bytes | Make]

_JPEG, _PNG, _BMP = FILES["jpeg"], FILES["png"], FILES["bmp"]
_FRAME = _JPEG.index(b"\xff\xc0")
_BEHIND_FRAME = _FRAME + 19


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("gun.jpg"), _JPEG)
    return buffer.getvalue()


NOT_IMAGE: Files = {
    "one byte": b"\xff",
    "zeros": bytes(5000),
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "answer of an S3 server": b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>',
    "SVG with a prologue": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "JSON": json.dumps({"error": "not found"}).encode(),
    "text": b"BM is how this text starts, and it goes on",
    "zip": _zip(),
    "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj",
    "program": b"\x7fELF\x02\x01\x01" + bytes(200),
    "MP4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(200),
    "JPEG in gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\3" + zlib.compress(_JPEG)[2:],
    "JPEG in Base64": b64encode(_JPEG),
    "JPEG behind a line of text": b"Content-Type: image/jpeg\r\n\r\n" + _JPEG,
}

UNSUPPORTED: Files = {
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "GIF": saved(scene(), "GIF"),
    "TIFF": saved(scene(), "TIFF"),
    "icon": saved(scene(), "ICO"),
    "JPEG 2000": saved(scene(), "JPEG2000"),
    "AVIF": partial(saved, scene(), "AVIF"),
    "FITS": b"SIMPLE  =                    T" + bytes(2850),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(50),
    "Photoshop": b"8BPS\0\1" + bytes(50),
    "12-bit JPEG": _JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "lossless JPEG": _JPEG.replace(b"\xff\xc0", b"\xff\xc3"),
}


def _cuts() -> Files:
    files: Files = {}
    for name in ("jpeg", "progressive", "png", "webp", "lossless webp", "animated webp", "bmp"):
        data = FILES[name]
        for share in (10, 25, 50, 75, 90, 99):
            files[f"{share} % of {name}"] = data[: max(16, len(data) * share // 100)]
        files[f"{name} without its last byte"] = data[:-1]
    return files


TRUNCATED: Files = _cuts() | {
    "JPEG's first bytes": _JPEG[:3],
    "PNG's first bytes": _PNG[:8],
    "JPEG cut off behind a whole thumbnail": with_segment(
        _JPEG, 0xE1, exif(1) + FILES["progressive"]
    )[:-300],
    "PNG that lacks a row": png(depth=8, colour=0, row=bytes(32), rows=31),
    "PNG without rows": png(depth=8, colour=0, row=bytes(32), rows=0),
    "JPEG of 7000x7000 with data for 40x30": jpeg_of_size(_JPEG, 7000, 7000),
}


def _wrong_checksum() -> bytes:
    data = bytearray(_PNG)
    data[data.index(b"IDAT") + 20] ^= 1
    return bytes(data)


def _without_tables() -> bytes:
    """Its header is in order: only a decoder sees the fault."""
    frame = struct.pack(">HHBHHB", 0xFFC0, 11, 8, HEIGHT, WIDTH, 1) + b"\1\x11\0"
    return b"\xff\xd8" + frame + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + bytes(99) + b"\xff\xd9"


def _two_channels() -> bytes:
    frame = struct.pack(">HHBHHB", 0xFFC0, 14, 8, HEIGHT, WIDTH, 2) + b"\1\x11\0\2\x11\0"
    return _JPEG[:_FRAME] + frame + _JPEG[_BEHIND_FRAME:]


def _small_canvas() -> bytes:
    """A WebP that says 20x16 in its extended header and more in its picture."""
    canvas = bytes(4) + (19).to_bytes(3, "little") + (15).to_bytes(3, "little")
    return riff((b"VP8X", canvas), (b"VP8L", FILES["lossless webp"][20:]))


def _many_chunks() -> bytes:
    empty = with_chunk(_PNG, b"teSt", b"")[33:45]
    return _PNG[:33] + empty * 100_001 + _PNG[33:]


def _many_webp_chunks() -> bytes:
    chunks = b"teSt\0\0\0\0" * 100_001
    size = struct.pack("<I", 4 + 18 + len(chunks))
    return b"RIFF" + size + b"WEBPVP8X\x0a\0\0\0" + bytes(10) + chunks


def _many_scans() -> bytes:
    """Small, and minutes of work: libjpeg goes over the whole picture for each scan."""
    data = saved(Image.new("L", (7000, 7000)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 1000 + data[-2:]


CORRUPT: Files = {
    "PNG with a wrong checksum": _wrong_checksum(),
    "PNG without picture data": _PNG[:33] + _PNG[-12:],
    "PNG of colour type 5": png(depth=8, colour=5, row=bytes(32)),
    "PNG of no width": png(depth=8, colour=0, row=b"", size=(0, 32)),
    "PNG of 100,001 parts": _many_chunks,
    "JPEG without a picture": b"\xff\xd8\xff\xe0\0\4ab\xff\xd9",
    "JPEG without tables": _without_tables(),
    "JPEG of no height": jpeg_of_size(_JPEG, WIDTH, 0),
    "JPEG with two frame headers": _JPEG[:_BEHIND_FRAME] + _JPEG[_FRAME:],
    "JPEG of two channels": _two_channels(),
    "JPEG with a broken Adobe marker": with_segment(_JPEG, 0xEE, b"Adobe"),
    "JPEG of 200,000 parts": lambda: _JPEG[:2] + b"\xff\xe0\0\2" * 200_000 + _JPEG[2:],
    "progressive of 7000x7000 with 1,000 scans": _many_scans,
    "WebP that starts with something else": riff((b"ABCD", bytes(10))),
    "WebP of 100,001 parts": _many_webp_chunks,
    "WebP whose picture is larger than its canvas": _small_canvas(),
}

_LARGEST_VP8 = b"\0\0\0\x9d\1\x2a\xff\x3f\xff\x3f"
TOO_MANY_PIXELS: Files = {
    "PNG of 60000x60000": png(depth=8, colour=2, row=bytes(99), size=(60_000, 60_000)),
    "PNG of 7072x7072": partial(saved, Image.new("1", (7072, 7072)), "PNG"),
    "JPEG of 65500x65500": jpeg_of_size(_JPEG, 65_500, 65_500),
    "progressive of 65535x65535": jpeg_of_size(FILES["progressive"], 65_535, 65_535),
    "WebP of 16383x16383": riff((b"VP8 ", _LARGEST_VP8)),
    "WebP canvas of 16777216x16777216": riff((b"VP8X", bytes(4) + b"\xff" * 6)),
    # Run lengths, so that its data could be as short as it is.
    "BMP of 30000x30000": _BMP[:18]
    + struct.pack("<iiHHII", 30_000, 30_000, 1, 8, 1, 0)
    + _BMP[38:],
}

TOO_SMALL: Files = {
    "PNG of 1x1": partial(saved, Image.new("RGB", (1, 1)), "PNG"),
    "PNG of 1x30000": partial(saved, Image.new("L", (1, 30_000)), "PNG"),
    "JPEG of 30000x1": partial(saved, Image.new("L", (30_000, 1)), "JPEG"),
    "WebP of 16x15": partial(saved, Image.new("RGB", (16, 15)), "WEBP"),
}

TOO_NARROW: Files = {
    "PNG of 65535x20": partial(saved, Image.new("1", (65_535, 20)), "PNG"),
    "JPEG of 16x1601": partial(saved, Image.new("L", (16, 1601)), "JPEG"),
}

# All show the scene.
ODD_BUT_GOOD: Files = {
    "JPEG with bytes behind it": _JPEG + b"\0\xff tail \xff\xd9",
    "JPEG with a zip behind it": _JPEG + _zip(),
    "JPEG with a comment of length 0": _JPEG[:2] + b"\xff\xfe\0\0" + _JPEG[2:],
    "JPEG with an embedded thumbnail": with_segment(
        _JPEG, 0xE1, exif(1) + saved(Image.new("RGB", (160, 120)), "JPEG")
    ),
    "JPEG with a second picture inside": saved(
        scene(), "MPO", save_all=True, append_images=[scene(200, 150)], quality=95
    ),
    "JPEG with a broken index of pictures": with_segment(_JPEG, 0xE2, b"MPF\0\xff\xff"),
    "JPEG with a broken Photoshop part": with_segment(
        _JPEG, 0xED, b"Photoshop 3.0\x008BIM\xff\xff"
    ),
    "JPEG with a broken colour profile": with_segment(_JPEG, 0xE2, b"ICC_PROFILE\0"),
    "JPEG with part 3 of 255 of a profile": with_segment(
        _JPEG, 0xE2, b"ICC_PROFILE\0\3\xff" + bytes(10)
    ),
    "JPEG with garbage as its profile": saved(
        scene(), "JPEG", quality=95, icc_profile=b"garbage" * 100
    ),
    "PNG with bytes behind it": _PNG + b"tail",
    "PNG with HTML in a text": with_chunk(_PNG, b"tEXt", b"a\0<script>alert(1)</script>"),
    "PNG with a broken colour profile": with_chunk(_PNG, b"iCCP", b"a"),
    "PNG with garbage as its profile": with_chunk(_PNG, b"iCCP", b"a\0\0garbage"),
    "PNG with a text of 64 MiB": lambda: with_chunk(
        _PNG, b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26))
    ),
    "PNG with a profile of 64 MiB": lambda: with_chunk(
        _PNG, b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26))
    ),
}
