"""From a data set version to a model version, on real servers; also in several processes."""

import logging
import os
import signal
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
import torch
from sqlalchemy.orm import Session

from gun_detection import stages
from gun_detection.database import open_session
from gun_detection.database.models import DatasetVersion, GateDecision, ModelVersion
from gun_detection.datasets import ingest
from gun_detection.detector.architectures import DetectorConfig, build_detector
from gun_detection.detector.weights import serialize
from gun_detection.errors import (
    DatasetError,
    NotFoundError,
    SettingsError,
    TrainingError,
    TransientError,
)
from gun_detection.release.champion import get_model
from gun_detection.release.registry import publish
from gun_detection.settings import Settings, load_settings
from gun_detection.storage import Storage
from gun_detection.training import train
from gun_detection.training.config import resolve_config
from gun_detection.training.loop import Progress
from gun_detection.training.step import select_precision
from gun_detection.training.train import get_dataset
from tests.conftest import model_row, random_model
from tests.release.conftest import watch_storage

# A few steps of the smallest detector that is not made for the tests: other processes know it.
QUICK = {
    "batch_size": 2,
    "max_steps": 4,
    "detector.min_size": 64,
    "detector.max_size": 96,
    "optimizer": "sgd",
    "learning_rate": 1e-4,
}


@pytest.fixture
def dataset(settings: Settings) -> str:
    return str(stages.ingest("synthetic:40", settings)["dataset_id"])


def keys(settings: Settings, storage: Storage, prefix: str) -> list[str]:
    return [item.key for item in storage.list_objects(settings.data_bucket, prefix)]


def decision(
    settings: Settings, model: str, champion: str | None, promotion: str, *, passed: bool = True
) -> int:
    with open_session(settings) as session:
        row = GateDecision(
            candidate_id=model,
            champion_id=champion,
            holdout_id="h",
            passed=passed,
            policy={"promotion": promotion},
            rules=[],
        )
        session.add(row)
        session.flush()
        return row.id


def test_a_model_version_holds_how_it_came_about(
    settings: Settings, storage: Storage, dataset: str
) -> None:
    seen: list[Progress] = []
    result = stages.train(settings, dataset, "smoke", QUICK, seen.append)
    assert [now.step for now in seen] == [1, 2, 3, 4]
    with open_session(settings) as session:
        model = get_model(session, result["model_id"])
    record = model.training
    assert record["hardware"]
    precision = select_precision("auto", torch.device("cpu"))
    assert (record["device"], record["processes"], record["precision"]) == ("cpu", 1, precision)
    assert record["images"] == 8
    assert record["wall_seconds"] > 0
    assert record["cpu_seconds"] > 0
    assert record["peak_memory_mb"] > 100
    assert set(record["packages"]) >= {"torch", "torchvision", "gun-detection"}
    assert record["operating_point"]["threshold"] == model.threshold
    assert "only" in record["operating_point"]["note"], "too few gun-free pictures for the target"
    assert keys(settings, storage, "checkpoints/") == [], "a finished training leaves none"
    again = stages.train(settings, dataset, "smoke", QUICK)
    assert (again["model_id"], again["created"]) == (result["model_id"], False)


