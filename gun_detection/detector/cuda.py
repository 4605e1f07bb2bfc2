"""A detector tuned for GPUs: half the bits, and all pictures of a batch in one step each.

torchvision's own goes through the pictures of a batch one by one between its networks, in hundreds
of operations that are too small for a GPU, and waits for it dozens of times. A GPU that was waited
for has nothing to do until it is asked again, so here it is once in a batch, at the end.
"""

import logging
import threading
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.detector.architectures import fold_batch_norm
from gun_detection.detector.atlas import align
from gun_detection.detector.finite import not_finite
from gun_detection.detector.fusion import fuse
from gun_detection.detector.proposals import Proposer, decode
from gun_detection.detector.transfers import to_device, to_host

logger = logging.getLogger(__name__)

# A detection with a smaller side is none to torchvision, pixels.
_LEAST_SIDE = 1e-2
# How often boxes suppress each other; a batch that takes more is looked at again, with so many
# times as many rounds. To ask after each whether it was the last would be to wait for the GPU.
_ROUNDS = 24
_MORE = 4


class _Networks(NamedTuple):
    """What computes in one precision."""

    backbone: nn.Module
    rpn_head: nn.Module
    box_head: nn.Module
    precision: torch.dtype


class CudaDetector(nn.Module):
    """Takes the place of a `FasterRCNN` for two classes, which it takes over, and finds the same.

    Its networks compute in `precision`, with channels last in memory; the predictor of scores and
    boxes, and all that is done with coordinates, in float32. A picture for which they compute what
    is no number, as the largest of float16 is 65,504, is looked at again in float32: the weights
    for that stay on the CPU until then.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: FasterRCNN, precision: torch.dtype = torch.float16) -> None:
        super().__init__()
        fold_batch_norm(model)
        self._precision = precision
        self.transform, self.rpn, self.roi_heads = model.transform, model.rpn, model.roi_heads
        self.backbone = model.backbone
        networks = (self.backbone, self.rpn.head, self.roi_heads.box_head)
        for network in networks:
            fuse(network)
            network.to(memory_format=torch.channels_last)
        # In a tuple, where the module does not find them when it goes to another device.
        self._exact = _Networks(*deepcopy(networks), torch.float32)
        self._used: _Networks | None = None
        self._lock = threading.Lock()
        for network in networks:
            network.to(precision)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.transform, f"image_{name}"))
            self.register_buffer(name, values.view(1, 3, 1, 1))
        self._proposer = Proposer(self.rpn)

    def forward(self, pictures: list[Tensor]) -> list[dict[str, Tensor]]:
        """Boxes and scores of each picture, on the CPU; given as float32 (3, H, W) in [0, 1].

        Raises `ImageError` (`NOT_FINITE`) for pictures of which float32 computes no numbers either.
        """
        return self.each([pictures])[0]

    def each(self, batches: list[list[Tensor]]) -> list[list[dict[str, Tensor]]]:
        """`forward` for each batch; all are asked for before one is waited for."""
        asked = [self.find(pictures, _ROUNDS) for pictures in batches]
        return [
            self._read(pictures, row, self._networks)
            for pictures, row in zip(batches, asked, strict=True)
        ]

    def _read(
        self, pictures: list[Tensor], row: Tensor, networks: _Networks
    ) -> list[dict[str, Tensor]]:
        """The detections that `find` gave; what it asks for is done."""
        rounds = _ROUNDS
        while not (values := to_host(row))[-1]:
            rounds *= _MORE
            row = self.find(pictures, rounds, networks)
        end = len(values) - 1 - len(pictures)
        rows, largest = values[:end].view(len(pictures), -1, 5), values[end:-1]
        # The best come first, and what is none has the score 0.
        counts = (rows[:, :, 4] > 0).sum(1).tolist()
        results = [
            {"boxes": some[:count, :4], "scores": some[:count, 4]}
            for some, count in zip(rows, counts, strict=True)
        ]
        broken = [at for at, finite in enumerate(largest.isfinite().tolist()) if not finite]
        if broken:
            again = self._look_again([pictures[at] for at in broken], networks)
            for at, result in zip(broken, again, strict=True):
                results[at] = result
        return results

    def _look_again(self, pictures: list[Tensor], before: _Networks) -> list[dict[str, Tensor]]:
        """The detections of pictures for which `before` compute what is no number."""
        if before.precision == torch.float32:
            raise not_finite(pictures)
        exact = self._exact_networks()
        return self._read(pictures, self.find(pictures, _ROUNDS, exact), exact)

    @property
    def _networks(self) -> _Networks:
        return _Networks(self.backbone, self.rpn.head, self.roi_heads.box_head, self._precision)

    def _exact_networks(self) -> _Networks:
        """Those that compute in float32, where the pictures are."""
        with self._lock:
            if self._used is None:
                logger.warning(
                    "%s is too small for what the model computes for a picture: it is looked at "
                    "again in float32, which takes several times as long, as are others like it",
                    self._precision,
                )
                for network in self._exact[:3]:
                    network.to(self.mean.device)
                if self.mean.is_cuda:
                    # Other threads use them in no order with what this one asks for.
                    torch.cuda.current_stream(self.mean.device).synchronize()
                self._used = self._exact
            return self._used

    def find(
        self, pictures: list[Tensor], rounds: int, networks: _Networks | None = None
    ) -> Tensor:
        """What is found, as numbers in a row: left, top, right, bottom and score of each detection,
        so many of each picture; then of each picture the largest number, whatever its sign, that
        the networks say of boxes, which is none where one of them is none; in the end 1 where
        `rounds` of suppression were enough, or else 0.

        Never waits for the GPU, which so has its next batch at hand while it computes this one.
        """
        resized = [self.transform.resize(picture)[0] for picture in pictures]
        # Widths and heights, then what brings boxes back to the pictures as they were given.
        values = [
            [width, height] * 2 + [whole.shape[2] / width, whole.shape[1] / height] * 2
            for whole, (_, height, width) in zip(pictures, (r.shape for r in resized), strict=True)
        ]
        table = to_device(values, resized[0].device)
        limits, scales = table[:, :4], table[:, 4:]
        batch = self._gather(resized)
        networks = networks or self._networks
        precision = networks.precision
        features = networks.backbone(batch.to(precision, memory_format=torch.channels_last))
        levels, shifts = networks.rpn_head(list(features.values()))
        regions, likely, settled = self._propose(batch, levels, shifts, limits, rounds)
        pool = self.roi_heads.box_roi_pool
        maps = [features[name] for name in pool.featmap_names if name in features]
        pooled = align(pool, maps, regions, batch.shape[3]).to(precision)
        logits, deltas = self.roi_heads.box_predictor(networks.box_head(pooled))
        boxes, scores, settled_too = self._choose(
            logits, deltas, regions, likely >= 0, limits, rounds
        )
        found = torch.cat([boxes * scales[:, None], scores[:, :, None]], 2)
        # As they lie in memory, which copies nothing.
        said = [level.permute(0, 2, 3, 1).flatten(1) for level in (*levels, *shifts)]
        heads = torch.cat([logits, deltas], 1).view(len(pictures), -1)
        largest = torch.maximum(_largest(torch.cat(said, 1)), _largest(heads))
        enough = (settled & settled_too).to(found.dtype)[None]
        return torch.cat([found.flatten(), largest, enough])

    def _gather(self, resized: list[Tensor]) -> Tensor:
        """Pictures of several sizes as one tensor, normalised and padded with zeros."""
        stride = self.transform.size_divisible
        height, width = (
            -(-max(picture.shape[axis] for picture in resized) // stride) * stride
            for axis in (1, 2)
        )
        batch = self.mean.expand(len(resized), 3, height, width).clone()
        for slot, picture in zip(batch, resized, strict=True):
            slot[:, : picture.shape[1], : picture.shape[2]] = picture
        return batch.sub_(self.mean).div_(self.std)

    def _propose(
        self,
        batch: Tensor,
        objectness: list[Tensor],
        deltas: list[Tensor],
        limits: Tensor,
        rounds: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Regions (N, R, 4) of each picture and their likelihood (N, R), the likeliest first, as
        `RegionProposalNetwork.forward` chooses them; where there are fewer, the rest has -1. And
        whether `rounds` of suppression were enough.
        """
        boxes, scores = self._proposer.likely(batch, objectness, deltas, limits)
        # Of each picture and level, boxes suppress each other only.
        kept, settled = _suppress(
            boxes.flatten(0, 1),
            scores.flatten(0, 1) >= 0,
            self.rpn.nms_thresh,
            self._precision,
            rounds,
        )
        scores = scores.masked_fill(~kept.view_as(scores), -1.0).flatten(1)
        count = min(self.rpn.post_nms_top_n(), scores.shape[1])
        likely, chosen = scores.topk(count, dim=1)
        return _take(boxes.flatten(1, 2), chosen), likely, settled

    def _choose(
        self,
        logits: Tensor,
        deltas: Tensor,
        regions: Tensor,
        real: Tensor,
        limits: Tensor,
        rounds: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Detections (N, D, 4) of each picture and their scores (N, D), the best first, as
        `RoIHeads.postprocess_detections` chooses them; where there are fewer, the rest has 0. And
        whether `rounds` of suppression were enough.
        """
        decoded = decode(self.roi_heads.box_coder, deltas[:, 4:8].view_as(regions), regions)
        boxes = torch.minimum(decoded.clamp(min=0), limits[:, None])
        scores = logits.softmax(1)[:, 1].view_as(real)
        sides = boxes[..., 2:] - boxes[..., :2]
        good = real & (scores > self.roi_heads.score_thresh) & (sides >= _LEAST_SIDE).all(2)
        scores, order = scores.masked_fill(~good, 0.0).sort(dim=1, descending=True)
        boxes = _take(boxes, order)
        kept, settled = _suppress(
            boxes, scores > 0, self.roi_heads.nms_thresh, self._precision, rounds
        )
        most = min(self.roi_heads.detections_per_img, scores.shape[1])
        scores, chosen = scores.masked_fill(~kept, 0.0).topk(most, dim=1)
        return _take(boxes, chosen), scores, settled


def _largest(values: Tensor) -> Tensor:
    """Of each row (N, K) the largest, whatever its sign, which is none where one of them is none.

    In fewer steps than `isfinite` takes.
    """
    return values.abs().amax(1).float()


def _take(boxes: Tensor, chosen: Tensor) -> Tensor:
    """Of boxes (N, K, 4), those with the indices (N, M)."""
    return boxes.gather(1, chosen[:, :, None].expand(-1, -1, 4))


def _suppress(
    boxes: Tensor, real: Tensor, threshold: float, precision: torch.dtype, rounds: int
) -> tuple[Tensor, Tensor]:
    """Which of the `real` boxes (M, K, 4) of each row, the best first, are not suppressed (M, K),
    and whether this is certain.

    What `torchvision.ops.nms` does one box after the other: a box goes if a better one that stays
    overlaps it. Repeated for all boxes at once until nothing changes it comes to the same, after as
    many rounds as the longest chain of boxes that depend on each other: Zheng et al., "Enhancing
    Geometric Factors in Model Learning and Inference for Object Detection and Instance
    Segmentation", 2022, section 4 (Cluster-NMS).
    """
    left, top, right, bottom = boxes.unbind(2)
    width = torch.minimum(right[:, :, None], right[:, None])
    width = width.sub_(torch.maximum(left[:, :, None], left[:, None])).clamp_(min=0)
    height = torch.minimum(bottom[:, :, None], bottom[:, None])
    height = height.sub_(torch.maximum(top[:, :, None], top[:, None])).clamp_(min=0)
    common = width.mul_(height)
    area = (right - left) * (bottom - top)
    union = torch.add(area[:, :, None], area[:, None], out=height).sub_(common)
    # A sum of zeros and ones is exact in 16 bits as long as it matters: whether it is one or more.
    over = (common > union.mul_(threshold)).triu_(1).to(precision)
    # As zeros and ones (M, 1, K): each step less is an operation less for the processor to ask for.
    ones = real.to(precision)[:, None]
    kept = before = ones
    for _ in range(rounds):
        before, kept = kept, torch.baddbmm(ones, kept, over, alpha=-1).relu_()
    return kept[:, 0] > 0, (kept == before).all()
