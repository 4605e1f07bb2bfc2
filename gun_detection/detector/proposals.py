"""The boxes that an RPN proposes: torchvision's steps, with all pictures of a batch at once.

torchvision moves all anchors before it chooses the likely ones, and makes the anchors anew for each
batch.
"""

import threading

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

# Anchors of so many shapes of batches are kept: a few MiB each.
_SHAPES = 32


class Proposer:
    """The steps of an RPN between its head and the suppression of boxes; threads may share it."""

    def __init__(self, rpn: RegionProposalNetwork) -> None:
        self._rpn = rpn
        self._threads = threading.local()

    def likely(
        self,
        batch: Tensor,
        features: list[Tensor],
        objectness: list[Tensor],
        deltas: list[Tensor],
        limits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Of each picture and level the likeliest boxes (N, L, K, 4), clipped to the picture, and
        their scores (N, L, K), the best first; -1 where there is no box, or one without area.

        `batch` are the pictures (N, 3, H, W) as the network reads them, `limits` (N, 4) their
        widths and heights without padding as (width, height, width, height), pixels; `objectness`
        and `deltas` are what the head gives for `features`.
        """
        boxes, scores = [], []
        logits = [_rows(level, 1).squeeze(2).float() for level in objectness]
        anchors = self._anchors_of(batch, features, [level.shape[1] for level in logits])
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

    def _anchors_of(
        self, batch: Tensor, features: list[Tensor], counts: list[int]
    ) -> tuple[Tensor, ...]:
        """The anchors of each level that proposes, the same for all pictures.

        Each thread keeps its own, as its work on a GPU is in no order with that of others.
        """
        if not hasattr(self._threads, "anchors"):
            self._threads.anchors = {}
        kept: dict[torch.Size, tuple[Tensor, ...]] = self._threads.anchors
        shape = batch.shape[2:]
        if shape not in kept:
            if len(kept) >= _SHAPES:
                kept.clear()
            whole = ImageList(batch[:1], [(shape[0], shape[1])])
            # The generator reads their shapes alone, and computes where they are.
            maps = [torch.zeros(1).expand(level.shape[-2:]) for level in features]
            [together] = self._rpn.anchor_generator(whole, maps)
            kept[shape] = together.to(batch.device).split(counts)
        return kept[shape]


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
