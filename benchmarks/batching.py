"""How full a GPU's batches are: kinds of shape taking turns against the one that most wait for.

    python benchmarks/batching.py --pictures DIR [--seconds N]

DIR holds pictures, whose shapes are those that arrive. As in scoring, each of many threads brings a
picture after the other and waits for what is found in it; bringing it and looking at a batch are
simulated, the latter at the cost that `--fixed` and `--each` say, milliseconds. Prints the pictures
in a batch, pictures/s and the longest that a batch's first picture waited, for both ways, and how
many times as many pictures/s the second gives.
"""

import argparse
import random
import time
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from gun_detection.batching import Batcher
from gun_detection.detector.engines import GPU_BATCH, GPU_STREAMS, shape_class

BRINGING = 0.012

Shape = tuple[int, ...]


class TakingTurns(Batcher[tuple[Shape, float], None]):
    """One kind after the other, whatever waits."""

    def _next(self) -> Hashable:
        return next(iter(self._waiting))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--fixed", type=float, default=25.0)
    parser.add_argument("--each", type=float, default=1.6)
    arguments = parser.parse_args()
    shapes = [shape_of(file) for file in sorted(arguments.pictures.rglob("*.jpeg"))]
    print(f"{len(shapes)} pictures of {len(set(map(shape_class, shapes)))} kinds of shape")
    rates = [
        measure(name, kind, queued, shapes, arguments)
        for name, kind, queued in (
            ("taking turns, two batches at hand", TakingTurns, 2),
            ("taking turns, four batches at hand", TakingTurns, 4),
            ("what most wait for, two batches", Batcher, 2),
            ("what most wait for, four batches", Batcher, 4),
        )
    ]
    print(f"ratio of the last to the first {rates[-1] / rates[0]:.2f}")


def shape_of(file: Path) -> Shape:
    with Image.open(file) as image:
        return image.height, image.width


def measure(
    name: str,
    batcher: type[Batcher[tuple[Shape, float], None]],
    queued: int,
    shapes: list[Shape],
    arguments: argparse.Namespace,
) -> float:
    """Pictures/s with so many batches at hand for each stream."""
    sizes: list[int] = []
    waited: list[float] = []

    def look(asked: list[tuple[Shape, float]]) -> list[None]:
        waited.append(time.monotonic() - asked[0][1])
        sizes.append(len(asked))
        # The streams share the processor, and the GPU.
        time.sleep(GPU_STREAMS * (arguments.fixed + arguments.each * len(asked)) / 1000)
        return [None] * len(asked)

    until = time.monotonic() + arguments.seconds

    batches = batcher(look, GPU_BATCH, GPU_STREAMS, lambda one: shape_class(one[0]))

    def bring(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < until:
            time.sleep(chance.expovariate(1 / BRINGING))
            batches((chance.choice(shapes), time.monotonic()))

    count = queued * GPU_STREAMS * GPU_BATCH
    with batches, ThreadPoolExecutor(count) as pool:
        list(pool.map(bring, range(count)))
    rate = sum(sizes) / arguments.seconds
    print(
        f"{name:36s} {sum(sizes) / len(sizes):5.1f} in a batch of {GPU_BATCH}, {rate:6.1f}/s, "
        f"longest wait {max(waited):.2f} s",
        flush=True,
    )
    return rate


if __name__ == "__main__":
    main()
