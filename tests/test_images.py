"""The decoder: which pixels come out, and which files are refused with which reason."""

import io
import random
from dataclasses import replace

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
from tests.picture_files import FILES, HEIGHT, ONE_COLOUR, WIDTH, exif, saved, scene

LIMITS = DecodeLimits(max_pixels=1_000_000, max_bytes=2**21, min_side=16)
SCALED = replace(LIMITS, max_pixels=3_000_000)
LOSSY = 14


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


@pytest.mark.parametrize("name", ONE_COLOUR)
def test_every_mode_becomes_the_one_defined_colour(name: str) -> None:
    data, colour = ONE_COLOUR[name]
    pixels = decode(data, LIMITS).pixels
    assert pixels.shape == (32, 32, 3)
    assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [list(colour)]


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


def test_limits_themselves_are_allowed() -> None:
    data = saved(Image.new("1", (1000, 1000)), "PNG")
    exact = DecodeLimits(max_pixels=1_000_000, max_bytes=len(data), min_side=1000)
    assert decode(data, exact).pixels.shape == (1000, 1000, 3)
    assert refused(data, replace(exact, max_pixels=999_999)) == Reason.TOO_MANY_PIXELS
    assert refused(data, replace(exact, max_bytes=len(data) - 1)) == Reason.TOO_LARGE
    assert refused(data, replace(exact, min_side=1001)) == Reason.TOO_SMALL


@pytest.mark.parametrize(
    ("size", "fit", "reduced"),
    [
        ((1920, 1080), (400, 600), (960, 540)),
        ((1080, 1920), (400, 600), (540, 960)),
        ((1920, 1080), (270, 480), (480, 270)),
        ((1920, 1080), (271, 481), (960, 540)),
        # The longest side decides: the shorter one will be less than it might be.
        ((1920, 1080), (540, 480), (480, 270)),
        ((1921, 1083), (100, 200), (241, 136)),
        ((1921, 1083), (100, 150), (241, 136)),
        ((640, 480), (320, 480), (640, 480)),
        ((640, 480), (800, 1333), (640, 480)),
    ],
)
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": 0}),
        ("L", {}),
        ("CMYK", {}),
    ],
    ids=["baseline", "progressive", "whole colour", "grey", "cmyk"],
)
def test_larger_jpeg_is_decoded_at_the_smallest_scale_that_is_enough(
    size: tuple[int, int],
    fit: tuple[int, int],
    reduced: tuple[int, int],
    mode: str,
    options: dict[str, object],
) -> None:
    data = saved(scene(*size).convert(mode), "JPEG", **options)
    image = decode(data, SCALED, fit)
    assert (image.width, image.height) == size
    assert image.pixels.shape == (reduced[1], reduced[0], 3)
    whole = Image.fromarray(decode(data, SCALED).pixels)
    expected = np.asarray(whole.resize(reduced, Image.Resampling.BOX), int)
    assert np.abs(image.pixels - expected).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_jpeg_is_turned_upright(orientation: int) -> None:
    data = saved(scene(161, 83), "JPEG", exif=exif(orientation), quality=95)
    image = decode(data, LIMITS, (40, 80))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (image.width, image.height) == upright.size
    size = tuple(-(-side // 2) for side in upright.size)
    expected = np.asarray(upright.resize(size, Image.Resampling.BOX), int)
    assert np.abs(image.pixels - expected).mean() < 2


@pytest.mark.parametrize(
    ("fit", "reduced"),
    [((10, 20), (20, 10)), ((30, 60), (80, 40)), ((26, 53), (54, 27)), ((41, 81), (160, 80))],
)
@pytest.mark.parametrize("name", ["PNG", "WEBP", "BMP"])
def test_other_formats_are_averaged_to_the_smallest_size_that_is_enough(
    name: str, fit: tuple[int, int], reduced: tuple[int, int]
) -> None:
    data = saved(scene(160, 80), name)
    image = decode(data, LIMITS, fit)
    assert (image.width, image.height) == (160, 80)
    assert image.pixels.shape == (reduced[1], reduced[0], 3)
    whole = Image.fromarray(decode(data, LIMITS).pixels)
    expected = np.asarray(whole.reduce(160 // reduced[0] + bool(160 % reduced[0])), int)
    assert np.abs(image.pixels - expected).mean() < 2


def test_limit_on_pixels_is_for_the_whole_picture() -> None:
    data = saved(scene(1920, 1080), "JPEG")
    with pytest.raises(ImageError) as caught:
        decode(data, LIMITS, (100, 200))
    assert caught.value.reason == Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize("name", FILES)
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
