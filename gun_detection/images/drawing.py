"""Boxes drawn onto pixels, and pixels as files that a browser shows."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_BOX_COLOUR = (255, 32, 32)


def draw_boxes(
    pixels: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    threshold: float,
    *,
    colour: tuple[int, int, int] = _BOX_COLOUR,
    label: str | None = None,
) -> np.ndarray:
    """A copy of `pixels`, uint8 (H, W, 3), with the boxes that score at least `threshold`.

    `boxes` is (N, 4) xyxy in pixels and `scores` is (N,); each box carries its score in percent, or
    the `label` instead.
    Raises `ValueError` for other shapes or for boxes that are not finite.
    """
    boxes, scores = np.asarray(boxes, float), np.asarray(scores, float)
    if boxes.shape != (len(scores), 4) or not np.isfinite(boxes).all():
        raise ValueError(f"boxes must be finite and ({len(scores)}, 4), not {boxes.shape}")
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    width = max(2, min(image.size) // 200)
    font = ImageFont.load_default(max(12, min(image.size) // 30))
    # The surest box is drawn last, on top of the others.
    for index in np.argsort(scores, kind="stable"):
        if scores[index] < threshold:
            continue
        x1, y1, x2, y2 = boxes[index].tolist()
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=width)
        text = label or f"{scores[index]:.0%}"
        left, top, right, bottom = draw.textbbox((x1 + width, y1 + width), text, font=font)
        draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), fill=colour)
        draw.text((x1 + width, y1 + width), text, fill=_ink(colour), font=font)
    return np.array(image)


def _ink(colour: tuple[int, int, int]) -> str:
    return "black" if sum(colour) > 400 else "white"


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) RGB as a PNG file."""
    return _encode(pixels, "PNG")


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """uint8 (H, W, 3) RGB as a JPEG file; `quality` from 1 to 95."""
    return _encode(pixels, "JPEG", quality=quality)


def _encode(pixels: np.ndarray, name: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, **options)
    return buffer.getvalue()
