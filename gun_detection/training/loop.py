"""The training loop: steps, schedule, validation after each epoch, the best weights kept."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.datasets.torch_dataset import collate
from gun_detection.detector.inference import Detections, Predictor
from gun_detection.errors import TrainingError
from gun_detection.evaluation.metrics import compute_metrics
from gun_detection.training.config import TrainingConfig

logger = logging.getLogger(__name__)

Target = dict[str, Tensor]
Batch = tuple[list[Tensor], list[Target]]


class ImageDataset(Protocol):
    """Items are (uint8 (3, H, W), target with boxes float32 (N, 4) and labels int64 (N,))."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, Target]: ...


@dataclass(frozen=True)
class Progress:
    """Where a training is: steps done of all, epoch from 1, the last loss, seconds left."""

    step: int
    steps: int
    epoch: int
    loss: float
    seconds_left: float


@dataclass
class FitResult:
    """What a training gave. `history` has one row of numbers per epoch."""

    best_state: dict[str, Tensor]
    best_epoch: int
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    model: FasterRCNN,
    config: TrainingConfig,
    train: ImageDataset,
    validation: ImageDataset,
    device: torch.device,
    log_dir: Path,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> FitResult:
    """Train `model` in place and return the weights of the epoch with the best validation AP50.

    Raises `TrainingError` when the loss is not finite, naming the images of that batch.
    """
    loader: DataLoader[Any] = DataLoader(
        train,  # type: ignore[arg-type]
        batch_size=config.batch_size,
        shuffle=True,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(config.seed),
    )
    augment = torch.Generator().manual_seed(config.seed + 1)
    steps = min(config.epochs * len(loader), config.max_steps or math.inf)
    assert isinstance(steps, int)
    optimizer = _optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(config, step, steps))
    model.to(device)
    result = FitResult({}, 0)
    best = -1.0
    step, start = 0, time.monotonic()
    with SummaryWriter(str(log_dir)) as board:
        epoch = 0
        while step < steps:
            epoch += 1
            epoch_start, losses = time.monotonic(), []
            model.train()
            for batch in loader:
                parts = _step(model, _augmented(batch, config, augment), optimizer, config, device)
                schedule.step()
                step += 1
                losses.append(parts["loss"])
                for name, value in parts.items():
                    board.add_scalar(f"train/{name}", value, step)
                board.add_scalar("train/learning_rate", schedule.get_last_lr()[0], step)
                left = (time.monotonic() - start) / step * (steps - step)
                on_progress(Progress(step, steps, epoch, parts["loss"], left))
                if step >= steps:
                    break
            row = {"epoch": epoch, "step": step, "train_loss": float(np.mean(losses))}
            row |= _validate(model, validation, config, device)
            row["seconds"] = time.monotonic() - epoch_start
            _record(board, row, step)
            result.history.append(row)
            if row["validation_ap50"] > best:
                best = row["validation_ap50"]
                result.best_epoch = epoch
                result.best_state = {
                    k: v.detach().cpu().clone() for k, v in model.state_dict().items()
                }
    model.load_state_dict(result.best_state)
    return result


def predict_all(
    predictor: Predictor, dataset: ImageDataset, batch_size: int = 4
) -> tuple[list[NDArray[np.float32]], list[Detections]]:
    """(boxes of the labels, detections) of every picture, in order."""
    truths: list[NDArray[np.float32]] = []
    found: list[Detections] = []
    for start in range(0, len(dataset), batch_size):
        items = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        truths += [target["boxes"].numpy() for _, target in items]
        found += predictor([image.permute(1, 2, 0).numpy() for image, _ in items])
    return truths, found


def _step(
    model: FasterRCNN,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    device: torch.device,
) -> dict[str, float]:
    images = [image.to(device).float().div_(255.0) for image in batch[0]]
    targets = [{k: v.to(device) for k, v in t.items() if k != "image_id"} for t in batch[1]]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        parts = model(images, targets)
        loss = sum(parts.values(), torch.zeros((), device=device))
    if not torch.isfinite(loss):
        ids = [int(target["image_id"]) for target in batch[1]]
        raise TrainingError(
            f"the loss is {loss.item()} at a batch with training images {ids}: "
            "lower the learning rate or look at these pictures and their boxes",
            reason="LOSS_NOT_FINITE",
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf)
    optimizer.step()
    values = {name: float(value.detach()) for name, value in parts.items()}
    return values | {"loss": float(loss.detach()), "gradient_norm": float(norm)}


def _validate(
    model: FasterRCNN, validation: ImageDataset, config: TrainingConfig, device: torch.device
) -> dict[str, float]:
    loss = _validation_loss(model, validation, config, device)
    truths, found = predict_all(Predictor(model, device), validation)
    metrics = compute_metrics(truths, found, threshold=0.5)
    return {
        "validation_loss": loss,
        "validation_ap50": metrics.ap50 or 0.0,
        "validation_ap": metrics.ap or 0.0,
    }


def _validation_loss(
    model: FasterRCNN, validation: ImageDataset, config: TrainingConfig, device: torch.device
) -> float:
    # The losses exist in training mode only; the statistics of batch norm must not learn from it.
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    state = torch.get_rng_state()
    losses = []
    with torch.no_grad():
        for start in range(0, len(validation), config.batch_size):
            stop = min(start + config.batch_size, len(validation))
            images, targets = collate([validation[i] for i in range(start, stop)])
            moved = [{k: v.to(device) for k, v in t.items() if k != "image_id"} for t in targets]
            parts = model([i.to(device).float().div_(255.0) for i in images], moved)
            losses.append(float(sum(parts.values())))
    # How many pictures are validated must not change how the training goes on.
    torch.set_rng_state(state)
    return float(np.mean(losses))


def _record(board: SummaryWriter, row: dict[str, float], step: int) -> None:
    for name in ("validation_loss", "validation_ap50", "validation_ap", "seconds"):
        prefix = "validation/" if name.startswith("validation_") else "epoch/"
        board.add_scalar(prefix + name.removeprefix("validation_"), row[name], step)
    board.flush()
    logger.info(
        "epoch %d done in %.0f s: loss %.3f, validation loss %.3f, validation AP50 %.3f",
        row["epoch"],
        row["seconds"],
        row["train_loss"],
        row["validation_loss"],
        row["validation_ap50"],
    )


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay)
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, rate, weight_decay=decay)
    return torch.optim.AdamW(parameters, rate, weight_decay=decay)


def _rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The factor on the learning rate at a step."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _augmented(batch: Batch, config: TrainingConfig, generator: torch.Generator) -> Batch:
    pairs = list(_augment_each(batch, config, generator))
    return [image for image, _ in pairs], [target for _, target in pairs]


def _augment_each(
    batch: Batch, config: TrainingConfig, generator: torch.Generator
) -> Iterator[tuple[Tensor, Target]]:
    for image, target in zip(*batch, strict=True):
        mirror, light = torch.rand(2, generator=generator).tolist()
        if config.flip and mirror < 0.5:
            width = image.shape[-1]
            boxes = target["boxes"]
            image = image.flip(-1)
            flipped = torch.stack(
                [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1
            )
            target = target | {"boxes": flipped}
        if config.brightness:
            factor = 1 + config.brightness * (2 * light - 1)
            image = (image.float() * factor).clamp_(0, 255).to(torch.uint8)
        yield image, target
