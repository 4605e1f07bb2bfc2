"""The one decoder of pictures: training, scoring and serving all see the pixels that it returns.

JPEG, PNG, WebP and BMP are told by content, never by name, and come out as upright 8-bit RGB:
- EXIF orientation is applied (from the EXIF block only; colour profiles and gamma are ignored);
- transparent pixels lie over white, except in BMP, where the alpha channel is ignored because
  many programs leave it at zero;
- 16-bit samples keep their high byte;
- CMYK JPEGs are read as Adobe writes them, inverted, also where the Adobe marker is missing;
- of an animation the first frame is taken;
- texts, profiles and thumbnails are not read at all, so that they may be as broken as they like.

Where only detections are wanted, large JPEGs may be decoded at the scale that the network needs.
"""

from gun_detection.images.decoding import DecodedImage, DecodeLimits, decode, read_header
from gun_detection.images.drawing import draw_boxes, encode_jpeg, encode_png
from gun_detection.images.headers import ImageHeader
from gun_detection.images.reasons import DOUBTFUL, Reason
from gun_detection.images.sandbox import DecoderPool, SandboxedDecoder

__all__ = [
    "DOUBTFUL",
    "DecodeLimits",
    "DecodedImage",
    "DecoderPool",
    "ImageHeader",
    "Reason",
    "SandboxedDecoder",
    "decode",
    "draw_boxes",
    "encode_jpeg",
    "encode_png",
    "read_header",
]
