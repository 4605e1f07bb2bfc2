"""What the machine does is not blamed on the picture, and what the picture does is."""

import asyncio
import os
import signal
from typing import Any

import psutil
import pytest

from gun_detection.errors import GunDetectionError, ImageError, ServiceUnavailableError
from gun_detection.images import DecoderPool, Reason
from gun_detection.serving.answers import ModelCard
from gun_detection.serving.models import ServedModel
from gun_detection.serving.pictures import Looked, Pictures
from gun_detection.serving.refusals import refusal_of
from gun_detection.settings import Settings
from tests.picture_files import saved, scene
from tests.scoring.simulated import Simulated

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
