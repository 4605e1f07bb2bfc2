"""Which pictures make which batch: a function of seed and epoch, so that it can be resumed."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gun_detection.datasets.manifest import Entry, source_of
from gun_detection.training.config import TrainingConfig
from gun_detection.training.seeds import mix

# The epoch, the index, and how many times that was drawn before in this epoch: the sample's
# augmentation depends on all three.
Draw = tuple[int, int, int]


@dataclass(frozen=True)
class Order:
    """Batches over pictures, given by the width-to-height ratio and the repeats of each.

    `repeats` is how often a picture is drawn in an epoch on average; at least once for 1.0.
    """

    aspects: Sequence[float]
    repeats: Sequence[float]
    batch_size: int
    seed: int
    by_aspect: bool

    @property
    def steps(self) -> int:
        """Steps of an epoch; the same for each, whatever is drawn."""
        return max(1, round(sum(self.repeats) / self.batch_size))

    def batches(self, epoch: int) -> list[list[Draw]]:
        """The batches of an epoch (from 0), `steps` of them, none empty."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        drawn = self._draw(generator)
        if self.by_aspect:
            drawn = self._grouped(drawn)
        seen = Counter[int]()
        draws: list[Draw] = []
        for index in drawn:
            draws.append((epoch, index, seen[index]))
            seen[index] += 1
        size, more = divmod(len(draws), self.steps)
        batches, start = [], 0
        for number in range(self.steps):
            stop = start + size + (number < more)
            batches.append(draws[start:stop])
            start = stop
        if self.by_aspect:
            mixed = torch.randperm(self.steps, generator=generator).tolist()
            batches = [batches[number] for number in mixed]
        return batches

    def _draw(self, generator: torch.Generator) -> list[int]:
        chance = torch.rand(len(self.repeats), generator=generator).tolist()
        drawn = [
            index
            for index, repeat in enumerate(self.repeats)
            for _ in range(int(repeat) + (chance[index] < repeat % 1))
        ]
        # Chance may leave fewer draws than there are steps.
        drawn += list(range(len(self.repeats)))[: max(0, self.steps - len(drawn))]
        return [drawn[i] for i in torch.randperm(len(drawn), generator=generator).tolist()]

    def _grouped(self, drawn: list[int]) -> list[int]:
        """Wide after square after tall: neighbours need little padding, and stay shuffled."""
        return sorted(drawn, key=lambda index: round(math.log2(self.aspects[index])))


def plan_order(entries: Sequence[Entry], config: TrainingConfig) -> Order:
    """The order of a training: sources balanced, gun-free pictures repeated to their share."""
    sources = Counter(source_of(entry) for entry in entries)
    weights = [sources[source_of(entry)] ** -config.source_balance for entry in entries]
    scale = len(entries) / sum(weights)
    # Gun-free pictures are in every epoch, however large their source is.
    repeats = [
        weight * scale if entry.boxes else max(1.0, weight * scale)
        for weight, entry in zip(weights, entries, strict=True)
    ]
    negatives = sum(r for r, entry in zip(repeats, entries, strict=True) if not entry.boxes)
    positives = sum(repeats) - negatives
    share = config.negative_share
    wanted = share / (1 - share) * positives
    if 0 < negatives < wanted:
        more = wanted / negatives
        repeats = [
            r if entry.boxes else r * more for r, entry in zip(repeats, entries, strict=True)
        ]
    return Order(
        aspects=[entry.width / entry.height for entry in entries],
        repeats=repeats,
        batch_size=config.batch_size,
        seed=config.seed,
        by_aspect=config.group_by_aspect,
    )
