import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from gun_detection.datasets.torch_dataset import Batch, Target
from gun_detection.detector.architectures import DetectorConfig, build_detector
from gun_detection.errors import (
    DatasetError,
    GunDetectionError,
    ServiceUnavailableError,
    TrainingError,
)
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from gun_detection.training import step as steps
from gun_detection.training.augment import Augmentation
from gun_detection.training.board import Board
from gun_detection.training.checkpoints import Checkpoints
from gun_detection.training.config import TrainingConfig
from gun_detection.training.loop import Data, Progress, Training
from gun_detection.training.order import Order
from gun_detection.training.watch import Watch

# Made without a check of its architecture: the name is known only while a test runs.
SMALL = DetectorConfig.model_construct(
    architecture="tiny", min_size=None, max_size=None, norm="trainable", max_detections=100
)
CONFIG = TrainingConfig(
    detector=SMALL,
    initial_weights="none",
    epochs=3,
    batch_size=2,
    warmup_steps=1,
    ema_decay=0.9,
    checkpoint_minutes=0,
    augmentation=Augmentation(zoom_out=0.5, crop=0.5, mosaic=0.3, scales=(0.8, 1.0)),
)


class Pictures:
    """Grey pictures with dark squares, or with nothing."""

    def __init__(self, count: int, guns: int = 1, seed: int = 0) -> None:
        self.count, self.guns, self.seed = count, guns, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        generator = torch.Generator().manual_seed(self.seed + index)
        image = torch.randint(120, 250, (3, 64, 80), dtype=torch.uint8, generator=generator)
        boxes = torch.zeros((0, 4))
        if self.guns:
            image[:, 10:40, 20:60] = 10
            boxes = torch.tensor([[20.0, 10.0, 60.0, 40.0]]).repeat(self.guns, 1)
        labels = torch.ones(len(boxes), dtype=torch.int64)
        return image, {"boxes": boxes, "labels": labels, "image_id": torch.tensor([index])}


class Unreadable(Pictures):
    """One of them cannot be read."""

    def __init__(self, count: int, error: GunDetectionError) -> None:
        super().__init__(count)
        self.error = error

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if index == self.count - 1:
            raise self.error
        return super().__getitem__(index)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def train(settings: Settings, storage: Storage, tmp_path: Path) -> Callable[..., Training]:
    """Runs a training to its end, or to the step in `kill_at`; it can be run again."""

    def run(
        config: TrainingConfig = CONFIG,
        name: str = "run",
        *,
        guns: int = 1,
        count: int = 6,
        kill_at: int = 0,
        pictures: Pictures | None = None,
        workers: int = 0,
        repeats: float = 1.0,
    ) -> Training:
        def progress(now: Progress) -> None:
            if now.step == kill_at:
                raise Killed

        torch.manual_seed(config.seed)
        often = [repeats] * count
        order = Order([1.25] * count, often, config.batch_size, config.seed, True)
        training = Training(
            build_detector(config.detector),
            config,
            Data(
                pictures or Pictures(count, guns),
                Pictures(min(count, 3), seed=50),
                order,
                [f"sha-{i}" for i in range(count)],
            ),
            torch.device("cpu"),
            tmp_path / name,
            Checkpoints(storage, settings.data_bucket, name),
            workers=workers,
            on_progress=progress,
        )
        training.best = training.run()  # type: ignore[attr-defined]
        return training

    return run


def weights(training: Training) -> list[bytes]:
    best: dict[str, Tensor] = training.best  # type: ignore[attr-defined]
    return [best[name].numpy().tobytes() for name in sorted(best)]


def numbers(training: Training) -> str:
    rows = [
        {name: value for name, value in row.items() if not name.endswith("seconds")}
        for row in training.state.history
    ]
    return json.dumps(rows)


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(
    train: Callable[..., Training],
) -> None:
    first, second = train(name="a"), train(name="b")
    other = train(CONFIG.model_copy(update={"seed": 1}), name="c")
    assert weights(first) == weights(second) != weights(other)
    assert numbers(first) == numbers(second) != numbers(other)