def test_no_transaction_waits_while_a_training_is_stored(
    settings: Settings, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = watch_storage(settings, monkeypatch)
    stages.train(settings, dataset, "smoke", QUICK)
    assert waiting
    assert set(waiting) == {0}


def test_what_was_trained_is_judged_again_where_that_may_end_otherwise(
    settings: Settings, storage: Storage, dataset: str
) -> None:
    new = replace(
        random_model(1), dataset_id=dataset, config_hash=resolve_config(settings, "smoke").hash()
    )
    with open_session(settings) as session:
        model = publish(new, settings, storage, session).id
        first, second = (
            publish(random_model(seed), settings, storage, session).id for seed in (2, 3)
        )

    def need() -> tuple[bool, str]:
        found = stages.check_need(settings, dataset, "smoke")
        return found["needed"], found["reason"]

    def decided(champion: str | None, *, passed: bool = True) -> int:
        return decision(settings, model, champion, "auto", passed=passed)

    assert need() == (True, f"{model} was trained but has not been through the gate")
    decided(None)
    assert need() == (True, f"{model} passed the gate, and was neither promoted nor refused")
    decided(None, passed=False)
    assert need()[0] is False
    for champion in (first, second):
        stages.promote(settings, champion, "tester", "a test")
        assert need()[0] is True
        decided(champion, passed=False)
        assert need()[0] is False
    stages.rollback(settings, "ann", "alarms")
    assert need() == (True, f"{model} was compared with another champion than the present one")
    with open_session(settings) as session:
        session.get_one(ModelVersion, model).deleted_at = datetime.now(UTC)
    assert need()[0] is False, "nothing is trained again to be judged again"
    with open_session(settings) as session:
        session.get_one(ModelVersion, model).deleted_at = None
    assert need()[0] is True
    stages.promote(settings, model, "tester", "a test", decided(first))
    assert need()[0] is False, "it is champion"
    stages.rollback(settings, "ann", "alarms")
    stages.promote(settings, second, "tester", "a test")
    assert need()[0] is False, "a person rolled it back"


@pytest.mark.parametrize("said", ["refused", "manual"])
def test_a_look_at_the_gate_takes_back_nothing_that_a_person_said(
    settings: Settings, dataset: str, said: str
) -> None:
    with open_session(settings) as session:
        row = model_row(session, 1)
        row.dataset_id, row.config_hash = dataset, resolve_config(settings, "smoke").hash()
        model = row.id
    first = decision(settings, model, None, "manual" if said == "manual" else "approve")
    if said == "refused":
        stages.answer(settings, first, approved=False, actor="carol")
    for passed in (None, True, False):
        if passed is not None:
            decision(settings, model, None, "auto", passed=passed)
        assert stages.check_need(settings, dataset, "smoke")["needed"] is False


def test_what_would_fail_after_a_training_fails_before_it(
    settings: Settings, dataset: str, tmp_path: Path
) -> None:
    found = stages.check_need(settings, dataset[:16], "smoke", None, "trial")
    assert (found["needed"], found["dataset_id"]) == (True, dataset)
    faulty = tmp_path / "mine.yaml"
    faulty.write_text("rules: [{kind: luck}]")
    wrong = settings.model_copy(update={"gate_policy": "standart"})
    for own, policy, said in (
        (settings, str(faulty), "gate policy mine.yaml: rules.0"),
        (wrong, None, "there is no gate policy 'standart'"),
    ):
        with pytest.raises(SettingsError, match=said):
            stages.check_need(own, dataset, "smoke", None, policy)
    assert stages.check_need(wrong, dataset, "smoke", None, "trial")["needed"] is True
    with pytest.raises(NotFoundError, match="gun-detection datasets"):
        stages.check_need(settings, "0" * 64, "smoke")


def test_a_data_set_goes_by_the_beginning_of_its_id(session: Session) -> None:
    with pytest.raises(NotFoundError) as caught:
        get_dataset(session, None)
    assert caught.value.reason == "NO_DATASET"
    numbers = dict.fromkeys(
        ("images", "boxes", "negatives", "train_images", "validation_images", "holdout_images"), 0
    )
    numbers |= dict.fromkeys(("rejected_images", "rejected_boxes", "duplicates"), 0)
    ids = ["ab" * 32, "ac" * 32]
    for number, name in enumerate(ids):
        made = datetime(2026, 1, 1 + number, tzinfo=UTC)
        keys = {"source": "s", "manifest_key": "m", "report_key": "r", "holdout_id": "h"}
        session.add(DatasetVersion(id=name, created_at=made, **numbers, **keys))
    session.flush()
    assert get_dataset(session, None).id == get_dataset(session, "").id == ids[1]
    for name in (ids[0], ids[0][:16], "ab"):
        assert get_dataset(session, name).id == ids[0]
    with pytest.raises(NotFoundError, match="more than one data set version begins with 'a'"):
        get_dataset(session, "a")
    for name in (ids[0][1:], "ab%", "a_ab", "ab\x00", "ab\n", "ab\udcff"):
        with pytest.raises(NotFoundError, match="there is no data set version"):
            get_dataset(session, name)


def test_a_threshold_is_not_below_what_is_stored(settings: Settings, dataset: str) -> None:
    high = settings.model_copy(update={"score_floor": 0.9})
    result = stages.train(high, dataset, "smoke", QUICK)
    with open_session(settings) as session:
        model = get_model(session, result["model_id"])
    assert model.threshold == 0.9
    assert "below the score floor" in model.training["operating_point"]["note"]
    higher = settings.model_copy(update={"score_floor": 0.95})
    with pytest.raises(SettingsError, match="GUN_DETECTION_SCORE_FLOOR"):
        stages.promote(higher, model.id, actor="tester", reason="a test")


def test_an_interrupted_training_goes_on_or_starts_anew(
    settings: Settings, storage: Storage, dataset: str
) -> None:
    class Stop(BaseException):
        pass

    def stop(now: Progress) -> None:
        if now.step == 3:
            raise Stop

    config = QUICK | {"checkpoint_minutes": 0}
    undisturbed = stages.train(settings, dataset, "smoke", config)
    for resume in (True, False):
        with pytest.raises(Stop):
            stages.train(settings, dataset, "smoke", config, stop, again=True)
        assert keys(settings, storage, "checkpoints/")
        seen: list[Progress] = []
        result = stages.train(
            settings, dataset, "smoke", config, seen.append, again=True, resume=resume
        )
        assert seen[0].step == (3 if resume else 1)
        assert result["model_id"] == undisturbed["model_id"]


@pytest.mark.parametrize("place", ["file", "bucket"])
def test_other_initial_weights_in_the_same_place_are_another_recipe(
    settings: Settings, storage: Storage, dataset: str, tmp_path: Path, place: str
) -> None:
    file, key = tmp_path / "first.safetensors", "weights/first.safetensors"
    named = str(file) if place == "file" else f"s3://{settings.data_bucket}/{key}"
    config = QUICK | {"initial_weights": named, "checkpoint_minutes": 0}

    def put(seed: int) -> str:
        detector = DetectorConfig(architecture="resnet18_fpn", norm="trainable")
        torch.manual_seed(seed)
        data, sha256 = serialize(build_detector(detector), detector)
        file.write_bytes(data)
        storage.put(settings.data_bucket, key, data)
        return sha256

    class Stop(BaseException):
        pass

    def stop(now: Progress) -> None:
        if now.step == 3:
            raise Stop

    put(1)
    with pytest.raises(Stop):
        stages.train(settings, dataset, "smoke", config, stop)
    sha256 = put(2)
    seen: list[Progress] = []
    model = stages.train(settings, dataset, "smoke", config, seen.append)["model_id"]
    assert seen[0].step == 1, "not from the checkpoint of other weights"
    with open_session(settings) as session:
        assert get_model(session, model).config["initial_weights_sha256"] == sha256
    assert stages.train(settings, dataset, "smoke", config)["model_id"] == model
    put(3)
    need = stages.check_need(settings, dataset, "smoke", config)
    assert need["reason"].startswith("no model has this recipe")
    put(1)
    seen.clear()
    other = stages.train(settings, dataset, "smoke", config, seen.append)
    assert (seen[0].step, other["created"]) == (3, True)
    assert other["model_id"] != model


def test_two_processes_train_one_model(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dataset: str,
) -> None:
    caplog.set_level(logging.INFO, "gun_detection")
    monkeypatch.setenv("GUN_DETECTION_TRAINING_PROCESSES", "2")
    settings = load_settings()
    seen: list[Progress] = []
    first = stages.train(settings, dataset, "smoke", QUICK, seen.append)
    assert [now.step for now in seen] == [1, 2, 3, 4]
    assert sum("validation AP50" in message for message in caplog.messages) == 1
    with open_session(settings) as session:
        record = get_model(session, first["model_id"]).training
    assert record["peak_memory_mb"] > 100
    assert (record["processes"], record["images"]) == (2, 8)
    second = stages.train(settings, dataset, "smoke", QUICK, again=True)
    assert second["model_id"] == first["model_id"]


def test_a_lost_process_is_tried_again_from_the_checkpoint(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    monkeypatch.setenv("GUN_DETECTION_TRAINING_PROCESSES", "2")
    settings = load_settings()
    # More steps than are done until the processes notice.
    config = QUICK | {"checkpoint_minutes": 0, "max_steps": 12}
    done: list[int] = []

    def command(process: psutil.Process) -> list[str]:
        try:
            return process.cmdline()
        except psutil.NoSuchProcess:
            # Among the children are the servers with all that they start.
            return []

    def kill(now: Progress) -> None:
        done.append(now.step)
        if now.step == 3:
            commands = {
                child.pid: command(child) for child in psutil.Process().children(recursive=True)
            }
            workers = [
                pid
                for pid, words in commands.items()
                if "gun_detection.training.worker" in words and "torch.distributed.run" not in words
            ]
            os.kill(workers[-1], signal.SIGKILL)

    with pytest.raises(TransientError) as caught:
        stages.train(settings, dataset, "smoke", config, kill)
    assert caught.value.reason == "WORKER_LOST"
    seen: list[Progress] = []
    result = stages.train(settings, dataset, "smoke", config, seen.append)
    assert 3 <= seen[0].step <= done[-1] + 1
    assert any("went on from the checkpoint" in event for event in result["events"])


def test_what_a_worker_raises_is_raised(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    monkeypatch.setenv("GUN_DETECTION_TRAINING_PROCESSES", "2")
    config = QUICK | {"learning_rate": 1e30, "warmup_steps": 0, "clip_norm": None}
    with pytest.raises(TrainingError, match="lower the learning rate") as caught:
        stages.train(load_settings(), dataset, "smoke", config)
    assert caught.value.reason == "LOSS_NOT_FINITE"


def test_a_set_without_validation_pictures_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings.model_copy(update={"validation_share": 1e-9})
    with pytest.raises(DatasetError, match="validation split has 0 pictures") as caught:
        stages.ingest("synthetic:30", settings)
    assert caught.value.reason == "EMPTY_SPLIT"
    # As from elsewhere.
    monkeypatch.setattr(ingest, "_check_splits", lambda _: None)
    dataset = stages.ingest("synthetic:30", settings)["dataset_id"]
    with pytest.raises(DatasetError, match="0 to validate with, and guns are not in both"):
        stages.train(settings, dataset, "smoke", QUICK)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_what_a_new_process_may_mend_is_tried_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, dataset: str, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(train, "run", fail)
    with pytest.raises(TransientError, match="last checkpoint") as caught:
        stages.train(settings, dataset, "smoke", QUICK)
    assert caught.value.reason == "WORKER_LOST"
