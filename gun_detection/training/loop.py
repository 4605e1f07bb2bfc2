"""The training loop: epochs, validation, the average of weights, checkpoints, going back."""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.datasets.torch_dataset import Batches, ImageDataset, as_it_is
from gun_detection.detector.architectures import input_size
from gun_detection.detector.inference import EVALUATION_FLOOR, Predictor
from gun_detection.errors import GunDetectionError, TrainingError
from gun_detection.evaluation.matching import match_all
from gun_detection.evaluation.metrics import average_precision
from gun_detection.training import distributed
from gun_detection.training.augment import AugmentedDataset
from gun_detection.training.average import blend, copy_weights
from gun_detection.training.board import Board
from gun_detection.training.checkpoints import (
    Checkpoint,
    Checkpoints,
    optimizer_tensors,
    restore_optimizer,
)
from gun_detection.training.config import TrainingConfig
from gun_detection.training.hardware import peak_memory_mb
from gun_detection.training.network import prepare, set_input_size
from gun_detection.training.order import Order
from gun_detection.training.seeds import mix
from gun_detection.training.step import Stepper, build_optimizer, learning_rate
from gun_detection.training.validate import predict_all, validation_loss
from gun_detection.training.watch import Watch

logger = logging.getLogger(__name__)

# What a training that diverged goes on with, of its learning rate.
_LOWER_RATE = 0.3


@dataclass(frozen=True)
class Progress:
    """Where a training is: steps done of all, epoch from 1, the last loss, pictures per second,
    seconds left."""

    step: int
    steps: int
    epoch: int
    loss: float
    images_per_second: float
    seconds_left: float