@pytest.mark.parametrize("kill_at", [1, 4, 6, 8])
def test_a_killed_training_goes_on_and_ends_as_if_undisturbed(
    train: Callable[..., Training], kill_at: int
) -> None:
    undisturbed = train(name="undisturbed")
    with pytest.raises(Killed):
        train(name="killed", kill_at=kill_at)
    resumed = train(name="killed")
    assert any("went on from the checkpoint" in event for event in resumed.state.events)
    assert weights(resumed) == weights(undisturbed)
    assert numbers(resumed) == numbers(undisturbed)


def test_repeated_pictures_go_on_as_they_were(train: Callable[..., Training]) -> None:
    undisturbed = train(name="undisturbed", count=3, repeats=2.5)
    with pytest.raises(Killed):
        train(name="killed", count=3, repeats=2.5, kill_at=6)
    assert weights(train(name="killed", count=3, repeats=2.5)) == weights(undisturbed)


def test_a_checkpoint_that_was_cut_off_is_passed_over(
    train: Callable[..., Training], settings: Settings, storage: Storage
) -> None:
    undisturbed = train(name="undisturbed")
    with pytest.raises(Killed):
        train(name="killed", kill_at=5)
    last = max(o.key for o in storage.list_objects(settings.data_bucket, "checkpoints/killed/"))
    data = storage.get(settings.data_bucket, last)
    storage.put(settings.data_bucket, last, data[: len(data) // 2])
    assert weights(train(name="killed")) == weights(undisturbed)


def test_only_the_last_two_checkpoints_are_kept(
    train: Callable[..., Training], settings: Settings, storage: Storage
) -> None:
    train()
    kept = [o.key for o in storage.list_objects(settings.data_bucket, "checkpoints/")]
    assert kept == [f"checkpoints/run/{step:09d}.safetensors" for step in (8, 9)]


def test_curves_pictures_and_recipe_go_to_tensorboard(
    train: Callable[..., Training], tmp_path: Path
) -> None:
    train()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = events.Tags()
    assert {
        "train/loss",
        "train/gradient_norm",
        "progress/learning_rate",
        "progress/images_per_second",
        "progress/peak_memory_mb",
        "validation/loss",
        "validation/ap50",
        "validation/ap",
    } <= set(tags["scalars"])
    assert len(events.Scalars("train/loss")) == 9
    assert len(events.Scalars("validation/ap50")) == 3
    assert "validation/0" in tags["images"]
    assert "recipe/text_summary" in tags["tensors"]
    assert "validation/precision_recall" in tags["tensors"]


def test_curves_go_on_after_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    for start, written in ((0, (10, 20)), (10, (20, 30))):
        with Board(tmp_path, start) as board:
            for step in written:
                board.step(step, {"loss": float(start)}, {})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(10, 0.0), (20, 10.0), (30, 10.0)]


def test_only_negatives_train_with_a_finite_loss(train: Callable[..., Training]) -> None:
    history = train(guns=0).state.history
    assert all(math.isfinite(row["train_loss"]) for row in history)


def test_a_picture_with_a_hundred_boxes_trains(train: Callable[..., Training]) -> None:
    history = train(CONFIG.model_copy(update={"epochs": 1}), guns=100).state.history
    assert math.isfinite(history[0]["train_loss"])


def test_a_single_picture_trains(train: Callable[..., Training]) -> None:
    state = train(CONFIG.model_copy(update={"batch_size": 4}), count=1).state
    assert (state.step, state.images) == (3, 3)
    assert all(math.isfinite(row["train_loss"]) for row in state.history)


def test_a_loss_that_is_not_finite_stops_and_names_the_images(
    train: Callable[..., Training],
) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0, "clip_norm": None})
    with pytest.raises(TrainingError, match=r"training images sha-\d, sha-\d") as caught:
        train(config)
    assert caught.value.reason == "LOSS_NOT_FINITE"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error",
    [
        DatasetError("it was changed", reason="SHA256_MISMATCH"),
        ServiceUnavailableError("the clocks differ", reason="CLOCK_WRONG"),
    ],
    ids=lambda error: error.reason,
)
def test_what_reading_a_picture_raises_stays_what_it_is(
    train: Callable[..., Training], error: GunDetectionError, workers: int
) -> None:
    with pytest.raises(type(error)) as caught:
        train(pictures=Unreadable(6, error), workers=workers)
    assert (caught.value.message, caught.value.reason) == (error.message, error.reason)


