"""One step of the optimiser: forward and backward in parts that fit the memory."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gun_detection.datasets.torch_dataset import Batch, Target
from gun_detection.errors import TrainingError
from gun_detection.training.config import TrainingConfig

logger = logging.getLogger(__name__)


@dataclass
class Stepper:
    """Runs the optimiser over batches.

    `network` is the detector, wrapped for several processes or not; `parts` is how many parts a
    step is computed in. It grows when the GPU's memory is too small, and stays so.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    config: TrainingConfig
    device: torch.device
    names: Sequence[str]
    parts: int = 1

    def __post_init__(self) -> None:
        self._precision = select_precision(self.config.precision, self.device)

    def __call__(self, batch: Batch) -> dict[str, float]:
        """The losses of the batch and the norm of its gradient.

        Raises `TrainingError`: `LOSS_NOT_FINITE` with the sha256 of the pictures of the batch, or
        `OUT_OF_MEMORY` when a single picture is too much.
        """
        values = None
        while values is None:
            values = self._try(batch)
            if values is None:
                self._halve(len(batch[0]))
        return values

    def _try(self, batch: Batch) -> dict[str, float] | None:
        """None when there was not enough memory; the exception would hold on to its tensors."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            values = self._accumulate(batch)
        except torch.OutOfMemoryError:
            return None
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.config.clip_norm or math.inf))
        if not math.isfinite(norm):
            self._refuse("gradient", norm, batch[1])
        self.optimizer.step()
        return values | {"gradient_norm": norm}

    def _accumulate(self, batch: Batch) -> dict[str, float]:
        images, targets = batch
        size = -(-len(images) // max(self.parts, self._least_parts(len(images))))
        totals: dict[str, Tensor] = {}
        for start in range(0, len(images), size):
            part = images[start : start + size], targets[start : start + size]
            weight = len(part[0]) / len(images)
            last = start + size >= len(images)
            losses = self._backward(part, weight, last)
            for name, value in losses.items():
                totals[name] = totals.get(name, torch.zeros(())) + value * weight
        return {name: float(value) for name, value in totals.items()}

    def _backward(self, batch: Batch, weight: float, last: bool) -> dict[str, Tensor]:
        images, targets = on_device(batch, self.device)
        if isinstance(self.network, DistributedDataParallel):
            # Gradients travel once a step, with its last part.
            self.network.require_backward_grad_sync = last
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self._precision == "bfloat16"
        ):
            losses: dict[str, Tensor] = self.network(images, targets)
            loss = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(loss):
            self._refuse("loss", float(loss.detach()), batch[1])
        (loss * weight).backward()  # type: ignore[no-untyped-call]
        values = {name: value.detach().float().cpu() for name, value in losses.items()}
        return values | {"loss": loss.detach().float().cpu()}

    def _least_parts(self, count: int) -> int:
        return -(-count // self.config.micro_batch) if self.config.micro_batch else 1

    def _halve(self, count: int) -> None:
        if self.parts >= count or isinstance(self.network, DistributedDataParallel):
            raise TrainingError(
                f"the GPU's memory is too small for {-(-count // self.parts)} pictures at a time: "
                "set micro_batch to fewer, or detector.min_size to smaller ones",
                reason="OUT_OF_MEMORY",
            )
        self.parts *= 2
        torch.cuda.empty_cache()
        logger.warning("out of GPU memory: steps are computed in %d parts from here on", self.parts)

    def _refuse(self, what: str, value: float, targets: list[Target]) -> None:
        names = [self.names[int(target["image_id"])] for target in targets]
        raise TrainingError(
            f"the {what} is {value} at a batch with the training images {', '.join(names)}: "
            "lower the learning rate or look at these pictures and their boxes",
            reason="LOSS_NOT_FINITE",
        )


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch as the detector takes it: images as float32 in [0, 1], boxes and labels."""
    images = [image.to(device).float().div_(255.0) for image in batch[0]]
    targets = [{name: t[name].to(device) for name in ("boxes", "labels")} for t in batch[1]]
    return images, targets


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser over what learns; `scale` of a group is its factor on the learning rate."""
    body: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (body if name.startswith("backbone.body.") else rest).append(parameter)
    groups = [
        {"params": params, "scale": scale}
        for params, scale in ((body, config.backbone_rate), (rest, 1.0))
        if params
    ]
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, rate, momentum=config.momentum, weight_decay=decay)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, rate, weight_decay=decay)
    return torch.optim.AdamW(groups, rate, weight_decay=decay)


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The rate at a step (from 0) of `steps`, before any group's own factor."""
    return config.learning_rate * _factor(config, step, steps)


def _factor(config: TrainingConfig, step: int, steps: int) -> float:
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "step":
        return 1.0 if done < 0.7 else 0.1 if done < 0.9 else 0.01
    return 1.0


def select_precision(wanted: str, device: torch.device) -> str:
    """`float32` or `bfloat16`; `auto` takes bfloat16 only where the hardware computes in it."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    known = torch.cpu.get_capabilities()
    return "bfloat16" if known.get("avx512_bf16") or known.get("amx_bf16") else "float32"
