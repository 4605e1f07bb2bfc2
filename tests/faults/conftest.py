"""Runs to disturb, made as in the tests of scoring, and what has to come of each."""

import sys
from collections.abc import Callable

import numpy as np
import pytest

from embedded.config import REPOSITORY
from gun_detection.images import DecodeLimits, decode
from gun_detection.scoring import supervise
from gun_detection.scoring.plan import Plan
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.scoring.conftest import champion, count, engine, picture, plan, rows, surveyed, upload
from tests.scoring.simulated import found

__all__ = ["champion", "engine", "plan", "surveyed"]

PICTURES = 90


@pytest.fixture(scope="session")
def pictures() -> dict[str, bytes]:
    """Different pictures, two copies, and one that is none."""
    made = {f"n{seed:02}": picture(seed) for seed in range(PICTURES - 3)}
    return made | {"copy": made["n00"], "twin": made["n01"], "words": b"words"}


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervised process is the one of `driver`."""

    def command(shard_id: int, *, take_over: bool) -> list[str]:
        module = [sys.executable, "-m", "tests.faults.driver", str(shard_id)]
        return [*module, "--take-over"] if take_over else module

    monkeypatch.setattr(supervise, "_command", command)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def shard(
    drive: None,
    plan: Callable[..., Plan],
    settings: Settings,
    storage: Storage,
    pictures: dict[str, bytes],
) -> int:
    upload(storage, settings, **pictures)
    [shard_id] = plan().shard_ids
    return shard_id


def check(settings: Settings, pictures: dict[str, bytes]) -> None:
    """Exactly one outcome for each, and the detections of an undisturbed run."""
    limits = DecodeLimits.from_settings(settings)
    expected = {
        f"{name}.jpg": found(decode(data, limits).pixels)
        for name, data in pictures.items()
        if name != "words"
    }
    stored = rows(
        settings,
        "SELECT u.key, l.outcome, d.x1, d.y1, d.x2, d.y2, d.score FROM upload u "
        "JOIN ledger l ON l.upload_id = u.id LEFT JOIN detection d ON d.ledger_id = l.id "
        "ORDER BY u.key, d.id",
    )
    assert rows(settings, "SELECT COUNT(*), COUNT(DISTINCT upload_id) FROM ledger") == [
        (len(pictures), len(pictures))
    ]
    for key, detections in expected.items():
        mine = [row[2:] for row in stored if row[0] == key and row[2] is not None]
        table = np.array(mine, np.float32).reshape(-1, 5)
        assert np.array_equal(table[:, :4], detections.boxes), key
        assert np.array_equal(table[:, 4], detections.scores), key
    assert [row[1] for row in stored if row[0] == "words.jpg"] == ["quarantined"]
    assert count(settings, "unscored_uploads") == 0