@dataclass
class State:
    """Where a training is, as JSON types. `history` has one row of numbers per validation,
    `events` says in words what did not go as planned, `peak_memory_mb` is of one process."""

    step: int = 0
    validated: int = 0
    images: int = 0
    rate: float = 1.0
    parts: int = 1
    best_ap50: float = -1.0
    best_epoch: int = 0
    waits: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_mb: int = 0
    watch: dict[str, Any] = field(default_factory=lambda: Watch().to_json())
    history: list[dict[str, float]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Data:
    """What is learnt from and validated with; `names` are the sha256 of the training pictures."""

    train: ImageDataset
    validation: ImageDataset
    order: Order
    names: Sequence[str]


class Training:
    """One training of one model, in one or several processes."""

    def __init__(
        self,
        model: FasterRCNN,
        config: TrainingConfig,
        data: Data,
        device: torch.device,
        log_dir: Path,
        checkpoints: Checkpoints,
        *,
        workers: int = 0,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.config, self.data, self.device = config, data, device
        self.state = State()
        self.model = prepare(model, config, device)
        network: nn.Module = self.model
        if distributed.size() > 1:
            network = DistributedDataParallel(self.model)
        self._network = network
        self._stepper = Stepper(
            network, build_optimizer(self.model, config), config, device, data.names
        )
        self._watch = Watch()
        self._average = copy_weights(self.model) if config.ema_decay else {}
        self._best: dict[str, Tensor] = {}
        self._shadow = copy.deepcopy(self.model)
        self._epoch_steps = data.order.steps
        self.steps = min(config.epochs * self._epoch_steps, config.max_steps or 2**62)
        # Ge et al., "YOLOX", 2021, section 2.1: the end is spent on pictures as they are.
        plain_from = (1 - config.augmentation.plain_end) * self.steps / self._epoch_steps
        self._samples = AugmentedDataset(
            data.train, config.augmentation, config.seed, input_size(config.detector), plain_from
        )
        self._checkpoints, self._log_dir = checkpoints, log_dir
        self._workers, self._on_progress = workers, on_progress

    def run(self) -> dict[str, Tensor]:
        """Train to the end and return the weights of the best validation, on the CPU.

        Goes on from the last checkpoint where there is one. Raises `TrainingError` when the loss
        is not finite (`LOSS_NOT_FINITE`), when it diverges a second time (`DIVERGED`), or when
        the memory is too small (`OUT_OF_MEMORY`), and what reading a picture raises.
        """
        self._start = time.monotonic(), time.process_time()
        found = self._checkpoints.load()
        if found is not None:
            self._restore(found)
            self.state.events.append(f"went on from the checkpoint at step {self.state.step}")
            logger.info("going on from the checkpoint at step %d", self.state.step)
        else:
            self._save()
        with Board(self._log_dir, self.state.step) as self._board:
            self._board.recipe(self.config)
            while True:
                if self._validation_due():
                    self._validate()
                    self._save()
                if self.state.step >= self.steps or self._is_stuck():
                    break
                self._epoch()
            self._board.result(self.config, self.state.history, self.state.best_epoch)
        self._count_time()
        return self._best

    def _validation_due(self) -> bool:
        state = self.state
        epoch, rest = divmod(state.step, self._epoch_steps)
        at_end = rest == 0 and epoch % self.config.validate_every == 0
        return state.validated < state.step and (at_end or state.step >= self.steps)

    def _is_stuck(self) -> bool:
        stuck = self.config.patience is not None and self.state.waits >= self.config.patience
        if stuck:
            self.state.events.append(
                f"stopped at step {self.state.step}: no better AP50 in {self.state.waits} "
                "validations"
            )
        return stuck

    def _epoch(self) -> None:
        """Train to the end of the epoch, to the last step, or to where it diverges."""
        epoch, done = divmod(self.state.step, self._epoch_steps)
        rank, size = distributed.rank(), distributed.size()
        batches = self.data.order.batches(epoch)[done : done + self.steps - self.state.step]
        # Every process has something to do, or the others would wait for it for ever.
        parts = [batch[rank::size] or batch[:1] for batch in batches]
        loader: DataLoader[Any] = DataLoader(
            Batches(self._samples),
            sampler=parts,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=min(self._workers, len(parts)),
            pin_memory=self.device.type == "cuda",
        )
        saved = asked = time.monotonic()
        self._network.train()
        for whole, batch in zip(batches, loader, strict=True):
            waited = time.monotonic() - asked
            if isinstance(batch, GunDetectionError):
                raise batch
            values = self._step(batch)
            self.state.images += len(whole)
            self._show(values, epoch, waited)
            if self._watch.diverged:
                self._go_back()
                return
            if time.monotonic() - saved > self.config.checkpoint_minutes * 60:
                self._save()
                saved = time.monotonic()
            asked = time.monotonic()

    def _step(self, batch: Any) -> dict[str, float]:
        state, config = self.state, self.config
        for group in self._stepper.optimizer.param_groups:
            group["lr"] = learning_rate(config, state.step, self.steps) * group["scale"]
            group["lr"] *= state.rate
        self._resize(mix(config.seed, 1, state.step))
        # The sampling of proposals follows from the step, and differs between processes.
        torch.manual_seed(mix(config.seed, 2, state.step, distributed.rank()))
        values = distributed.mean(self._stepper(batch))
        state.step += 1
        if self._average:
            assert config.ema_decay is not None
            blend(self._average, self.model, config.ema_decay, state.step)
        self._watch.see(
            values["loss"], values["gradient_norm"], warm=state.step > config.warmup_steps
        )
        if self._stepper.parts != state.parts:
            state.parts = self._stepper.parts
            state.events.append(
                f"out of memory at step {state.step}: batches in {state.parts} parts from then on"
            )
        return values

    def _resize(self, seed: int) -> None:
        """Draw the input size of a step."""
        scales = self.config.augmentation.scales
        generator = torch.Generator().manual_seed(seed)
        scale = scales[int(torch.randint(len(scales), (1,), generator=generator))]
        set_input_size(self.model, self.config, scale)

    def _show(self, values: dict[str, float], epoch: int, waited: float) -> None:
        seconds = self.state.seconds + time.monotonic() - self._start[0]
        left = seconds / self.state.step * (self.steps - self.state.step)
        rate = self.state.images / seconds
        step = self.state.step
        self._on_progress(Progress(step, self.steps, epoch + 1, values["loss"], rate, left))
        lr = self._stepper.optimizer.param_groups[-1]["lr"]
        self._board.step(
            step,
            values,
            {
                "learning_rate": lr,
                "images_per_second": rate,
                "seconds_waiting_for_data": waited,
                "peak_memory_mb": peak_memory_mb(self.device),
            },
        )

    def _validate(self) -> None:
        """Measure on the validation pictures, in the first process, and tell the others."""
        self._count_time()
        state, start = self.state, time.monotonic()
        epoch = -(-state.step // self._epoch_steps)
        row: dict[str, float] = {}
        if distributed.rank() == 0:
            self._shadow.load_state_dict(self._average or self.model.state_dict())
            loss = validation_loss(self._shadow, self.data.validation, self.config, self.device)
            truths, found = predict_all(
                Predictor(self._shadow, self.device, EVALUATION_FLOOR), self.data.validation
            )
            precision = average_precision(match_all(truths, found))
            row = {
                "epoch": epoch,
                "step": state.step,
                "cpu_seconds": round(state.cpu_seconds, 1),
                "train_loss": self._watch.loss,
                "validation_loss": loss,
                "validation_ap50": precision["ap50"] or 0.0,
                "validation_ap": precision["ap"] or 0.0,
                "seconds": time.monotonic() - start,
            }
            self._board.validation(state.step, row, self.data.validation, truths, found)
        row = distributed.from_first(row)
        state.validated = state.step
        state.history.append(row)
        state.waits += 1
        if row["validation_ap50"] > state.best_ap50:
            state.best_ap50, state.best_epoch, state.waits = row["validation_ap50"], epoch, 0
            source = self._average or self.model.state_dict()
            self._best = {
                name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, t in source.items()
            }
        logger.info(
            "epoch %d: loss %.3f, validation loss %.3f, validation AP50 %.3f, AP %.3f (%.0f s)",
            epoch,
            row["train_loss"],
            row["validation_loss"],
            row["validation_ap50"],
            row["validation_ap"],
            row["seconds"],
        )

    def _save(self) -> None:
        """A checkpoint, unless the training looks as if it were going wrong."""
        if distributed.rank() == 0 and self._watch.calm:
            self._checkpoints.save(self._checkpoint())

    def _checkpoint(self) -> Checkpoint:
        self._count_time()
        state = asdict(self.state) | {"watch": self._watch.to_json()}
        parts = {
            "model": self.model.state_dict(),
            "average": self._average,
            "best": self._best,
            "optimizer": optimizer_tensors(self._stepper.optimizer),
        }
        tensors = {
            f"{part}/{name}": tensor.detach().cpu().contiguous().clone()
            for part, content in parts.items()
            for name, tensor in content.items()
        }
        return Checkpoint(tensors, state)

    def _count_time(self) -> None:
        now = time.monotonic(), time.process_time()
        self.state.seconds += now[0] - self._start[0]
        # The other processes work as much as this one.
        self.state.cpu_seconds += (now[1] - self._start[1]) * distributed.size()
        self._start = now
        memory = peak_memory_mb(self.device)
        self.state.peak_memory_mb = max(self.state.peak_memory_mb, memory)

    def _restore(self, checkpoint: Checkpoint) -> None:
        parts: dict[str, dict[str, Tensor]] = {"average": {}, "best": {}, "optimizer": {}}
        for name, tensor in checkpoint.tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        self.model.load_state_dict(parts["model"])
        self._average = {name: t.to(self.device) for name, t in parts["average"].items()}
        self._best = parts["best"]
        restore_optimizer(self._stepper.optimizer, parts["optimizer"])
        self.state = State(**checkpoint.state)
        self._stepper.parts = self.state.parts
        self._watch = Watch.from_json(self.state.watch)
        self._start = time.monotonic(), time.process_time()

    def _go_back(self) -> None:
        """Once, to the last good checkpoint with a lower rate; the second time is the end."""
        step, loss = self.state.step, self._watch.loss
        if self.state.rate < 1:
            raise TrainingError(
                f"the training diverged at step {step} (smoothed loss {loss:.2f}) again with "
                f"{_LOWER_RATE} of its learning rate: lower learning_rate, or set clip_norm",
                reason="DIVERGED",
            )
        distributed.wait()
        good = self._checkpoints.load()
        assert good is not None, "there is one of step 0"
        events = self.state.events
        self._restore(good)
        self._watch = Watch()
        self.state.rate = _LOWER_RATE
        self.state.events = [
            *events,
            f"diverged at step {step} (smoothed loss {loss:.2f}): went back to step "
            f"{self.state.step} with {_LOWER_RATE} of the learning rate",
        ]
        logger.warning("%s", self.state.events[-1])
        self._save()
