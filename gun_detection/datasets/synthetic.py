"""Drawn pictures of gun-like silhouettes: a data set that needs no download and is learnt fast.

Pistols and long guns, rotated and mirrored, lie on textured backgrounds among coloured shapes
and harmless things (drills, phones, hammers, umbrellas …); every fifth picture has only those.
The same number and seed give the same pixels and boxes. Boxes are tight around the drawn mask.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from gun_detection.datasets.labels import Boxes, to_boxes

DEFAULT_COUNT = 200
_SIZES = ((240, 180), (256, 192), (288, 208), (320, 240), (224, 224), (192, 256))
_QUALITY = 88
# Sub-pixel steps of OpenCV's polygon drawing: 2**4 per pixel.
_SHIFT = 4

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]
Colour = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Picture:
    """A JPEG file and its boxes, (N, 4) xyxy in pixels."""

    name: str
    data: bytes
    boxes: Boxes


def draw_pictures(count: int = DEFAULT_COUNT, seed: int = 0) -> Iterator[Picture]:
    """`count` pictures, one at a time; picture i depends on the seed and i only."""
    for index in range(count):
        yield draw_picture(index, seed)


def upload_pictures(count: int, seed: int) -> list[Picture]:
    """Pictures to upload in a demonstration: never those of a data set, with and without guns.

    The first has a gun and the second has none, so that two are enough to show both.
    """
    pictures = []
    for index in range(count):
        guns = index % 3 != 1
        pictures.append(_draw(f"upload-{seed}-{index:04d}.jpg", [seed, index, 1], guns))
    return pictures


def hold_on_side(data: bytes) -> bytes:
    """The same picture as a camera held on its side stores it: turned, with an EXIF note."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        turned = image.transpose(Image.Transpose.ROTATE_90)
        turned.save(buffer, "JPEG", quality=_QUALITY, exif=exif)
    return buffer.getvalue()


def draw_picture(index: int, seed: int) -> Picture:
    """Picture `index` of the set with this seed."""
    return _draw(picture_name(index), [seed, index], index % 5 != 4)


def picture_name(index: int) -> str:
    return f"synthetic-{index:06d}.jpg"


def _draw(name: str, entropy: list[int], guns: bool) -> Picture:
    random = np.random.default_rng(entropy)
    width, height = _SIZES[random.integers(len(_SIZES))]
    pixels = _background(random, width, height)
    for _ in range(random.integers(2, 6)):
        _clutter(random, pixels)
    taken = np.zeros((height, width), np.uint8)
    boxes = []
    if guns:
        for _ in range(1 if random.random() < 0.7 else 2):
            box = _place(random, pixels, taken, _gun, (0.28, 0.55))
            if box is not None:
                boxes.append(box)
    for _ in range(random.integers(0, 2) if guns else random.integers(1, 4)):
        _place(random, pixels, taken, _confusable, (0.2, 0.45))
    noise = random.normal(0, 3, pixels.shape)
    pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return Picture(name, _jpeg(pixels), to_boxes(boxes))


