import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from embedded.config import REPOSITORY
from gun_detection.errors import SettingsError
from gun_detection.settings import Settings, load_settings, settings_table


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"GUN_DETECTION_SCORE_FLOR": "0.1"}, "GUN_DETECTION_SCORE_FLOR"),
        ({"GUN_DETECTION_S3_ACCESS_KEY_ID": "me"}, "GUN_DETECTION_S3_SECRET_ACCESS_KEY"),
        ({"GUN_DETECTION_S3_SECRET_ACCESS_KEY": "x"}, "GUN_DETECTION_S3_ACCESS_KEY_ID"),
        ({"GUN_DETECTION_MAX_IMAGE_PIXELS": "many"}, "GUN_DETECTION_MAX_IMAGE_PIXELS"),
        ({"GUN_DETECTION_LOG_LEVEL": "loud"}, "GUN_DETECTION_LOG_LEVEL"),
        ({"GUN_DETECTION_WORKER_COST_PER_HOUR": "inf"}, "GUN_DETECTION_WORKER_COST_PER_HOUR"),
        ({"GUN_DETECTION_DATA_BUCKET": "uploads"}, "GUN_DETECTION_UPLOADS_BUCKET"),
        (
            {"GUN_DETECTION_VALIDATION_SHARE": "0.5", "GUN_DETECTION_HOLDOUT_SHARE": "0.5"},
            "GUN_DETECTION_HOLDOUT_SHARE",
        ),
    ],
)
def test_a_wrong_variable_is_named(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=named):
        load_settings()


def test_no_duration_is_endless() -> None:
    ends = ("_HOURS", "_MINUTES", "_SECONDS", "_TIMEOUT")
    durations = [name.upper() for name in Settings.model_fields if name.upper().endswith(ends)]
    assert "LATE_HOURS" in durations
    for name, value in itertools.product(durations, ("inf", "nan", "1000000000000")):
        with pytest.raises(SettingsError, match=name):
            load_settings({f"GUN_DETECTION_{name}": value})


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(f"GUN_DETECTION_{name.upper()}", "")
    assert load_settings() == Settings() == Settings.model_construct()


def test_another_environment_wins_over_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUN_DETECTION_UPLOADS_BUCKET", "mine")
    monkeypatch.setenv("GUN_DETECTION_WATCH_SECOND", "5")
    assert load_settings({"GUN_DETECTION_UPLOADS_BUCKET": "theirs"}).uploads_bucket == "theirs"
    for name, value in (
        ("WATCH_SECOND", "5"),
        ("WATCH_SECONDS", "often"),
        ("WATCH_SECONDS", "7200"),
    ):
        with pytest.raises(SettingsError, match=f"GUN_DETECTION_{name}"):
            load_settings({f"GUN_DETECTION_{name}": value})


def test_secrets_are_in_neither_messages_nor_representations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GUN_DETECTION_S3_SECRET_ACCESS_KEY", "hunter2")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    monkeypatch.setenv("GUN_DETECTION_S3_ACCESS_KEY_ID", "me")
    assert "hunter2" not in str(caught.value) + repr(load_settings())


def test_every_setting_is_documented() -> None:
    table = settings_table()
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert f"`GUN_DETECTION_{name.upper()}`" in table


def test_the_documentation_is_current() -> None:
    command = [sys.executable, "-m", "gun_detection.settings"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert Path(REPOSITORY, "docs", "settings.md").read_text() == printed, "run `make docs`"
