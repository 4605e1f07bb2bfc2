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
from gun_detection.images.jpeg import jpeg_pixel_data
from gun_detection.images.png import png_pixel_data
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
# What is left of a file for its plugin; the plugins of the other formats read no metadata.
_PIXEL_DATA = {"JPEG": jpeg_pixel_data, "PNG": png_pixel_data}
# A longer side of more times the shorter one leaves nothing of it at a detector's input size.
_MOST_ASPECT = 100
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
    """`pixels` is uint8 (H, W, 3) RGB, upright; `frames` above 1 means the first of many.

    `width` and `height` are those of the whole upright picture: `pixels` may be smaller.
    """

    pixels: np.ndarray
    width: int
    height: int
    format: str
    frames: int


def read_header(data: bytes, limits: DecodeLimits) -> ImageHeader:
    """Everything that can be refused before a pixel is decoded.

    Raises `ImageError` with reason EMPTY, TOO_LARGE, NOT_IMAGE, UNSUPPORTED_FORMAT, TRUNCATED,
    CORRUPT, TOO_MANY_PIXELS, TOO_SMALL or TOO_NARROW.
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
    shorter, longest = sorted((header.width, header.height))
    if shorter < limits.min_side:
        raise ImageError(
            f"{size}, its shorter side is below {limits.min_side}", reason=Reason.TOO_SMALL
        )
    if longest > _MOST_ASPECT * shorter:
        raise ImageError(
            f"{size}, one side more than {_MOST_ASPECT} times the other: cut it into parts",
            reason=Reason.TOO_NARROW,
        )
    return header


def decode(data: bytes, limits: DecodeLimits, fit: tuple[int, int] | None = None) -> DecodedImage:
    """Decode in this process; what strangers upload belongs into `SandboxedDecoder`.

    With `fit`, the (shorter side, longest side) in pixels that a network enlarges or shrinks
    pictures to, a larger picture comes smaller, but never smaller than the network will make it:
    a JPEG is decoded at a half, a quarter or an eighth of its size, of other formats so many pixels
    are averaged. Without `fit` it comes whole.

    Raises `ImageError` with one of the reasons of `read_header`, or DECODE_MEMORY. A JPEG that is
    damaged in the middle of its data cannot be told from a good one: libjpeg fills the gap.
    """
    header = read_header(data, limits)
    size = (header.width, header.height)
    stored = size if header.orientation < 5 else size[::-1]
    try:
        if header.format in _PIXEL_DATA:
            data = _PIXEL_DATA[header.format](data)
        with _PLUGINS[header.format](io.BytesIO(data)) as image:
            if image.size != stored:
                raise ValueError(f"two sizes, {stored} and {image.size}")
            if fit is not None:
                _draft(image, fit)
            pixels = _to_rgb(image)
        if fit is not None:
            pixels = _reduce(pixels, fit)
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
    return DecodedImage(
        _upright(pixels, header.orientation),
        header.width,
        header.height,
        header.format,
        header.frames,
    )


def _draft(image: ImageFile.ImageFile, fit: tuple[int, int]) -> None:
    """Let libjpeg leave out the frequencies that shrinking would; no-op for other formats."""
    most = _factor(image.size, fit)
    factor = next(factor for factor in (8, 4, 2, 1) if factor <= most)
    if factor > 1:
        # Pillow takes the largest of its factors that gives at least this size.
        image.draft(None, (image.width // factor, image.height // factor))


def _reduce(pixels: np.ndarray, fit: tuple[int, int]) -> np.ndarray:
    """The mean of so many pixels for each; as uint8, before anybody makes floats of them."""
    factor = _factor(pixels.shape[:2], fit)
    return np.array(Image.fromarray(pixels).reduce(factor)) if factor > 1 else pixels


def _factor(size: tuple[int, ...], fit: tuple[int, int]) -> int:
    """By how much a picture can be shrunk without being smaller than the network makes it."""
    return max(1, int(max(min(size) / fit[0], max(size) / fit[1])))


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