def test_processes_that_read_change_nothing(train: Callable[..., Training]) -> None:
    assert weights(train(name="one")) == weights(train(name="more", workers=2))


def test_max_steps_ends_within_an_epoch(train: Callable[..., Training]) -> None:
    history = train(CONFIG.model_copy(update={"max_steps": 4})).state.history
    assert [row["step"] for row in history] == [3, 4]


def test_without_progress_it_stops_early(train: Callable[..., Training]) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1e-12, "epochs": 9, "patience": 2})
    state = train(config).state
    assert state.step < 9 * 3
    assert [event for event in state.events if "no better AP50 in 2 validations" in event]
    again = train(config).state
    assert again.step == state.step
    assert sum("no better AP50" in event for event in again.events) == 1


def test_divergence_goes_back_once_with_a_lower_rate_and_then_stops(
    train: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    diverged = iter([False, False, False, False, True] + [False] * 20)
    monkeypatch.setattr(Watch, "diverged", property(lambda _: next(diverged)))
    state = train(name="once").state
    assert state.rate == 0.3
    assert any(event.startswith("diverged at step 5") for event in state.events)
    assert state.step == 9
    monkeypatch.setattr(Watch, "diverged", property(lambda _: True))
    with pytest.raises(TrainingError, match="lower learning_rate") as caught:
        train(name="twice")
    assert caught.value.reason == "DIVERGED"


def test_short_memory_halves_the_batch_and_says_so(
    train: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = steps.Stepper._backward

    def limited(self: steps.Stepper, batch: Batch, *rest: object) -> dict[str, Tensor]:
        if len(batch[0]) > 1:
            raise torch.OutOfMemoryError("too much")
        return backward(self, batch, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(steps.Stepper, "_backward", limited)
    training = train()
    assert training.state.parts == 2
    assert training.state.events == [
        "out of memory at step 1: batches in 2 parts from then on",
    ]
    monkeypatch.setattr(
        steps.Stepper, "_backward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError)
    )
    with pytest.raises(TrainingError, match="set micro_batch") as caught:
        train(name="none")
    assert caught.value.reason == "OUT_OF_MEMORY"


def test_accumulated_gradients_are_those_of_the_whole_batch(
    train: Callable[..., Training],
) -> None:
    config = CONFIG.model_copy(
        update={"max_steps": 1, "detector": SMALL.model_copy(update={"norm": "frozen"})}
    )
    whole = train(config, name="whole").state.history[0]
    parts = train(config.model_copy(update={"micro_batch": 1}), name="parts").state.history[0]
    # The proposals that the losses are sampled from differ, the losses are of one size.
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=0.3)


def test_too_many_frozen_stages_are_refused(train: Callable[..., Training]) -> None:
    with pytest.raises(TrainingError, match="has 3 stages"):
        train(CONFIG.model_copy(update={"frozen_stages": 4}))


def test_frozen_stages_do_not_learn(train: Callable[..., Training]) -> None:
    config = CONFIG.model_copy(
        update={"frozen_stages": 2, "detector": SMALL.model_copy(update={"norm": "frozen"})}
    )
    torch.manual_seed(config.seed)
    before = build_detector(config.detector).state_dict()
    after = train(config).best  # type: ignore[attr-defined]
    changed = {
        name.split(".")[2]
        for name, tensor in after.items()
        if name.startswith("backbone.body.") and not torch.equal(tensor, before[name])
    }
    assert changed == {"2"}


def test_divergence_is_told_from_noise() -> None:
    watch = Watch()
    for _ in range(100):
        watch.see(0.5, 2.0, warm=True)
    for loss, norm in ((3.0, 50.0), (0.4, 2.0)) * 5:
        watch.see(loss, norm, warm=True)
    assert not watch.diverged
    assert watch.calm
    for _ in range(60):
        watch.see(3.0, 40.0, warm=True)
    assert watch.diverged
    assert not watch.calm
    again = Watch.from_json(json.loads(json.dumps(watch.to_json())))
    assert again == watch
    assert not replace(watch, norm=2.0).diverged