def _jpeg(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _background(random: np.random.Generator, width: int, height: int) -> Pixels:
    """Coloured noise of several octaves, light enough for a dark gun to stand out."""
    base = random.uniform(110, 215, 3)
    texture = np.zeros((height, width, 3))
    for cells in (3, 6, 12, 24, 48):
        coarse = random.normal(0, 1, (cells, cells, 3)).astype(np.float32)
        coarse = 0.6 * coarse.mean(axis=2, keepdims=True) + 0.4 * coarse
        texture += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * (
            36 / cells**0.4
        )
    return np.clip(base + texture, 0, 255).astype(np.uint8)


def _clutter(random: np.random.Generator, pixels: Pixels) -> None:
    """One coloured rectangle, ellipse or triangle somewhere."""
    height, width = pixels.shape[:2]
    centre = random.uniform(0, 1, 2) * (width, height)
    size = random.uniform(0.05, 0.2, 2) * min(width, height)
    shape = (_rectangle(-1, -1, 1, 1), _ellipse(0, 0, 1, 1), np.array([[-1, 1], [1, 1], [0, -1]]))[
        random.integers(3)
    ]
    points = _turn(shape * size, random.uniform(0, np.pi)) + centre
    _fill(pixels, points, _colour(random))


def _colour(random: np.random.Generator) -> Colour:
    red, green, blue = random.integers(40, 246, 3)
    return int(red), int(green), int(blue)


def _place(
    random: np.random.Generator,
    pixels: Pixels,
    taken: Mask,
    make: Callable[[np.random.Generator], list[tuple[Points, Colour]]],
    share: tuple[float, float],
) -> tuple[float, float, float, float] | None:
    """Draw a thing of which the longer extent is a share of the shorter side, where there is room.

    Returns its box, or None when ten attempts found no free place.
    """
    height, width = taken.shape
    parts = make(random)
    angle = random.uniform(0, 2 * np.pi)
    mirror = random.choice((-1.0, 1.0))
    everything = np.concatenate([points for points, _ in parts])
    middle = (everything.min(axis=0) + everything.max(axis=0)) / 2
    turned = [(_turn((points - middle) * (mirror, 1), angle), colour) for points, colour in parts]
    corners = np.concatenate([points for points, _ in turned])
    extent = np.ptp(corners, axis=0).max()
    scale = random.uniform(*share) * min(width, height) / extent
    low, high = corners.min(axis=0) * scale, corners.max(axis=0) * scale
    for _ in range(10):
        centre = random.uniform(-low + 3, (width, height) - high - 3)
        x1, y1 = np.floor(centre + low).astype(int)
        x2, y2 = np.ceil(centre + high).astype(int) + 1
        if not taken[max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2].any():
            break
    else:
        return None
    mask = np.zeros_like(taken)
    for points, colour in turned:
        _fill(pixels, points * scale + centre, colour)
        _fill(mask, points * scale + centre, 255)
    taken[y1:y2, x1:x2] = 255
    rows, columns = (
        np.flatnonzero((mask > 127).any(axis=1)),
        np.flatnonzero((mask > 127).any(axis=0)),
    )
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _gun(random: np.random.Generator) -> list[tuple[Points, Colour]]:
    grey = int(random.integers(8, 52))
    dark = (grey, grey, min(255, grey + int(random.integers(0, 8))))
    light = (grey + 22, grey + 22, grey + 24)
    wood = (grey + 40, grey + 22, grey) if random.random() < 0.4 else dark
    pistol = random.random() < 0.6
    return _pistol(random, dark, light, wood) if pistol else _long_gun(random, dark, light, wood)


def _pistol(
    random: np.random.Generator, dark: Colour, light: Colour, wood: Colour
) -> list[tuple[Points, Colour]]:
    """Barrel to the left: slide, frame, slanted grip, trigger guard with its trigger, sights."""
    grip = random.uniform(0.5, 0.62)
    lean = random.uniform(0.08, 0.18)
    slide = random.uniform(0.17, 0.22)
    return [
        (_rectangle(0, 0, 1, slide), dark),
        (_rectangle(0.06, slide - 0.02, 0.98, slide + 0.09), dark),
        (
            np.array(
                [
                    [0.66, slide],
                    [0.97, slide],
                    [0.97 + lean, slide + grip],
                    [0.7 + lean, slide + grip],
                ]
            ),
            wood,
        ),
        *_ring(0.56, slide + 0.15, 0.13, 0.1, dark),
        (_rectangle(0.55, slide + 0.05, 0.585, slide + 0.17), dark),
        (_rectangle(0.04, -0.04, 0.09, 0.02), dark),
        (_rectangle(0.9, -0.05, 0.96, 0.02), dark),
        (_rectangle(0.05, slide * 0.45, 0.6, slide * 0.55), light),
    ]


def _long_gun(
    random: np.random.Generator, dark: Colour, light: Colour, wood: Colour
) -> list[tuple[Points, Colour]]:
    """Barrel to the left: barrel, fore-end, receiver, magazine, grip, trigger guard, stock."""
    magazine = random.uniform(0.14, 0.24)
    bend = random.uniform(-0.07, 0.02)
    return [
        (_rectangle(0, 0.035, 0.5, 0.075), dark),
        (_rectangle(0.2, 0.02, 0.48, 0.12), wood),
        (_rectangle(0.42, 0, 0.74, 0.14), dark),
        (
            np.array(
                [
                    [0.46, 0.13],
                    [0.55, 0.13],
                    [0.53 + bend, 0.13 + magazine],
                    [0.44 + bend, 0.13 + magazine],
                ]
            ),
            dark,
        ),
        (np.array([[0.65, 0.13], [0.73, 0.13], [0.78, 0.3], [0.7, 0.3]]), wood),
        *_ring(0.61, 0.17, 0.05, 0.045, dark),
        (np.array([[0.72, 0.01], [1, 0.03], [1, 0.2], [0.94, 0.2], [0.72, 0.11]]), wood),
        (_rectangle(0.02, -0.02, 0.045, 0.05), dark),
        (_rectangle(0.5, 0.03, 0.68, 0.05), light),
    ]


def _confusable(random: np.random.Generator) -> list[tuple[Points, Colour]]:
    colour = _colour(random)
    dark: Colour = (int(random.integers(15, 60)),) * 3
    kinds: tuple[list[tuple[Points, Colour]], ...] = (
        [  # phone
            (_rectangle(0, 0, 0.5, 1), dark),
            (_rectangle(0.04, 0.08, 0.46, 0.9), colour),
        ],
        [  # hammer
            (_rectangle(0, 0.42, 1, 0.5), (150, 105, 60)),
            (_rectangle(0.9, 0.2, 1.04, 0.72), dark),
        ],
        [  # drill: a round coloured body, a bit, a battery
            (_ellipse(0.5, 0.2, 0.42, 0.2), colour),
            (_rectangle(-0.22, 0.18, 0.12, 0.22), (170, 170, 175)),
            (_rectangle(0.5, 0.2, 0.72, 0.75), colour),
            (_rectangle(0.38, 0.7, 0.84, 0.9), dark),
        ],
        [(_rectangle(0, 0, 0.16, 1), colour), (_rectangle(0, 0.84, 0.7, 1), colour)],  # corner
        [(_rectangle(0, 0, 1, 0.06), dark)],  # stick
        [  # umbrella
            (_half_ellipse(0.5, 0.4, 0.5, 0.4), colour),
            (_rectangle(0.48, 0.4, 0.52, 0.95), dark),
            *_ring(0.44, 0.95, 0.08, 0.06, dark),
        ],
    )
    return kinds[random.integers(len(kinds))]


def _rectangle(x1: float, y1: float, x2: float, y2: float) -> Points:
    return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])


def _ellipse(x: float, y: float, a: float, b: float, turns: float = 1.0) -> Points:
    angles = np.linspace(0, 2 * np.pi * turns, 25)
    return np.stack([x + a * np.cos(angles), y + b * np.sin(angles)], axis=1)


def _half_ellipse(x: float, y: float, a: float, b: float) -> Points:
    return _ellipse(x, y, a, -b, 0.5)


def _ring(x: float, y: float, a: float, b: float, colour: Colour) -> list[tuple[Points, Colour]]:
    """An ellipse as a band of quadrangles, with the background showing through."""
    outer, inner = _ellipse(x, y, a, b), _ellipse(x, y, a * 0.72, b * 0.68)
    return [
        (np.array([outer[i], outer[i + 2], inner[i + 2], inner[i]]), colour)
        for i in range(0, 24, 2)
    ]


def _turn(points: Points, angle: float) -> Points:
    cosine, sine = np.cos(angle), np.sin(angle)
    turned: Points = points @ np.array([[cosine, sine], [-sine, cosine]])
    return turned


def _fill(canvas: Pixels, points: Points, colour: Colour | int) -> None:
    fixed = np.round(points * 2**_SHIFT).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], colour, lineType=cv2.LINE_AA, shift=_SHIFT)
