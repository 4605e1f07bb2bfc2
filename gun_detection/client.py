"""A client of the predict service.

    with Client("https://guns.example.org", api_key=os.environ["API_KEY"]) as client:
        prediction = client.predict("entrance.jpg")
        for detection in prediction.detections:
            print(detection.score, detection.box)

Predictions are a model's guess, and unreviewed. Errors are those of `gun_detection.errors`.
"""

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import ValidationError

from gun_detection.errors import (
    ImageError,
    NotFoundError,
    ServiceUnavailableError,
    SettingsError,
    TerminalError,
    TransientError,
)
from gun_detection.images import Reason
from gun_detection.serving.answers import (
    BatchItem,
    BatchPrediction,
    Detection,
    ErrorAnswer,
    Failure,
    ModelCard,
    Prediction,
)

__all__ = ["BatchItem", "BatchPrediction", "Client", "Detection", "ModelCard", "Prediction"]

Picture = bytes | str | Path
_Answer = TypeVar("_Answer", Prediction, BatchPrediction, ModelCard)

# Asking again does no harm, whatever became of the first request.
_TRY_AGAIN = {408, 429, 502, 503, 504}
# With these the service itself says after how long; where it does not, to ask again would not help.
_SAY_WHEN = {429, 503}


class Client:
    """A context manager for one service; threads may share it.

    A request that fails for a while (connection, 429, 503 …) is made again, `retries` times at
    most, after as long as the service asks for and up to a quarter more; where it asks for more
    than `longest_pause` seconds, not at all.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        longest_pause: float = 75.0,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._retries, self._longest_pause = retries, longest_pause
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def predict(
        self, picture: Picture, *, threshold: float | None = None, store: bool = False
    ) -> Prediction:
        """The guns in a picture, a path or its bytes.

        Raises `ImageError` for a picture that cannot be used, `ServiceUnavailableError` when all
        tries have failed, `SettingsError` without a valid key, and other `TerminalError`s.
        """
        response = self._post("predict/", "file", [picture], _given(threshold, store, "json"))
        return _parsed(Prediction, response)

    def predict_batch(
        self, pictures: Sequence[Picture], *, threshold: float | None = None, store: bool = False
    ) -> BatchPrediction:
        """The guns in several pictures, all by the same model version; each may fail alone."""
        response = self._post("predict/batch", "files", pictures, _given(threshold, store))
        return _parsed(BatchPrediction, response)

    def overlay(self, picture: Picture, *, threshold: float | None = None) -> bytes:
        """The picture as a PNG file with its boxes drawn in; raises as `predict`."""
        return self._post("predict/", "file", [picture], _given(threshold, False, "png")).content

    def model(self) -> ModelCard:
        """The model version that answers now."""
        return _parsed(ModelCard, self._request("GET", "model"))

    def ready(self) -> bool:
        """Whether the service has a model to answer with; asked once."""
        try:
            return self._http.get("ready").status_code == 200
        except httpx.TransportError:
            return False

    def _post(
        self, path: str, field: str, pictures: Sequence[Picture], parameters: Mapping[str, str]
    ) -> httpx.Response:
        files = [(field, _file(picture)) for picture in pictures]
        return self._request("POST", path, params=parameters, files=files)

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        for tried in range(self._retries + 1):
            last = tried == self._retries
            try:
                response = self._http.request(method, path, **arguments)
            except httpx.TransportError as error:
                if last:
                    raise ServiceUnavailableError(
                        f"the service at {self._http.base_url} cannot be reached: {error!r}"
                    ) from error
                _sleep(_pause(tried, None))
                continue
            if response.is_success:
                return response
            failed = _error(response)
            pause = _pause(tried, response.headers.get("retry-after"))
            if not isinstance(failed, TransientError) or last or pause > self._longest_pause:
                raise failed
            _sleep(pause)
        raise AssertionError("the last try has returned or raised")


def _pause(tried: int, asked: str | None) -> float:
    """Seconds: what the service asks for, else twice as long each time."""
    return float(asked) if asked and asked.isdecimal() else 0.5 * 2**tried


def _sleep(seconds: float) -> None:
    """A little longer, so that many clients do not come back at once."""
    time.sleep(seconds * random.uniform(1, 1.25))


def _given(threshold: float | None, store: bool, format: str | None = None) -> dict[str, str]:  # noqa: A002
    given = {"threshold": None if threshold is None else f"{threshold:g}", "format": format}
    return {k: v for k, v in given.items() if v} | ({"store": "true"} if store else {})


def _file(picture: Picture) -> tuple[str, bytes]:
    if isinstance(picture, bytes):
        return "picture", picture
    path = Path(picture)
    return path.name, path.read_bytes()


def _parsed(kind: type[_Answer], response: httpx.Response) -> _Answer:
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        raise TerminalError(
            f"{response.url} gave no answer that this client understands: is it the predict "
            f"service, and of this version? ({error.error_count()} differences)",
            reason="BAD_ANSWER",
        ) from None


def _error(response: httpx.Response) -> Exception:
    failure = _failure(response)
    status = response.status_code
    if failure is None:
        # Of something in between, or not of the predict service.
        message, reason = f"{response.url} answered {status}", "HTTP"
    else:
        message, reason = failure.message, failure.reason
    final = failure is not None and status in _SAY_WHEN and "retry-after" not in response.headers
    if status in _TRY_AGAIN and not final:
        return ServiceUnavailableError(message, reason=reason)
    if reason in set(Reason):
        return ImageError(message, reason=reason)
    if status in (401, 403):
        return SettingsError(message, reason=reason)
    if status == 404:
        return NotFoundError(message, reason=reason)
    return TerminalError(message, reason=reason)


def _failure(response: httpx.Response) -> Failure | None:
    """What the service itself says of it."""
    try:
        return ErrorAnswer.model_validate_json(response.content).error
    except ValidationError:
        return None
