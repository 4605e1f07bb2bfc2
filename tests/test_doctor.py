"""The doctor looks at everything, whatever is wrong."""

import sys
from pathlib import Path

import pytest

from gun_detection.doctor import Check, examine
from gun_detection.release.policy import NAMES
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from gun_detection.training.config import PRESETS


@pytest.mark.parametrize(
    ("url", "detail"),
    [
        ("postgres://user:hidden@127.0.0.1:9/name", "PostgreSQL at 127.0.0.1:9"),
        ("postgresql+psycopg2://user:hid/den@a:hidden@host/name", "GUN_DETECTION_DATABASE_URL"),
        ("hidden", "GUN_DETECTION_DATABASE_URL"),
    ],
)
def test_what_is_wrong_hides_no_other_check_and_shows_no_password(
    url: str, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    settings = Settings.model_validate(
        {
            "database_url": url,
            "s3_endpoint_url": "localhost:8333",
            "home": tmp_path / "file" / "x",
            "gate_policy": "standart",
            "training_preset": "fast",
        }
    )
    checks = examine(settings)
    names = ["database", "storage", "uploads", "policy", "recipe", "detector", "disk"]
    assert [check.check for check in checks] == names
    assert not any(check.ok for check in checks)
    details = [check.detail for check in checks]
    said = (
        detail,
        "localhost:8333",
        "localhost:8333",
        f"no gate policy 'standart': choose from {', '.join(NAMES)}",
        f"unknown training preset 'fast': choose from {', '.join(PRESETS)}",
        "ModuleNotFoundError",
        "NotADirectoryError",
    )
    for part, whole in zip(said, details, strict=True):
        assert part in whole
    assert "hidden" not in "".join(details)


def look_at(name: str, settings: Settings) -> Check:
    [check] = [check for check in examine(settings) if check.check == name]
    return check


def test_buckets_of_uploads_that_do_not_exist_are_named(
    settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    bucket = settings.uploads_bucket
    assert look_at("uploads", settings) == Check("uploads", True, f"in {bucket}")
    elsewhere = settings.model_copy(update={"uploads_bucket": "nowhere"})
    check = look_at("uploads", elsewhere)
    assert not check.ok
    assert "nowhere; create them, or name others in GUN_DETECTION_UPLOADS_BUCKET" in check.detail

    file = tmp_path / "sources.yaml"
    file.write_text(f"buckets: [{{bucket: doors}}, {{bucket: {bucket}}}, {{bucket: gates}}]")
    check = look_at("uploads", settings.model_copy(update={"sources_file": file}))
    assert not check.ok
    assert "exist: doors, gates;" in check.detail
    assert "GUN_DETECTION_SOURCES_FILE" in check.detail


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("buckets: [{bucket: a, prefx: b}]", "buckets.0.prefx: Extra inputs"),
        ("buckets: [", "cannot be read: while parsing"),
    ],
)
def test_a_wrong_file_of_sources_is_found(
    settings: Settings, tmp_path: Path, content: str | None, said: str
) -> None:
    file = tmp_path / "sources.yaml"
    if content is not None:
        file.write_text(content)
    check = look_at("uploads", settings.model_copy(update={"sources_file": file}))
    assert not check.ok
    assert said in check.detail
    assert check.detail.isprintable()


def test_the_data_bucket_is_made_later(settings: Settings) -> None:
    assert "is there" in look_at("storage", settings).detail
    check = look_at("storage", settings.model_copy(update={"data_bucket": "tomorrow"}))
    assert check.ok
    assert "tomorrow is still to be made, by the first ingest" in check.detail
