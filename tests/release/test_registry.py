import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from gun_detection.database.models import ModelVersion
from gun_detection.detector.architectures import DetectorConfig, build_detector
from gun_detection.detector.weights import serialize
from gun_detection.errors import (
    ModelError,
    TerminalError,
)
from gun_detection.release.registry import import_file, load_model, open_predictor, publish
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model

Publish = Callable[[int], ModelVersion]


@pytest.fixture
def publish_model(settings: Settings, storage: Storage, session: Session) -> Publish:
    """Publishes a small detector with random weights from a seed."""
    return lambda seed: publish(random_model(seed), settings, storage, session)


def test_publishing_again_is_the_same_version(
    publish_model: Publish, session: Session, settings: Settings, storage: Storage
) -> None:
    model = publish_model(1)
    assert publish_model(1).id == model.id != publish_model(2).id
    assert session.scalar(select(func.count()).select_from(ModelVersion)) == 2
    document = json.loads(storage.get(settings.data_bucket, f"models/{model.id}/model.json"))
    assert document["weights_sha256"] == model.weights_sha256
    assert document["threshold"] == 0.5


def test_damaged_weights_are_never_loaded(
    publish_model: Publish, settings: Settings, storage: Storage
) -> None:
    model = publish_model(1)
    load_model(model, settings, storage)
    [cached] = (settings.home / "cache" / "models").iterdir()
    cached.write_bytes(b"damaged")
    load_model(model, settings, storage)
    assert cached.stat().st_size > 1000, "a damaged copy is fetched anew"
    cached.unlink()
    storage.put(settings.data_bucket, model.weights_key, b"damaged")
    with pytest.raises(TerminalError) as caught:
        load_model(model, settings, storage)
    assert caught.value.reason == "SHA256_MISMATCH"
    assert not cached.exists()


def test_weights_from_elsewhere_become_a_version(
    session: Session, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    path = tmp_path / "fasterrcnn.pth"
    torch.manual_seed(0)
    torch.save(build_detector(DetectorConfig(architecture="resnet18_fpn")).state_dict(), path)
    model = import_file(path, "resnet18_fpn", None, settings, storage, session)
    assert (model.threshold, model.architecture) == (0.7, "resnet18_fpn")
    load_model(model, settings, storage)
    with pytest.raises(ModelError, match="name the right architecture"):
        import_file(path, "mobilenet_v2_fpn", 0.7, settings, storage, session)


def test_weights_keep_the_threshold_recorded_beside_them(
    session: Session, settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    config = DetectorConfig(architecture="resnet18_fpn")
    torch.manual_seed(0)
    data, sha256 = serialize(build_detector(config), config)
    path, record = tmp_path / "weights.safetensors", tmp_path / "model.json"
    path.write_bytes(data)
    record.write_text(json.dumps({"weights_sha256": sha256, "threshold": 0.42}))
    assert open_predictor(str(path), settings, 0.5)[2] == 0.42
    model = import_file(path, "resnet50_fpn", None, settings, storage, session)
    assert (model.threshold, model.architecture) == (0.42, "resnet18_fpn")
    other = import_file(path, "resnet50_fpn", 0.6, settings, storage, session)
    assert other.id != model.id
    assert other.threshold == 0.6
    record.write_text(json.dumps({"weights_sha256": "of others", "threshold": 0.42}))
    assert open_predictor(str(path), settings, 0.5)[2] == 0.7
    beyond = {"weights_sha256": sha256, "threshold": 7}
    for damaged in ("{", "[]", json.dumps({"weights_sha256": sha256}), json.dumps(beyond)):
        record.write_text(damaged)
        with pytest.raises(ModelError, match=r"model\.json is damaged"):
            open_predictor(str(path), settings, 0.5)
