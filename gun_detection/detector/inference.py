"""From pixels to detections: the reference engine (PyTorch eager)."""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.ops import box_iou, nms

from gun_detection.detector.cuda import CudaDetector
from gun_detection.detector.detections import Detections
from gun_detection.detector.finite import hear_head, listening, not_finite

# Average precision counts what is found with little certainty, too.
EVALUATION_FLOOR = 0.01
# From which overlap on a detection in the mirrored picture is the same one.
_SAME = 0.5


class Predictor:
    """Runs one detector; threads may share it."""

    def __init__(
        self,
        model: FasterRCNN,
        device: torch.device,
        score_floor: float = 0.05,
        *,
        mirrored: bool = False,
    ) -> None:
        self.device = device
        self._model = model.to(device).eval()
        # The average of what one view shows weakly may well be above the floor.
        least = min(score_floor, EVALUATION_FLOOR) if mirrored else score_floor
        self._model.roi_heads.score_thresh = least
        self._floor, self._mirrored = score_floor, mirrored
        # The others see to it themselves.
        if isinstance(model, FasterRCNN):
            hear_head(model.rpn.head)
            hear_head(model.roi_heads.box_predictor)
        self._threads = threading.local()

    @property
    def input_size(self) -> tuple[int, int]:
        """(shorter side, longest side) that pictures are resized to, pixels."""
        transform = self._model.transform
        return transform.min_size[-1], transform.max_size

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of each picture, given as uint8 (H, W, 3) RGB arrays of any sizes.

        Raises `ImageError` (`NOT_FINITE`) where the model computes what is no number for one of
        them.
        """
        with torch.inference_mode(), self._in_own_stream():
            tensors = _upload(images, self.device)
            if not self._mirrored:
                [found] = self._find([tensors])
            else:
                views, twins = self._find([tensors, [tensor.flip(-1) for tensor in tensors]])
                found = [
                    self._average(one, _mirror(twin, tensor.shape[-1]))
                    for one, twin, tensor in zip(views, twins, tensors, strict=True)
                ]
        return [_to_detections(boxes, scores) for boxes, scores in found]

    def _in_own_stream(self) -> AbstractContextManager[object]:
        """On a GPU, what one thread asks for does not wait for what another does."""
        if self.device.type != "cuda":
            return nullcontext()
        if not hasattr(self._threads, "stream"):
            self._threads.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        # The weights may still be on their way.
        self._threads.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._threads.stream)

    def _find(self, batches: list[list[Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
        """(boxes, scores) of each picture of each batch, on the CPU."""
        if isinstance(self._model, CudaDetector):
            outputs = self._model.each(batches)
            return [[(output["boxes"], output["scores"]) for output in batch] for batch in outputs]
        return [self._find_in(tensors) for tensors in batches]

    def _find_in(self, tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        with listening() as sums:
            outputs = self._model(tensors)
        # All of it in one step, as a GPU is waited for in each.
        parts = [total[None] for total in sums]
        for output in outputs:
            parts += [output["boxes"].flatten(), output["scores"]]
        numbers = torch.cat(parts).float().cpu()
        found = torch.split(numbers, [len(part) for part in parts])[len(sums) :]
        if not numbers[: len(sums)].isfinite().all():
            raise not_finite(tensors)
        return [
            (boxes.view(-1, 4), scores)
            for boxes, scores in zip(found[::2], found[1::2], strict=True)
        ]

    def _average(
        self, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        boxes, scores = _fuse(*one, *other)
        keep = nms(boxes, scores, self._model.roi_heads.nms_thresh)
        keep = keep[scores[keep] >= self._floor][: self._model.roi_heads.detections_per_img]
        return boxes[keep], scores[keep]


def _upload(images: Sequence[NDArray[np.uint8]], device: torch.device) -> list[Tensor]:
    """Pictures as float32 (3, H, W) in [0, 1] on the device."""
    if device.type == "cpu":
        return [
            torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1).div_(255.0)
            for image in images
        ]
    # All of them in one step.
    sizes = [image.size for image in images]
    # A GPU fetches from memory that is never swapped out while the processor goes on.
    together = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.concatenate([image.reshape(-1) for image in images], out=together.numpy())
    values = together.to(device, non_blocking=True).float().div_(255.0)
    return [
        part.view(image.shape).permute(2, 0, 1)
        for part, image in zip(torch.split(values, sizes), images, strict=True)
    ]


def _mirror(found: tuple[Tensor, Tensor], width: int) -> tuple[Tensor, Tensor]:
    left, top, right, bottom = found[0].unbind(1)
    return torch.stack([width - right, top, width - left, bottom], 1), found[1]


def _fuse(
    boxes: Tensor, scores: Tensor, other_boxes: Tensor, other_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Two views of a picture as one: boxes by their scores, scores by their mean.

    What is seen in one view only has half its score. Solovyev, Wang, Gabruseva, "Weighted boxes
    fusion", 2021, for two views of equal weight.
    """
    overlaps = box_iou(boxes, other_boxes).numpy()
    # In NumPy, as a step for a single box takes PyTorch ten times as long.
    mine, others = boxes.numpy().copy(), other_boxes.numpy()
    weights, other_weights = scores.numpy(), other_scores.numpy()
    halves, left = weights / 2, np.ones(len(others), np.bool_)
    # None of the rest has a twin.
    for index in np.flatnonzero(~(overlaps.max(1, initial=-1.0) < _SAME)):
        free = np.where(left, overlaps[index], np.float32(-1.0))
        twin = free.argmax()
        if free[twin] < _SAME:
            continue
        left[twin] = False
        share = weights[index] / (weights[index] + other_weights[twin])
        mine[index] = mine[index] * share + others[twin] * (1 - share)
        halves[index] += other_weights[twin] / 2
    return (
        torch.from_numpy(np.concatenate([mine, others[left]])),
        torch.from_numpy(np.concatenate([halves, other_weights[left] / 2])),
    )


def _to_detections(boxes_found: Tensor, scores_found: Tensor) -> Detections:
    boxes, scores = boxes_found.numpy(), scores_found.numpy()
    # A box without area cannot be shown, reviewed or stored.
    solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & np.isfinite(scores)
    order = np.argsort(-scores[solid], kind="stable")
    return Detections(boxes[solid][order], scores[solid][order])
