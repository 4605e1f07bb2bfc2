"""What the service refuses, as HTTP says it: every answer that is no success has this one form."""

from collections.abc import Mapping

from gun_detection.errors import GunDetectionError, ImageError, TransientError
from gun_detection.images import Reason

# RFC 9110: 413 content too large, 415 unsupported media type, 422 unprocessable content.
_IMAGE_STATUS = {
    Reason.TOO_LARGE: 413,
    Reason.NOT_IMAGE: 415,
    Reason.UNSUPPORTED_FORMAT: 415,
}


class Refusal(Exception):  # noqa: N818
    """A request that is answered with `status`, `reason` (a stable code) and `message`."""

    def __init__(
        self, status: int, reason: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message
        self.headers = dict(headers or {})


def busy(message: str, seconds: float, reason: str = "BUSY") -> Refusal:
    """To be tried again in so many seconds."""
    return Refusal(503, reason, message, {"Retry-After": str(max(1, round(seconds)))})


def refusal_of(error: GunDetectionError) -> Refusal:
    """How an error of the library is answered."""
    if isinstance(error, ImageError):
        status = _IMAGE_STATUS.get(Reason(error.reason), 422)
        return Refusal(status, error.reason, error.message)
    if isinstance(error, TransientError):
        return busy(error.message, 5, error.reason)
    # Nothing that a client could do: the log says more than it needs to know.
    return Refusal(503, error.reason, "the service cannot answer now: ask its operator")
