from collections.abc import Callable

import pytest
import torch
from sqlalchemy.orm import Session

from gun_detection.database.models import ModelVersion
from gun_detection.detector.architectures import DetectorConfig, build_detector
from gun_detection.release.registry import NewModel, publish
from gun_detection.settings import Settings
from gun_detection.storage import Storage

Publish = Callable[[int], ModelVersion]


@pytest.fixture
def publish_model(settings: Settings, storage: Storage, session: Session) -> Publish:
    """Publishes a small detector with random weights from a seed."""

    def make(seed: int) -> ModelVersion:
        detector = DetectorConfig(architecture="resnet18_fpn")
        torch.manual_seed(seed)
        new = NewModel(
            model=build_detector(detector),
            detector=detector,
            config={"detector": detector.model_dump(mode="json")},
            config_hash="c" * 64,
            dataset_id=None,
            parent_id=None,
            threshold=0.5,
            training={},
        )
        return publish(new, settings, storage, session)

    return make
