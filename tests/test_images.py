"""The decoder: which pixels come out, and which files are refused with which reason."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from gun_detection.errors import ImageError
from gun_detection.images import (
    DecodeLimits,
    ImageHeader,
    Reason,
    decode,
    draw_boxes,
    encode_jpeg,
    encode_png,
    read_header,
)

LIMITS = DecodeLimits(max_pixels=1_000_000, max_bytes=2**21, min_side=16)
WIDTH, HEIGHT = 40, 30
LOSSY = 14


def scene() -> Image.Image:
    """Smooth, with another colour in each corner, so that a turn or a cut shows."""
    corners = np.array([[[250, 20, 20], [20, 240, 20]], [[20, 20, 230], [230, 230, 40]]], np.uint8)
    return Image.fromarray(corners).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)


def saved(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*, depth: int, colour: int, row: bytes, rows: int = 32, extra: bytes = b"") -> bytes:
    """A PNG of 32x32 pixels whose data holds `rows` equal rows."""
    header = struct.pack(">IIBBBBB", 32, 32, depth, colour, 0, 0, 0)
    data = zlib.compress((b"\0" + row) * rows)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def exif(orientation: int, order: str = "<") -> bytes:
    magic = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + magic + struct.pack(order + "IH", 8, 1) + entry + bytes(4)


def animation(name: str) -> bytes:
    second = Image.new("RGB", (WIDTH, HEIGHT), "black")
    return saved(scene(), name, save_all=True, append_images=[second], lossless=True)


def bmp_with_alpha_zero() -> bytes:
    """32 bits with an alpha mask and every alpha at 0, as screenshot programs write it."""
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", 108, 32, 32, 1, 32, 3, 32 * 32 * 4, 0, 0, 0, 0)
    info += masks + bytes(52)
    head = b"BM" + struct.pack("<IHHI", 14 + 108 + 4096, 0, 0, 14 + 108)
    return head + info + bytes([30, 20, 10, 0]) * 1024


FILES = {
    "jpeg": saved(scene(), "JPEG", quality=95),
    "progressive": saved(scene(), "JPEG", quality=95, progressive=True),
    "grey jpeg": saved(scene().convert("L"), "JPEG"),
    "cmyk jpeg": saved(scene().convert("CMYK"), "JPEG", quality=95),
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


def refused(data: bytes, limits: DecodeLimits = LIMITS) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, limits)
    return caught.value.reason


@pytest.mark.parametrize("name", FILES)
def test_decoded_pixels_are_those_of_the_scene(name: str) -> None:
    image = decode(FILES[name], LIMITS)
    assert image.pixels.shape == (HEIGHT, WIDTH, 3)
    assert image.pixels.dtype == np.uint8
    assert image.pixels.flags.c_contiguous
    assert image.pixels.flags.writeable
    expected = scene().convert("L").convert("RGB") if "grey" in name else scene()
    if name == "1-bit bmp":
        expected = scene().convert("1").convert("RGB")
    # Half of a palette's 16 colours is blue steps, which are the coarsest.
    tolerance = 40 if "palette" in name else LOSSY
    difference = np.abs(image.pixels.astype(int) - np.asarray(expected)).mean(axis=(0, 1))
    assert difference.max() < tolerance


@pytest.mark.parametrize("name", ["png", "lossless webp", "bmp", "apng", "animated webp"])
def test_lossless_files_come_back_bit_for_bit(name: str) -> None:
    assert np.array_equal(decode(FILES[name], LIMITS).pixels, np.asarray(scene()))


GREY_ALPHA = {"depth": 8, "colour": 4, "row": bytes([100, 128]) * 32}
CONVERSIONS = {
    "grey": (png(depth=8, colour=0, row=bytes([77]) * 32), (77, 77, 77)),
    "1 bit": (png(depth=1, colour=0, row=b"\xff" * 4), (255, 255, 255)),
    "4 bits": (png(depth=4, colour=0, row=b"\x88" * 16), (136, 136, 136)),
    "16-bit grey": (png(depth=16, colour=0, row=b"\x12\xff" * 32), (18, 18, 18)),
    "16-bit colour": (png(depth=16, colour=2, row=b"\x12\xff\x34\xff\x56\xff" * 32), (18, 52, 86)),
    "16-bit grey, transparent": (
        png(depth=16, colour=0, row=b"\x12\xff" * 32, extra=chunk(b"tRNS", b"\x12\xff")),
        (255, 255, 255),
    ),
    "half transparent grey": (png(**GREY_ALPHA), (177, 177, 177)),
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
    "bmp without use of its alpha": (bmp_with_alpha_zero(), (10, 20, 30)),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_every_mode_becomes_the_one_defined_colour(name: str) -> None:
    data, colour = CONVERSIONS[name]
    pixels = decode(data, LIMITS).pixels
    assert pixels.shape == (32, 32, 3)
    assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [list(colour)]


def test_cmyk_without_adobe_marker_is_read_in_the_same_way() -> None:
    data = saved(Image.new("CMYK", (32, 32), (255, 0, 0, 0)), "JPEG")
    start = data.index(b"\xff\xee")
    (length,) = struct.unpack_from(">H", data, start + 2)
    bare = data[:start] + data[start + 2 + length :]
    assert decode(bare, LIMITS).pixels[0, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(name: str, orientation: int, order: str) -> None:
    data = saved(scene(), name, exif=exif(orientation, order))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode(data, LIMITS).pixels, expected)
    header = read_header(data, LIMITS)
    assert (header.height, header.width) == expected.shape[:2]
    assert header.orientation == orientation


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        exif(6)[:-8],
        exif(9),
        exif(0),
        b"Exif\0\0" + b"X" * 40,
    ],
)
def test_unreadable_exif_means_upright(block: bytes) -> None:
    assert read_header(saved(scene(), "JPEG", exif=block), LIMITS).orientation == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("progressive", ImageHeader("JPEG", WIDTH, HEIGHT, 1, 1)),
        ("png", ImageHeader("PNG", WIDTH, HEIGHT, 1, 1)),
        ("apng", ImageHeader("PNG", WIDTH, HEIGHT, 2, 1)),
        ("lossless webp", ImageHeader("WEBP", WIDTH, HEIGHT, 1, 1)),
        ("webp", ImageHeader("WEBP", WIDTH, HEIGHT, 1, 1)),
        ("animated webp", ImageHeader("WEBP", WIDTH, HEIGHT, 2, 1)),
        ("bmp", ImageHeader("BMP", WIDTH, HEIGHT, 1, 1)),
    ],
)
def test_header_tells_format_size_and_frames(name: str, expected: ImageHeader) -> None:
    assert read_header(FILES[name], LIMITS) == expected
    image = decode(FILES[name], LIMITS)
    assert (image.format, image.frames) == (expected.format, expected.frames)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_ends_early_is_refused_wherever_it_ends(name: str) -> None:
    data = FILES[name]
    cuts = {*range(40, len(data), max(1, len(data) // 200)), *range(len(data) - 40, len(data))}
    assert {refused(data[:cut]) for cut in cuts} == {Reason.TRUNCATED}


@pytest.mark.parametrize("name", FILES)
def test_bytes_after_the_end_are_no_fault(name: str) -> None:
    plain, longer = (decode(data, LIMITS) for data in (FILES[name], FILES[name] + b"\0tail\xff"))
    assert np.array_equal(plain.pixels, longer.pixels)


def test_jpeg_with_a_second_picture_inside_is_read_as_its_first() -> None:
    other = Image.new("RGB", (WIDTH, HEIGHT), "black")
    data = saved(scene(), "MPO", save_all=True, append_images=[other], quality=95)
    image = decode(data, LIMITS)
    assert image.format == "JPEG"
    assert np.abs(image.pixels.astype(int) - np.asarray(scene())).mean() < LOSSY


HUGE = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", HUGE) + chunk(b"IDAT", zlib.compress(bytes(99)))
BAD = {
    "no bytes": (b"", Reason.EMPTY),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", Reason.NOT_IMAGE),
    "text": (b"BM is how this text starts, and it goes on", Reason.NOT_IMAGE),
    "zeros": (bytes(5000), Reason.NOT_IMAGE),
    "pdf": (b"%PDF-1.7 and so on", Reason.NOT_IMAGE),
    "gif": (saved(scene(), "GIF"), Reason.UNSUPPORTED_FORMAT),
    "tiff": (saved(scene(), "TIFF"), Reason.UNSUPPORTED_FORMAT),
    "icon": (saved(scene(), "ICO"), Reason.UNSUPPORTED_FORMAT),
    "jpeg 2000": (saved(scene(), "JPEG2000"), Reason.UNSUPPORTED_FORMAT),
    "avif": (saved(scene(), "AVIF"), Reason.UNSUPPORTED_FORMAT),
    "fits": (b"SIMPLE  =                    T", Reason.UNSUPPORTED_FORMAT),
    "12-bit jpeg": (
        FILES["jpeg"].replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
        Reason.UNSUPPORTED_FORMAT,
    ),
    "png of too few rows": (
        png(depth=8, colour=0, row=bytes(32), rows=31),
        Reason.TRUNCATED,
    ),
    "jpeg without picture": (b"\xff\xd8\xff\xe0\x00\x04ab\xff\xd9", Reason.CORRUPT),
    "jpeg of many parts": (b"\xff\xd8" + b"\xff\xe0\x00\x02" * 200_000, Reason.CORRUPT),
    "png of many parts": (
        FILES["png"][:33] + chunk(b"teSt", b"") * 100_001 + FILES["png"][33:],
        Reason.CORRUPT,
    ),
    "webp of many parts": (
        b"RIFF"
        + struct.pack("<I", 4 + 18 + 8 * 100_001)
        + b"WEBPVP8X\x0a\0\0\0"
        + bytes(10)
        + b"teSt\0\0\0\0" * 100_001,
        Reason.CORRUPT,
    ),
    "canvas of 3.6 gigapixels": (BOMB + chunk(b"IEND", b""), Reason.TOO_MANY_PIXELS),
    "one pixel high": (saved(Image.new("RGB", (400, 1)), "PNG"), Reason.TOO_SMALL),
    "a side of 15": (saved(Image.new("RGB", (15, 90)), "JPEG"), Reason.TOO_SMALL),
    "more bytes than allowed": (FILES["bmp"] + bytes(2**21), Reason.TOO_LARGE),
    "more pixels than allowed": (
        saved(Image.new("1", (1001, 1000)), "PNG"),
        Reason.TOO_MANY_PIXELS,
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_file_is_refused_with_its_reason(name: str) -> None:
    data, reason = BAD[name]
    assert refused(data) == reason


def test_wrong_checksum_is_refused() -> None:
    data = bytearray(FILES["png"])
    data[data.index(b"IDAT") + 20] ^= 1
    assert refused(bytes(data)) == Reason.CORRUPT


def test_limits_themselves_are_allowed() -> None:
    data = saved(Image.new("1", (1000, 1000)), "PNG")
    limits = DecodeLimits(max_pixels=1_000_000, max_bytes=len(data), min_side=1000)
    assert decode(data, limits).pixels.shape == (1000, 1000, 3)


def test_bomb_inside_a_small_canvas_is_not_inflated() -> None:
    data = png(depth=8, colour=0, row=bytes(32), rows=2_000_000)
    assert len(data) < LIMITS.max_bytes
    assert decode(data, LIMITS).pixels.shape == (32, 32, 3)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore:Invalid APNG", "ignore:Image appears to be a malformed MPO")
def test_damage_ends_in_pixels_or_an_image_error(name: str) -> None:
    generator = random.Random(name)
    for _ in range(150):
        data = bytearray(FILES[name])
        for _ in range(generator.choice([1, 3, 20])):
            data[generator.randrange(len(data))] = generator.randrange(256)
        reason = None
        try:
            decode(bytes(data), LIMITS)
        except ImageError as error:
            reason = error.reason
        assert reason in {None, *Reason}


def test_boxes_at_or_above_the_threshold_are_drawn_on_a_copy() -> None:
    pixels = np.full((200, 300, 3), 255, np.uint8)
    boxes = np.array([[10, 20, 110, 120], [150, 50, 290, 190]])
    drawn = draw_boxes(pixels, boxes, np.array([0.5, 0.49]), 0.5)
    assert (pixels == 255).all()
    changed = np.argwhere((drawn != 255).any(axis=2))
    assert changed.min(axis=0).tolist() == [20, 10]
    assert changed.max(axis=0).tolist() == [120, 110]


def test_no_box_draws_nothing() -> None:
    pixels = np.zeros((20, 20, 3), np.uint8)
    assert np.array_equal(draw_boxes(pixels, np.empty((0, 4)), np.empty(0), 0.0), pixels)


@pytest.mark.parametrize("boxes", [np.zeros((1, 4)), np.zeros((2, 3)), np.full((2, 4), np.nan)])
def test_boxes_that_do_not_fit_their_scores_are_refused(boxes: np.ndarray) -> None:
    with pytest.raises(ValueError, match="boxes must be finite"):
        draw_boxes(np.zeros((20, 20, 3), np.uint8), boxes, np.ones(2), 0.5)


def test_encoded_pixels_decode_to_themselves() -> None:
    pixels = np.asarray(scene())
    assert np.array_equal(decode(encode_png(pixels), LIMITS).pixels, pixels)
    jpeg = decode(encode_jpeg(pixels, 95), LIMITS)
    assert jpeg.format == "JPEG"
    assert np.abs(jpeg.pixels.astype(int) - pixels).mean() < LOSSY
