"""The doctor looks at everything, whatever is wrong."""

import sys
from pathlib import Path

import pytest

from gun_detection.doctor import examine
from gun_detection.settings import Settings


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
        {"database_url": url, "s3_endpoint_url": "localhost:8333", "home": tmp_path / "file" / "x"}
    )
    checks = examine(settings)
    assert [check.check for check in checks] == ["database", "storage", "detector", "disk"]
    assert not any(check.ok for check in checks)
    details = [check.detail for check in checks]
    for part, whole in zip(
        (detail, "localhost:8333", "ModuleNotFoundError", "NotADirectoryError"),
        details,
        strict=True,
    ):
        assert part in whole
    assert "hidden" not in "".join(details)
