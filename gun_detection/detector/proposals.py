"""The boxes that an RPN proposes: torchvision's steps, with all pictures of a batch at once.

torchvision moves all anchors before it chooses the likely ones, and makes the anchors anew for each
batch.
"""

import threading

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.rpn import RegionProposalNetwork

from gun_detection.detector.transfers import to_device

# Anchors of so many shapes of batches are kept: a few MiB each.
_SHAPES = 32


class Proposer:
    """The steps of an RPN between its head and the suppression of boxes; threads may share it."""

    def __init__(self, rpn: RegionProposalNetwork) -> None:
        self._rpn = rpn
        # The anchors of a pixel of each level that proposes.
        self._cells = [cells.tolist() for cells in rpn.anchor_generator.cell_anchors]
        self._threads = threading.local()

    def likely(
        self,
        batch: Tensor,
        objectness: list[Tensor],
        deltas: list[Tensor],
        limits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Of each picture and level the likeliest boxes (N, L, K, 4), clipped to the picture, and
        their scores (N, L, K), the best first; -1 where there is no box, or one without area.

        `batch` are the pictures (N, 3, H, W) as the network reads them, `limits` (N, 4) their
        widths and heights without padding as (width, height, width, height), pixels; `objectness`
        and `deltas` are what the head gives.
        """
        boxes, scores = [], []
        logits = [_rows(level, 1).squeeze(2).float() for level in objectness]
        anchors = self._anchors_of(batch, objectness)
        most = min(self._rpn.pre_nms_top_n(), max(level.shape[1] for level in logits))
        for number, values in enumerate(logits):
            best, chosen = values.topk(min(most, values.shape[1]), dim=1)
            codes = _rows(deltas[number], 4).gather(1, chosen[:, :, None].expand(-1, -1, 4))
            decoded = decode(self._rpn.box_coder, codes.float(), anchors[number][chosen])
            # All levels of the same length.
            missing = most - best.shape[1]
            boxes.append(functional.pad(decoded, (0, 0, 0, missing)))
            scores.append(functional.pad(best.sigmoid(), (0, missing), value=-1.0))
        clipped = torch.minimum(torch.stack(boxes, 1).clamp(min=0), limits[:, None, None])
        likelihood = torch.stack(scores, 1)
        sides = clipped[..., 2:] - clipped[..., :2]
        solid = (sides >= self._rpn.min_size).all(3) & (likelihood >= self._rpn.score_thresh)
        return clipped, likelihood.masked_fill(~solid, -1.0)

    def _anchors_of(self, batch: Tensor, maps: list[Tensor]) -> list[Tensor]:
        """The anchors of each level that proposes, of which `maps` are, the same for all pictures.

        Each thread keeps its own, as its work on a GPU is in no order with that of others.
        """
        if not hasattr(self._threads, "anchors"):
            self._threads.cells = [to_device(cells, batch.device) for cells in self._cells]
            self._threads.anchors = {}
        kept: dict[torch.Size, list[Tensor]] = self._threads.anchors
        shape = batch.shape[2:]
        anchors = kept.pop(shape, None)
        if anchors is None:
            if len(kept) >= _SHAPES:
                del kept[next(iter(kept))]
            anchors = [
                _shifted(cells, shape, level.shape[2:])
                for cells, level in zip(self._threads.cells, maps, strict=True)
            ]
        # The last one is the one that was asked for last.
        kept[shape] = anchors
        return anchors


def _shifted(cells: Tensor, shape: torch.Size, size: torch.Size) -> Tensor:
    """The anchors (H · W · A, 4) of a map of this size, where those of a pixel are `cells` (A, 4):
    `AnchorGenerator.grid_anchors`.

    Made where they are needed: to bring them to a GPU would be to wait for it.
    """
    down, right = (
        torch.arange(count, dtype=cells.dtype, device=cells.device) * (whole // count)
        for whole, count in zip(shape, size, strict=True)
    )
    anchors = cells.new_empty((*size, *cells.shape))
    anchors[..., 0::2] = right[:, None, None] + cells[:, 0::2]
    anchors[..., 1::2] = down[:, None, None, None] + cells[:, 1::2]
    return anchors.flatten(0, 2)


def decode(coder: BoxCoder, codes: Tensor, boxes: Tensor) -> Tensor:
    """Boxes (..., 4) moved by what a network says of each (..., 4): `BoxCoder.decode_single`.

    torchvision's makes a tensor of a constant each time, for which a GPU is waited for. As with all
    weights there, both axes have the same ones. Girshick et al., "Rich Feature Hierarchies for
    Accurate Object Detection and Semantic Segmentation", 2014, appendix C.
    """
    place, _, growth, _ = coder.weights
    sides = boxes[..., 2:] - boxes[..., :2]
    centres = boxes[..., :2] + 0.5 * sides
    centres = codes[..., :2] / place * sides + centres
    half = 0.5 * ((codes[..., 2:] / growth).clamp(max=coder.bbox_xform_clip).exp() * sides)
    return torch.cat([centres - half, centres + half], -1)


def _rows(maps: Tensor, values: int) -> Tensor:
    """(N, anchors · values, H, W) as (N, H · W · anchors, values), the order of the anchors."""
    number, _, height, width = maps.shape
    split = maps.view(number, -1, values, height, width)
    return split.permute(0, 3, 4, 1, 2).reshape(number, -1, values)
