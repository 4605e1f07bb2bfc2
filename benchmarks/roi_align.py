"""RoIAlign on the CPU: torchvision's kernel beside ours, on the same features and boxes.

    python benchmarks/roi_align.py [--passes N]

Four pictures of 384 × 512 px, features of 128 channels at strides 4 to 32, 128 boxes a picture, as
the small detector trains on. Prints CPU seconds forward and backward, best of N alternating
passes, their ratio, and the largest difference of the results.
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from gun_detection.detector.roi_align import GatherRoIAlign

NAMES = ["0", "1", "2", "3"]
HEIGHT, WIDTH = 384, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    maps = {
        name: torch.rand(4, 128, HEIGHT >> level, WIDTH >> level)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
        for level, name in enumerate(NAMES, start=2)
    }
    boxes = []
    for _ in range(4):
        corners = torch.rand(128, 2, 2) * torch.tensor([WIDTH, HEIGHT])
        boxes.append(torch.cat([corners.amin(1), corners.amax(1)], 1))
    pools = {"torchvision": MultiScaleRoIAlign(NAMES, 7, 2), "ours": GatherRoIAlign(NAMES, 7, 2)}
    best = dict.fromkeys(pools, (9.0, 9.0))
    results: dict[str, Tensor] = {}
    for _ in range(arguments.passes):
        for name, pool in pools.items():
            forward, backward, results[name] = once(pool, maps, boxes)
            best[name] = min(best[name][0], forward), min(best[name][1], backward)
    base = sum(best["torchvision"])
    for name, (forward, backward) in best.items():
        print(
            f"{name:12s} forward {1000 * forward:4.0f} ms, backward {1000 * backward:4.0f} ms of "
            f"CPU, ratio {base / (forward + backward):4.1f}"
        )
    difference = (results["torchvision"] - results["ours"]).abs().max()
    print(f"largest difference of the results {float(difference):.1e}, of values in 0 to 1")


def once(pool: Any, maps: dict[str, Tensor], boxes: list[Tensor]) -> tuple[float, float, Tensor]:
    start = time.process_time()
    pooled = pool(maps, boxes, [(HEIGHT, WIDTH)] * 4)
    middle = time.process_time()
    pooled.backward(torch.ones_like(pooled))
    return middle - start, time.process_time() - middle, pooled.detach()


if __name__ == "__main__":
    main()
