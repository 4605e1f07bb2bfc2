"""Bytes of small picture files of every format and mode, good ones, for tests of several parts."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30
RED, GREEN, BLUE, YELLOW = (250, 20, 20), (20, 240, 20), (20, 20, 230), (230, 230, 40)


def scene(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Smooth, with another colour in each corner, so that a turn or a cut shows.

    Red is at the top left, green at the top right, blue and yellow are below.
    """
    corners = np.array([[RED, GREEN], [BLUE, YELLOW]], np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def saved(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    *,
    depth: int,
    colour: int,
    row: bytes,
    rows: int = 32,
    size: tuple[int, int] = (32, 32),
    extra: bytes = b"",
) -> bytes:
    """A PNG that says it is of this size; its data holds `rows` equal rows."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    data = zlib.compress((b"\0" + row) * rows)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def with_segment(data: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment at its start."""
    segment = struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body
    return data[:2] + segment + data[2:]


def with_chunk(data: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    return data[:33] + chunk(kind, body) + data[33:]


def jpeg_of_size(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header says another size."""
    start = next(at for marker in (b"\xff\xc0", b"\xff\xc2") if (at := data.find(marker)) > 0)
    return data[: start + 5] + struct.pack(">HH", height, width) + data[start + 9 :]


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP file of these chunks, (kind, body)."""
    parts = [
        kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for kind, body in chunks
    ]
    content = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """An EXIF block that holds nothing but the orientation; a kind of 3 is the right one."""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 0x0112, kind, 1, orientation, 0)
    return b"Exif\0\0" + magic + struct.pack(order + "IH", 8, 1) + entry + bytes(4)


def animation(name: str) -> bytes:
    """Two frames, the second one black."""
    second = Image.new("RGB", (WIDTH, HEIGHT), "black")
    return saved(scene(), name, save_all=True, append_images=[second], lossless=True)


def bmp_with_alpha_zero() -> bytes:
    """32 bits with an alpha mask and every alpha at 0, as screenshot programs write it."""
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", 108, 32, 32, 1, 32, 3, 32 * 32 * 4, 0, 0, 0, 0)
    info += masks + bytes(52)
    head = b"BM" + struct.pack("<IHHI", 14 + 108 + 4096, 0, 0, 14 + 108)
    return head + info + bytes([30, 20, 10, 0]) * 1024


def cmyk_without_adobe_marker() -> bytes:
    data = saved(Image.new("CMYK", (32, 32), (255, 0, 0, 0)), "JPEG")
    start = data.index(b"\xff\xee")
    (length,) = struct.unpack_from(">H", data, start + 2)
    return data[:start] + data[start + 2 + length :]


def interlaced_png() -> bytes:
    """32x32 grey pixels of value 77 in seven passes, which Pillow does not write."""
    passes = ((4, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32))
    rows = b"".join((b"\0" + bytes([77]) * columns) * count for count, columns in passes)
    header = struct.pack(">IIBBBBB", 32, 32, 8, 0, 0, 0, 1)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


# Every one shows the scene.
FILES = {
    "jpeg": saved(scene(), "JPEG", quality=95),
    "progressive": saved(scene(), "JPEG", quality=95, progressive=True),
    "grey jpeg": saved(scene().convert("L"), "JPEG"),
    "cmyk jpeg": saved(scene().convert("CMYK"), "JPEG", quality=95),
    "rgb jpeg": saved(scene(), "JPEG", quality=95, keep_rgb=True),
    "restarts": saved(scene(), "JPEG", restart_marker_blocks=1),
    "png": saved(scene(), "PNG"),
    "palette png": saved(scene().quantize(16), "PNG"),
    "apng": animation("PNG"),
    "webp": saved(scene(), "WEBP", quality=95),
    "lossless webp": saved(scene(), "WEBP", lossless=True),
    "alpha webp": saved(scene().convert("RGBA"), "WEBP", exif=exif(1)),
    "animated webp": animation("WEBP"),
    "bmp": saved(scene(), "BMP"),
    "1-bit bmp": saved(scene().convert("1"), "BMP"),
    "palette bmp": saved(scene().quantize(16), "BMP"),
}

# 32x32 pixels of one colour, and which one it is to become.
ONE_COLOUR = {
    "grey": (png(depth=8, colour=0, row=bytes([77]) * 32), (77, 77, 77)),
    "interlaced": (interlaced_png(), (77, 77, 77)),
    "1 bit": (png(depth=1, colour=0, row=b"\xff" * 4), (255, 255, 255)),
    "4 bits": (png(depth=4, colour=0, row=b"\x88" * 16), (136, 136, 136)),
    "16-bit grey": (png(depth=16, colour=0, row=b"\x12\xff" * 32), (18, 18, 18)),
    "16-bit colour": (png(depth=16, colour=2, row=b"\x12\xff\x34\xff\x56\xff" * 32), (18, 52, 86)),
    "16-bit grey, transparent": (
        png(depth=16, colour=0, row=b"\x12\xff" * 32, extra=chunk(b"tRNS", b"\x12\xff")),
        (255, 255, 255),
    ),
    "half transparent grey": (
        png(depth=8, colour=4, row=bytes([100, 128]) * 32),
        (177, 177, 177),
    ),
    "transparent": (png(depth=8, colour=6, row=bytes([9, 9, 9, 0]) * 32), (255, 255, 255)),
    "opaque": (png(depth=8, colour=6, row=bytes([9, 8, 7, 255]) * 32), (9, 8, 7)),
    "transparent colour": (
        png(
            depth=8,
            colour=2,
            row=bytes([1, 2, 3]) * 32,
            extra=chunk(b"tRNS", bytes([0, 1, 0, 2, 0, 3])),
        ),
        (255, 255, 255),
    ),
    "another transparent colour": (
        png(depth=8, colour=2, row=bytes([1, 2, 3]) * 32, extra=chunk(b"tRNS", bytes(6))),
        (1, 2, 3),
    ),
    "palette": (
        png(depth=8, colour=3, row=bytes(32), extra=chunk(b"PLTE", bytes([5, 6, 7]))),
        (5, 6, 7),
    ),
    "transparent palette": (
        png(
            depth=8,
            colour=3,
            row=bytes(32),
            extra=chunk(b"PLTE", bytes([5, 6, 7])) + chunk(b"tRNS", b"\0"),
        ),
        (255, 255, 255),
    ),
    "cmyk": (saved(Image.new("CMYK", (32, 32), (255, 0, 0, 0)), "JPEG"), (0, 255, 255)),
    "cmyk without Adobe's marker": (cmyk_without_adobe_marker(), (0, 255, 255)),
    "bmp without use of its alpha": (bmp_with_alpha_zero(), (10, 20, 30)),
}
