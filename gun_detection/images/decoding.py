"""Decoding in this process: bytes in, upright 8-bit RGB out."""

import io
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from gun_detection.errors import ImageError
from gun_detection.images.headers import ImageHeader, parse_header
from gun_detection.images.png import check_png_rows
from gun_detection.images.reasons import Reason

if TYPE_CHECKING:
    from gun_detection.settings import Settings

# The plugins themselves and not `Image.open`: nothing but the format that was seen is tried.
_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "BMP": BmpImageFile,
}
# What Pillow's plugins raise for damaged files, as fuzzing found it.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Warning,
)


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Largest picture (pixels), largest file (bytes) and shortest side (pixels) that is decoded."""

    max_pixels: int
    max_bytes: int
    min_side: int

    @classmethod
    def from_settings(cls, settings: "Settings") -> Self:
        return cls(settings.max_image_pixels, settings.max_image_bytes, settings.min_image_side)


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """`pixels` is uint8 (H, W, 3) RGB, upright; `frames` above 1 means the first of many."""

    pixels: np.ndarray
    format: str
    frames: int


def read_header(data: bytes, limits: DecodeLimits) -> ImageHeader:
    """Everything that can be refused before a pixel is decoded.

    Raises `ImageError` with reason EMPTY, TOO_LARGE, NOT_IMAGE, UNSUPPORTED_FORMAT, TRUNCATED,
    CORRUPT, TOO_MANY_PIXELS or TOO_SMALL.
    """
    if len(data) > limits.max_bytes:
        raise ImageError(
            f"the file has {len(data)} bytes, more than the {limits.max_bytes} allowed",
            reason=Reason.TOO_LARGE,
        )
    header = parse_header(data)
    size = f"the picture is {header.width}x{header.height} pixels"
    if header.width * header.height > limits.max_pixels:
        raise ImageError(
            f"{size}, more than the {limits.max_pixels} allowed", reason=Reason.TOO_MANY_PIXELS
        )
    if min(header.width, header.height) < limits.min_side:
        raise ImageError(
            f"{size}, its shorter side is below {limits.min_side}", reason=Reason.TOO_SMALL
        )
    return header


def decode(data: bytes, limits: DecodeLimits) -> DecodedImage:
    """Decode in this process; what strangers upload belongs into `SandboxedDecoder`.

    Raises `ImageError` with one of the reasons of `read_header`, or DECODE_MEMORY. A JPEG that is
    damaged in the middle of its data cannot be told from a good one: libjpeg fills the gap.
    """
    header = read_header(data, limits)
    size = (header.width, header.height)
    stored = size if header.orientation < 5 else size[::-1]
    try:
        if header.format == "PNG":
            check_png_rows(data)
        with _PLUGINS[header.format](io.BytesIO(data)) as image:
            if image.size != stored:
                raise ValueError(f"two sizes, {stored} and {image.size}")
            pixels = _to_rgb(image)
    except MemoryError as error:
        raise ImageError(
            "decoding this picture needs more memory than allowed", reason=Reason.DECODE_MEMORY
        ) from error
    except _DECODER_ERRORS as error:
        truncated = "truncated" in str(error).lower()
        raise ImageError(
            f"this {header.format} is damaged ({error}): upload it again",
            reason=Reason.TRUNCATED if truncated else Reason.CORRUPT,
        ) from error
    return DecodedImage(_upright(pixels, header.orientation), header.format, header.frames)


def _to_rgb(image: ImageFile.ImageFile) -> np.ndarray:
    image.load()
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.format == "BMP":
        return np.array(image.convert("RGB"))
    if image.mode.endswith("A") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return np.array(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
    return np.array(image.convert("RGB"))


def _from_16_bit(image: ImageFile.ImageFile) -> np.ndarray:
    samples = np.asarray(image)
    grey = (samples >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[samples == image.info["transparency"]] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
