"""What the machine does is not blamed on the picture, and what the picture does is."""

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from gun_detection.detector.detections import Detections
from gun_detection.errors import GunDetectionError, ImageError, ServiceUnavailableError
from gun_detection.images import DecoderPool, Reason
from gun_detection.serving import models
from gun_detection.serving.answers import ModelCard
from gun_detection.serving.app import create_app
from gun_detection.serving.models import ServedModel
from gun_detection.serving.pictures import Looked, Pictures
from gun_detection.serving.refusals import refusal_of
from gun_detection.settings import Settings
from tests.picture_files import saved, scene
from tests.scoring.conftest import picture
from tests.scoring.simulated import Simulated
from tests.serving.conftest import serving_here

PICTURE = saved(scene(320, 200), "JPEG")
CARD = ModelCard(
    model="x", architecture="x", threshold=0.5, engine="simulated", device="nowhere",
    input_size=[800, 1333], score_floor=0.05, source="file", dataset=None, loaded_at="",
    stores="never",
)  # fmt: skip


async def look(pictures: Pictures, engine: Simulated) -> Looked:
    served = ServedModel(CARD, engine)
    try:
        return await pictures.look(served, PICTURE)
    finally:
        await served.close()


def looked(engine: Simulated | None = None) -> Looked:
    pictures = Pictures(Settings(decode_timeout=2))
    try:
        return asyncio.run(look(pictures, engine or Simulated()))
    finally:
        pictures.close()


@pytest.mark.parametrize(
    ("most", "kind", "reason", "status"),
    [
        (64 * 64 * 3, ImageError, "DECODE_MEMORY", 422),
        (1, ServiceUnavailableError, "NO_MEMORY", 503),
    ],
)
def test_a_machine_without_memory_for_any_picture_blames_none(
    most: int, kind: type[GunDetectionError], reason: str, status: int
) -> None:
    with pytest.raises(kind) as caught:
        looked(Simulated(most=most))
    assert caught.value.reason == reason
    assert refusal_of(caught.value).status == status


class Broken(Simulated):
    """Computes no numbers for pictures of one width, or for any, and so none for their batch."""

    def __init__(self, width: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._width = width

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        answers = super().__call__(images)
        if self._width is None or any(image.shape[1] == self._width for image in images):
            raise ImageError("no number", reason="NOT_FINITE")
        return answers


@contextmanager
def answering(engine: Simulated, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a service with this engine."""
    monkeypatch.setattr(models, "_load", lambda *_: (CARD, engine))
    settings = Settings(serve_anonymous=True, serve_rate_limit="off", serve_model="x")
    with serving_here(create_app(settings)) as (_, port):
        yield f"http://127.0.0.1:{port}"


def test_a_picture_without_numbers_takes_no_other_of_its_batch_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good, broken = picture(1), picture(2, width=65)
    engine = Broken(65, batch=8, streams=1, seconds=0.05)
    why = {"reason": "NOT_FINITE", "message": "no number"}
    with answering(engine, monkeypatch) as url:

        def ask(data: bytes) -> httpx.Response:
            accept = {"Accept": "application/json"}
            return httpx.post(f"{url}/predict/", files={"file": data}, headers=accept, timeout=60)

        with ThreadPoolExecutor(7) as clients:
            answers = list(clients.map(ask, [good, good, broken, good, good, good, good]))
        files = [("files", data) for data in (good, broken, good)]
        together = httpx.post(f"{url}/predict/batch", files=files, timeout=60)
    assert [answer.status_code for answer in answers] == [200, 200, 422, 200, 200, 200, 200]
    assert answers[2].json() == {"error": why}
    assert together.status_code == 200
    assert [image["error"] for image in together.json()["images"]] == [None, why, None]
    assert max(engine.batches) > 1


def test_a_model_that_computes_no_numbers_blames_no_picture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with answering(Broken(), monkeypatch) as url:
        answer = httpx.post(f"{url}/predict/", files={"file": PICTURE}, timeout=60)
    assert answer.status_code == 503
    assert answer.json()["error"]["reason"] == "NOT_FINITE"
    assert "ask its operator" in answer.json()["error"]["message"]
    assert "retry-after" not in answer.headers
    assert "x is damaged: no number" in caplog.messages


def test_a_decoder_that_hung_once_is_tried_again() -> None:
    pictures = Pictures(Settings(decode_timeout=2))

    async def twice() -> Looked:
        await look(pictures, Simulated())
        for child in psutil.Process().children():
            if "gun_detection.images.decoder_process" in child.cmdline():
                os.kill(child.pid, signal.SIGSTOP)
        return await look(pictures, Simulated())

    try:
        assert asyncio.run(twice()).image.width == 320
    finally:
        pictures.close()


@pytest.mark.parametrize(
    ("fails", "kind", "reason", "tries"),
    [
        (lambda data, tries: tries == 1, None, None, 2),
        (lambda data, tries: data == PICTURE, ImageError, "DECODER_CRASHED", 3),
        (lambda data, tries: True, ServiceUnavailableError, "DECODER_UNAVAILABLE", 3),
    ],
    ids=["once", "of this picture", "of any"],
)
def test_a_decoder_that_dies(
    fails: Any,
    kind: type[GunDetectionError] | None,
    reason: str | None,
    tries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bytes] = []
    decode = DecoderPool.decode

    def dying(pool: DecoderPool, data: bytes, fit: tuple[int, int] | None = None) -> Any:
        asked.append(data)
        if fails(data, len(asked)):
            raise ImageError("it died", reason=Reason.DECODER_CRASHED)
        return decode(pool, data, fit)

    monkeypatch.setattr(DecoderPool, "decode", dying)
    if kind is None:
        assert looked().image.width == 320
    else:
        with pytest.raises(kind) as caught:
            looked()
        assert caught.value.reason == reason
    assert len(asked) == tries
