"""The detector as a recipe trains it: what learns, how it lies in memory, at which input size."""

import torch
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.detector.architectures import ARCHITECTURES, input_size
from gun_detection.errors import TrainingError
from gun_detection.training.config import TrainingConfig


def prepare(model: FasterRCNN, config: TrainingConfig, device: torch.device) -> FasterRCNN:
    """The model on the device, with its frozen stages; raises `TrainingError` for too many."""
    architecture = ARCHITECTURES[config.detector.architecture]
    if config.frozen_stages > len(architecture.stages):
        raise TrainingError(
            f"frozen_stages is {config.frozen_stages}, and the backbone of "
            f"{config.detector.architecture} has {len(architecture.stages)} stages",
            reason="BAD_RECIPE",
        )
    for stage in architecture.stages[: config.frozen_stages]:
        for name in stage:
            getattr(model.backbone.body, name).requires_grad_(False)
    # With channels last, a large convolution takes a CPU about twice as long
    # (`benchmarks/training.py`).
    last = device.type == "cuda" or architecture.channels_last
    return model.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)


def set_input_size(model: FasterRCNN, config: TrainingConfig, scale: float) -> None:
    """Resize pictures to `scale` times the size that the detector is made for."""
    shorter, longer = input_size(config.detector)
    model.transform.min_size = (round(shorter * scale),)
    model.transform.max_size = round(longer * scale)
