"""Why a picture is refused."""

from enum import StrEnum

from gun_detection.errors import ImageError


class Reason(StrEnum):
    """Why a picture cannot be used; stored in rows, so never rename one."""

    EMPTY = "EMPTY"
    NOT_IMAGE = "NOT_IMAGE"
    UNSUPPORTED_FORMAT = "UNSUPPORTED_FORMAT"
    TRUNCATED = "TRUNCATED"
    CORRUPT = "CORRUPT"
    TOO_LARGE = "TOO_LARGE"
    TOO_MANY_PIXELS = "TOO_MANY_PIXELS"
    TOO_SMALL = "TOO_SMALL"
    TOO_NARROW = "TOO_NARROW"
    DECODER_CRASHED = "DECODER_CRASHED"
    DECODE_TIMEOUT = "DECODE_TIMEOUT"
    DECODE_MEMORY = "DECODE_MEMORY"


# A machine without time or memory can bring this about as well as a picture.
DOUBTFUL = frozenset({Reason.DECODER_CRASHED, Reason.DECODE_TIMEOUT})

# More segments or chunks than any real file has; each costs time before a limit on time applies.
MOST_PARTS = 100_000


def truncated(name: str) -> ImageError:
    return ImageError(
        f"this {name} ends before its data does: upload it again", reason=Reason.TRUNCATED
    )


def corrupt(message: str) -> ImageError:
    return ImageError(message, reason=Reason.CORRUPT)


def too_many_parts(name: str) -> ImageError:
    return corrupt(f"this {name} consists of more than {MOST_PARTS} parts")


def unsupported(what: str) -> ImageError:
    return ImageError(
        f"{what} is not read: convert it to JPEG, PNG, WebP or BMP",
        reason=Reason.UNSUPPORTED_FORMAT,
    )
