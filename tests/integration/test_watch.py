"""Uploads to a watched bucket are scored without anybody asking."""

import time
from typing import Any

import pytest
from sqlalchemy import text

from gun_detection.database import open_session
from gun_detection.datasets.synthetic import upload_pictures
from gun_detection.storage import Storage
from tests.integration.conftest import WATCHED, RunningPlatform, kill

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(1800)]


def wait_for_outcomes(platform: RunningPlatform, prefix: str, number: int) -> None:
    deadline = time.monotonic() + 600
    statement = text("SELECT COUNT(*) FROM current_outcomes WHERE starts_with(key, :prefix)")
    while True:
        with open_session(platform.settings) as session:
            if session.scalar(statement, {"prefix": prefix}) == number:
                return
        assert time.monotonic() < deadline
        time.sleep(1)


def test_an_upload_is_scored_soon_and_once(
    platform: RunningPlatform, champion: dict[str, Any]
) -> None:
    storage = Storage(platform.settings)
    for picture in upload_pictures(3, seed=51):
        storage.put(WATCHED, f"soon/{picture.name}", picture.data)
    wait_for_outcomes(platform, "soon/", 3)
    with open_session(platform.settings) as session:
        [run_id] = session.scalars(
            text(
                "SELECT DISTINCT l.run_id FROM ledger l JOIN upload u ON u.id = l.upload_id "
                "WHERE u.bucket = :bucket"
            ),
            {"bucket": WATCHED},
        )
    assert "asset_triggered" in run_id


def test_what_is_uploaded_while_nothing_watches_is_found(
    platform: RunningPlatform, champion: dict[str, Any]
) -> None:
    kill(platform, "triggerer")
    picture = upload_pictures(1, seed=52)[0]
    Storage(platform.settings).put(WATCHED, "meanwhile/a.jpg", picture.data)
    wait_for_outcomes(platform, "meanwhile/", 1)
