"""A small detector with random weights, and its networks in OpenVINO's form."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.detector.architectures import DetectorConfig, build_detector
from gun_detection.detector.conversion import convert
from gun_detection.detector.inference import Predictor
from gun_detection.detector.openvino import Networks, OpenVinoDetector

CPU = torch.device("cpu")


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """Large squares of noise: with fine noise, every choice among boxes is a close one."""
    noise = np.random.default_rng(height).integers(0, 256, (height // 10, width // 10, 3), np.uint8)
    return noise.repeat(10, axis=0).repeat(10, axis=1)


def detector(name: str) -> FasterRCNN:
    torch.manual_seed(0)
    return build_detector(DetectorConfig(architecture=name)).eval()


def predictor(
    model: FasterRCNN, networks: Networks, precision: str = "f32", *, mirrored: bool = False
) -> Predictor:
    converted = OpenVinoDetector(deepcopy(model), networks, precision, streams=2)
    return Predictor(converted, CPU, 0.0, mirrored=mirrored)


@pytest.fixture(scope="session")
def model() -> FasterRCNN:
    return detector("resnet18_fpn")


@pytest.fixture(scope="session")
def networks(model: FasterRCNN) -> Networks:
    return convert(model)
