"""From pixels to detections: the reference engine (PyTorch eager)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.models.detection.faster_rcnn import FasterRCNN

# Average precision counts what is found with little certainty, too.
EVALUATION_FLOOR = 0.01


@dataclass(frozen=True, slots=True)
class Detections:
    """Boxes of one picture, best first.

    boxes: float32 (N, 4), xyxy in pixels of the upright picture, inside it.
    scores: float32 (N,), in [0, 1].
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.boxes.shape != (len(self.scores), 4):
            raise ValueError(f"boxes {self.boxes.shape} do not match {len(self.scores)} scores")

    def above(self, threshold: float) -> "Detections":
        keep = self.scores >= threshold
        return Detections(self.boxes[keep], self.scores[keep])


class Predictor:
    """Runs one detector; not to be shared between threads."""

    def __init__(self, model: FasterRCNN, device: torch.device, score_floor: float = 0.05) -> None:
        self.device = device
        self._model = model.to(device).eval()
        self._model.roi_heads.score_thresh = score_floor

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of each picture, given as uint8 (H, W, 3) RGB arrays of any sizes."""
        tensors = [
            torch.from_numpy(image).to(self.device).permute(2, 0, 1).float().div_(255.0)
            for image in images
        ]
        with torch.inference_mode():
            outputs = self._model(tensors)
        return [_to_detections(output) for output in outputs]


def _to_detections(output: dict[str, torch.Tensor]) -> Detections:
    boxes = output["boxes"].float().cpu().numpy()
    scores = output["scores"].float().cpu().numpy()
    # A box without area cannot be shown, reviewed or stored.
    solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & np.isfinite(scores)
    order = np.argsort(-scores[solid], kind="stable")
    return Detections(boxes[solid][order], scores[solid][order])
