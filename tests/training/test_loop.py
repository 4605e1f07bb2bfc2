import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from gun_detection.detector.architectures import DetectorConfig, build_detector
from gun_detection.detector.weights import serialize
from gun_detection.errors import TrainingError
from gun_detection.training.config import TrainingConfig
from gun_detection.training.loop import Progress, Target, _augmented, fit

SMALL = DetectorConfig(architecture="resnet18_fpn", norm="trainable", min_size=64, max_size=96)
CONFIG = TrainingConfig(
    detector=SMALL, initial_weights="none", epochs=2, batch_size=2, warmup_steps=1
)
CPU = torch.device("cpu")


class Pictures:
    """Grey pictures with a dark square, or with nothing."""

    def __init__(self, count: int, guns: bool = True, seed: int = 0) -> None:
        self.count, self.guns, self.seed = count, guns, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        generator = torch.Generator().manual_seed(self.seed + index)
        image = torch.randint(120, 250, (3, 64, 80), dtype=torch.uint8, generator=generator)
        boxes = torch.zeros((0, 4))
        if self.guns:
            image[:, 10:40, 20:60] = 10
            boxes = torch.tensor([[20.0, 10.0, 60.0, 40.0]])
        labels = torch.ones(len(boxes), dtype=torch.int64)
        return image, {"boxes": boxes, "labels": labels, "image_id": torch.tensor(index)}


def train(folder: Path, config: TrainingConfig = CONFIG, guns: bool = True) -> tuple[str, list]:
    torch.manual_seed(config.seed)
    model = build_detector(config.detector)
    seen: list[Progress] = []
    result = fit(model, config, Pictures(6, guns), Pictures(3, seed=50), CPU, folder, seen.append)
    assert [progress.step for progress in seen] == list(range(1, seen[-1].steps + 1))
    return serialize(model, config.detector)[1], result.history


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(tmp_path: Path) -> None:
    first, history = train(tmp_path / "a")
    second, again = train(tmp_path / "b")
    other, _ = train(tmp_path / "c", CONFIG.model_copy(update={"seed": 1}))
    assert first == second != other
    assert [row["train_loss"] for row in history] == [row["train_loss"] for row in again]


def test_curves_go_to_tensorboard(tmp_path: Path) -> None:
    train(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "train/loss",
        "train/learning_rate",
        "validation/loss",
        "validation/ap50",
        "validation/ap",
        "epoch/seconds",
    } <= tags
    assert len(events.Scalars("train/loss")) == 6
    assert len(events.Scalars("validation/ap50")) == 2


def test_only_negatives_train_with_a_finite_loss(tmp_path: Path) -> None:
    _, history = train(tmp_path / "run", guns=False)
    assert all(math.isfinite(row["train_loss"]) for row in history)


def test_a_loss_that_is_not_finite_stops_and_names_the_images(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0, "clip_norm": None})
    with pytest.raises(TrainingError, match=r"training images \[\d, \d\]") as caught:
        train(tmp_path / "run", config)
    assert caught.value.reason == "LOSS_NOT_FINITE"


def test_max_steps_ends_within_an_epoch(tmp_path: Path) -> None:
    _, history = train(tmp_path / "run", CONFIG.model_copy(update={"max_steps": 1}))
    assert [row["step"] for row in history] == [1]


def test_a_mirrored_picture_has_mirrored_boxes() -> None:
    image, target = Pictures(1)[0]
    config = CONFIG.model_copy(update={"brightness": 0.0})
    generator = torch.Generator().manual_seed(0)
    mirrored = 0
    for _ in range(10):
        [moved], [label] = _augmented(([image], [target]), config, generator)
        x1, y1, x2, y2 = label["boxes"][0].int().tolist()
        assert (moved[:, y1:y2, x1:x2] == 10).all()
        mirrored += not torch.equal(moved, image)
    assert 0 < mirrored < 10
