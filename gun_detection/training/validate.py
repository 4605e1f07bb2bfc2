"""What a detector makes of the validation pictures: its loss, and what it finds."""

import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.datasets.torch_dataset import ImageDataset, collate
from gun_detection.detector.detections import Detections
from gun_detection.detector.inference import Predictor
from gun_detection.evaluation.matching import Boxes
from gun_detection.training.config import TrainingConfig
from gun_detection.training.network import set_input_size
from gun_detection.training.seeds import mix
from gun_detection.training.step import on_device


def validation_loss(
    model: FasterRCNN, data: ImageDataset, config: TrainingConfig, device: torch.device
) -> float:
    """The mean loss of a picture; leaves `model` in training mode, and changes nothing it knows."""
    # The losses exist in training mode only; batch norm must not learn from these pictures.
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    set_input_size(model, config, 1.0)
    torch.manual_seed(mix(config.seed, 3))
    total = 0.0
    with torch.inference_mode():
        for index in range(len(data)):
            images, targets = on_device(collate([data[index]]), device)
            total += float(sum(model(images, targets).values()))
    return total / len(data)


def predict_all(
    predictor: Predictor, data: ImageDataset, batch_size: int = 4
) -> tuple[list[Boxes], list[Detections]]:
    """(boxes of the labels, detections) of every picture, in order."""
    truths: list[Boxes] = []
    found: list[Detections] = []
    for start in range(0, len(data), batch_size):
        items = [data[i] for i in range(start, min(start + batch_size, len(data)))]
        truths += [target["boxes"].numpy() for _, target in items]
        found += predictor([image.permute(1, 2, 0).numpy() for image, _ in items])
    return truths, found
