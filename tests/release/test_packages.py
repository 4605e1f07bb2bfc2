"""Which package of a small detector is chosen, fetched and opened."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gun_detection.database import open_session
from gun_detection.database.models import EnginePackage, ModelVersion
from gun_detection.detector.detections import Detections
from gun_detection.detector.inference import Predictor
from gun_detection.errors import ModelError, SettingsError, TerminalError
from gun_detection.release import packages
from gun_detection.release.answers import PICTURES
from gun_detection.release.packages import (
    cached_file,
    engine_for,
    load_engine,
    open_engine,
    package_key,
)
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.release.conftest import F32, change, make, wanting

pytestmark = pytest.mark.usefixtures("as_in_a_new_process")


@pytest.mark.usefixtures("quick")
def test_the_cheapest_that_the_machine_can_run_is_chosen(
    version: ModelVersion,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = make(version, F32, settings, storage)
    change(settings, milliseconds=1.5, reference_milliseconds=2.0)
    copy = {c.key: getattr(row, c.key) for c in EnginePackage.__table__.columns if c.key != "id"}
    copy |= {"engine": "openvino-int8", "milliseconds": 1.0, "reference_milliseconds": 2.0}
    with open_session(settings) as session:
        session.add(EnginePackage(**copy))
    for file, sha256 in row.files.items():
        data = storage.get(settings.data_bucket, package_key(version.id, F32, file))
        storage.put(settings.data_bucket, package_key(version.id, "openvino-int8", file), data)
        assert sha256 in file

    def chosen() -> str:
        return open_engine(version, wanting("auto", settings), storage).name

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    assert chosen() == "openvino-int8"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert chosen() == F32
    with pytest.raises(SettingsError, match="lacks the instructions"):
        open_engine(version, wanting("openvino-int8", settings), storage)
    change(settings, milliseconds=2.5)
    assert chosen() == "eager"
    change(settings, milliseconds=1.5, accepted=False)
    assert chosen() == "eager"


@pytest.mark.usefixtures("quick")
def test_damage_is_found_and_a_damaged_copy_fetched_again(
    version: ModelVersion, settings: Settings, storage: Storage
) -> None:
    row = make(version, F32, settings, storage)
    [file] = [name for name in row.files if name.startswith("head") and name.endswith(".bin")]
    copy, key = cached_file(file, settings), package_key(version.id, F32, file)
    whole = copy.read_bytes()
    copy.write_bytes(b"damaged" + whole[7:])
    open_engine(version, wanting(F32, settings), storage)
    assert copy.read_bytes() == whole
    copy.unlink()
    storage.put(settings.data_bucket, key, b"damaged" + whole[7:])
    with pytest.raises(TerminalError) as caught:
        open_engine(version, wanting(F32, settings), storage)
    assert caught.value.reason == "SHA256_MISMATCH"
    assert not copy.exists()
    make(version, F32, settings, storage)
    assert storage.get(settings.data_bucket, key) == whole


@pytest.mark.usefixtures("quick")
def test_an_engine_that_answers_otherwise_here_is_passed_over(
    version: ModelVersion,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make(version, F32, settings, storage)
    change(settings, milliseconds=1.0, reference_milliseconds=2.0)
    assert open_engine(version, wanting("auto", settings), storage).name == F32
    asked = []

    def lower(predictor: Predictor, images: Sequence[Any]) -> list[Detections]:
        asked.append(len(images))
        return [Detections(one.boxes, one.scores * 0.7) for one in whole(predictor, images)]

    whole = Predictor.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "__call__", lower)
        assert open_engine(version, wanting("auto", settings), storage).name == "eager"
    assert sum(asked) == PICTURES
    assert "have no like" in caplog.text
    # In this process it stays so: a service does not try again with every look for a champion.
    assert engine_for(version, wanting("auto", settings)) == "eager"
    with pytest.raises(ModelError, match=f"gun-detection package {version.id}") as caught:
        open_engine(version, wanting(F32, settings), storage)
    assert caught.value.reason == "ENGINE_DIFFERS"
    # As a package of this machine's own does not.
    monkeypatch.setattr(packages, "_unfit", set())
    assert open_engine(version, wanting(F32, settings), storage).name == F32


def test_a_gpu_without_a_package_is_warned_of(
    version: ModelVersion,
    settings: Settings,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened = load_engine(version, "eager", {}, settings, storage, 0.0)
    monkeypatch.setattr(packages, "load_engine", lambda *_: opened)
    open_engine(version, wanting("auto", settings), storage)
    assert "no package" not in caplog.text, "on a CPU"
    monkeypatch.setattr(packages, "select_device", lambda _: torch.device("cuda"))
    open_engine(version, wanting("eager", settings), storage)
    assert "no package" not in caplog.text, "as it was asked for"
    open_engine(version, wanting("auto", settings), storage)
    [said] = [row for row in caplog.records if row.levelname == "WARNING"]
    assert f"gun-detection package {version.id}` on a machine with such a GPU" in said.getMessage()
    caplog.clear()
    refused = {"accepted": False, "reason": "it finds less", "pictures": 0, "toolchain": ""}
    with open_session(settings) as session:
        session.add(EnginePackage(model_id=version.id, engine="cuda", files={}, **refused))
    open_engine(version, wanting("auto", settings), storage)
    assert "no package" not in caplog.text, "one was made, and refused"
