import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from embedded.config import REPOSITORY
from gun_detection.errors import NotFoundError, SettingsError
from gun_detection.settings import load_settings
from gun_detection.training.config import (
    PRESETS,
    parse_override,
    read_recipe,
    recipe_table,
    resolve_config,
)


def test_overrides_go_over_settings_go_over_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUN_DETECTION_TRAINING_PRESET", "gpu")
    monkeypatch.setenv("GUN_DETECTION_ARCHITECTURE", "resnet50_fpn_v2")
    config = resolve_config(load_settings(), None, {"epochs": 3, "detector.max_size": 640})
    assert config.detector.architecture == "resnet50_fpn_v2"
    assert (config.epochs, config.detector.max_size) == (3, 640)
    assert config.batch_size == PRESETS["gpu"].batch_size


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("fast", {}, "choose from smoke, demo, cpu, gpu, seed"),
        ("cpu", {"epoch": 3}, "'epoch'"),
        ("cpu", {"detector.depth": 3}, "'detector.depth'"),
        ("cpu", {"epochs.deep": 3}, "'epochs.deep'"),
        ("cpu", {"epochs": 0}, "epochs"),
        ("cpu", {"detector.architecture": "yolo"}, "resnet18_fpn"),
        ("cpu", {"micro_batch": 100}, "micro_batch is larger than batch_size"),
        ("cpu", {"augmentation.scales": []}, "scales"),
        ("cpu", {"target.kind": "luck"}, "target.kind"),
    ],
)
def test_a_wrong_value_is_named(preset: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        resolve_config(load_settings(), preset, overrides)


def test_equal_recipes_have_equal_hashes() -> None:
    settings = load_settings()
    same = resolve_config(settings, "cpu", {"epochs": PRESETS["cpu"].epochs})
    assert same.hash() == PRESETS["cpu"].hash()
    assert resolve_config(settings, "cpu", {"seed": 1}).hash() != same.hash()


def test_weights_of_a_file_count_by_what_they_are(tmp_path: Path) -> None:
    settings, file = load_settings(), tmp_path / "weights.pth"
    overrides = {"initial_weights": str(file)}
    with pytest.raises(NotFoundError, match="no weights at"):
        resolve_config(settings, "cpu", overrides)
    hashes = set()
    for data in (b"some", b"others"):
        file.write_bytes(data)
        config = resolve_config(settings, "cpu", overrides)
        assert config.initial_weights_sha256 == hashlib.sha256(data).hexdigest()
        hashes |= {config.hash(), resolve_config(settings, "cpu", overrides).hash()}
    assert len(hashes) == 2
    assert PRESETS["cpu"].initial_weights_sha256 is None


def test_without_a_file_the_hash_is_that_of_the_other_values() -> None:
    values = json.loads(PRESETS["gpu"].model_dump_json())
    del values["initial_weights_sha256"]
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
    assert PRESETS["gpu"].hash() == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs=3", 3),
        ("learning_rate=0.01", 0.01),
        ("augmentation.flip=0", 0),
        ("clip_norm=", None),
    ],
)
def test_an_override_has_the_type_that_it_looks_like(text: str, expected: object) -> None:
    assert parse_override(text)[1] == expected


def test_the_documentation_is_current() -> None:
    command = [sys.executable, "-m", "gun_detection.training.config"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert Path(REPOSITORY, "docs", "recipes.md").read_text() == printed, "run `make docs`"


def test_every_value_of_a_recipe_is_described() -> None:
    assert all(line.split("|")[2].strip() for line in recipe_table().splitlines())


@pytest.mark.parametrize("text", ["epochs", "=3", ""])
def test_what_is_no_override_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="key=value"):
        parse_override(text)


@pytest.mark.parametrize("text", ["epochs=[", "epochs=a: b: c"])
def test_a_value_that_is_no_yaml_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="epochs"):
        parse_override(text)


def test_a_recipe_is_a_file_or_a_part_of_one(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("epochs: 3\naugmentation: {flip: 0.1, crop: 0}\n")
    expected = {"epochs": 3, "augmentation.flip": 0.1, "augmentation.crop": 0}
    assert read_recipe(str(file)) == expected
    file.write_text("train: {preset: cpu, recipe: {epochs: 3, augmentation: {flip: 0.1, crop: 0}}}")
    assert read_recipe(f"{file}:train.recipe") == expected
    file.write_text("train: {recipe: }")
    assert read_recipe(f"{file}:train.recipe") == {}


@pytest.mark.parametrize(
    ("text", "part", "message"),
    [
        (None, "", "there is no recipe"),
        ("a: [", "", "not readable"),
        ("epochs", "", "not a mapping"),
        ("train: {preset: cpu}", ":train.recipe", "has no 'train.recipe'"),
        ("train: 3", ":train.recipe", "has no 'train.recipe'"),
    ],
)
def test_what_is_no_recipe_is_refused(
    text: str | None, part: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SettingsError, match=message):
        read_recipe(f"{file}{part}")
