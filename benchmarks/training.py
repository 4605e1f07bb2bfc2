"""Pictures per second of training: ours beside the well-known tutorial loop, in one run.

    python benchmarks/training.py [--steps N] [--compile]

The tutorial loop opens each picture with PIL, makes it a float tensor, and trains all layers of a
ResNet-50-FPN at 800 px in float32 with Adam, three pictures at a time. Ours is measured on the same
network and size, and on the small one that a CPU trains. CPU seconds a picture are what can be
compared between loaded machines; then the operators that the time of ours goes into, and what
channels last makes of a large convolution. `--compile` also tells what `torch.compile` makes of the
small one's backbone (minutes of compilation).
"""

import argparse
import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.transforms import functional

from gun_detection.datasets.synthetic import draw_pictures
from gun_detection.datasets.torch_dataset import Target, collate
from gun_detection.detector.architectures import DetectorConfig, build_detector, input_size
from gun_detection.images import DecodeLimits, decode
from gun_detection.settings import load_settings
from gun_detection.training.augment import AugmentedDataset
from gun_detection.training.config import PRESETS, TrainingConfig
from gun_detection.training.network import prepare
from gun_detection.training.step import Stepper, build_optimizer

PICTURES = list(draw_pictures(24))


class Files:
    """Encoded pictures, decoded when they are asked for."""

    def __len__(self) -> int:
        return len(PICTURES)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        picture = PICTURES[index]
        pixels = decode(picture.data, DecodeLimits.from_settings(load_settings())).pixels
        boxes = torch.from_numpy(picture.boxes).float()
        labels = torch.ones(len(boxes), dtype=torch.int64)
        target = {"boxes": boxes, "labels": labels, "image_id": torch.tensor([index])}
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), target


def tutorial(device: torch.device) -> Iterator[int]:
    """One step at a time; yields how many pictures it was."""
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2).to(device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    model.train()
    while True:
        for start in range(0, len(PICTURES) - 2, 3):
            images, targets = [], []
            for picture in PICTURES[start : start + 3]:
                opened = Image.open(io.BytesIO(picture.data)).convert("RGB")
                images.append(functional.to_tensor(opened).to(device))
                boxes = torch.from_numpy(picture.boxes).float().to(device)
                labels = torch.ones(len(boxes), dtype=torch.int64, device=device)
                targets.append({"boxes": boxes, "labels": labels})
            loss = sum(model(images, targets).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield 3


def ours(config: TrainingConfig, device: torch.device) -> Iterator[int]:
    """The same of our loop."""
    torch.manual_seed(0)
    model = prepare(build_detector(config.detector), config, device).train()
    names = [picture.name for picture in PICTURES]
    stepper = Stepper(model, build_optimizer(model, config), config, device, names)
    data = AugmentedDataset(Files(), config.augmentation, 0, input_size(config.detector))
    size, epoch = config.batch_size, 0
    while True:
        batches = [
            [(epoch, index, 0) for index in range(start, start + size)]
            for start in range(0, len(PICTURES) - size + 1, size)
        ]
        for batch in DataLoader(data, batch_sampler=batches, collate_fn=collate):
            stepper(batch)
            yield size
        epoch += 1


def measure(steps: Iterator[int], count: int, device: torch.device) -> tuple[float, float]:
    """(pictures per second, CPU seconds a picture) after a step to warm up."""
    next(steps)
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    pictures = sum(next(steps) for _ in range(count))
    wait(device)
    return pictures / (time.perf_counter() - wall), (time.process_time() - cpu) / pictures


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    count = arguments.steps
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    same = PRESETS["gpu"].model_copy(
        update={
            "batch_size": 3,
            "detector": DetectorConfig(architecture="resnet50_fpn", norm="folded"),
        }
    )
    small = PRESETS["cpu"]
    rows: dict[str, Callable[[], Iterator[int]]] = {
        "tutorial loop, ResNet-50-FPN, 800 px": lambda: tutorial(device),
        "ours, the same network and size": lambda: ours(same, device),
        "ours, MobileNetV2-FPN, 384 px": lambda: ours(small, device),
    }
    print(f"{torch.get_num_threads()} threads, {device}")
    base = 0.0
    for name, make in rows.items():
        rate, cost = measure(make(), count, device)
        base = base or cost
        ratio = f"ratio {base / cost:5.1f}"
        print(f"{name:38s} {rate:7.2f} pictures/s  {cost:6.2f} CPU s a picture  {ratio}")
    steps = ours(small, device)
    next(steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        next(steps)
    print("\nWhere the time of the last one goes (self CPU time):")
    events = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    for event in events[:8]:
        print(f"  {event.self_cpu_time_total / total:5.1%}  {event.key}")
    memory_formats(device)
    if arguments.compile:
        compiled(small.detector, device)


def memory_formats(device: torch.device) -> None:
    """A convolution of ResNet-50's FPN, forward and backward, in both orders of memory."""
    costs = []
    for order in (torch.contiguous_format, torch.channels_last):
        layer = torch.nn.Conv2d(256, 256, 3, padding=1).to(device, memory_format=order)
        features = torch.rand(1, 256, 200, 267, device=device).to(memory_format=order)
        rate, _ = measure(passes(layer, features.requires_grad_()), 2, device)
        costs.append(1 / rate)
    print(
        f"\na 3×3 convolution at stride 4, forward and backward: {costs[0]:.2f} s contiguous, "
        f"{costs[1]:.2f} s with channels last, ratio {costs[1] / costs[0]:.1f}"
    )


def passes(layer: torch.nn.Module, features: Tensor) -> Iterator[int]:
    """Forward and backward of one layer, again and again."""
    while True:
        result = layer(features)
        result.backward(torch.ones_like(result))
        yield 1


def compiled(config: DetectorConfig, device: torch.device) -> None:
    """Forward and backward of the backbone, eager and compiled for one shape."""
    backbone = build_detector(config).backbone.to(device, memory_format=torch.channels_last)
    images = torch.rand(4, 3, 384, 512, device=device).to(memory_format=torch.channels_last)

    def steps(network: Any) -> Iterator[int]:
        while True:
            torch.stack([level.mean() for level in network(images).values()]).sum().backward()
            yield len(images)

    eager = measure(steps(backbone), 4, device)
    after = measure(steps(torch.compile(backbone, dynamic=False)), 4, device)
    ratio = after[0] / eager[0]
    print(f"\ntorch.compile of the backbone: {ratio:.2f} times the pictures per second")


if __name__ == "__main__":
    main()
