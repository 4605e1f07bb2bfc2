"""Local copies follow use and not history."""

import os
import time
from pathlib import Path

import pytest

from gun_detection.release import copies
from gun_detection.release.copies import make_room, note_use
from gun_detection.settings import Settings

HOUR = 3600.0


@pytest.fixture
def make(tmp_path: Path) -> list[Path]:
    """Six copies of 100 bytes; each was used an hour before the next, the last now."""
    made = []
    for number in range(6):
        path = tmp_path / "cache" / ("models", "engines")[number % 2] / f"{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100)
        used = time.time() - HOUR * (5 - number)
        os.utime(path, (used, used))
        made.append(path)
    return made


def left(made: list[Path]) -> list[int]:
    return [number for number, path in enumerate(made) if path.exists()]


def test_those_used_longest_ago_go(
    tmp_path: Path, make: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_MOST_BYTES", 300)
    note_use(make[0])
    make_room(Settings(home=tmp_path))
    assert left(make) == [0, 4, 5]
    make_room(Settings(home=tmp_path))
    assert left(make) == [0, 4, 5]


def test_what_was_just_used_stays(
    tmp_path: Path, make: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_MOST_BYTES", 0)
    make_room(Settings(home=tmp_path))
    assert left(make) == [5]


def test_nothing_goes_where_there_is_room(tmp_path: Path, make: list[Path]) -> None:
    make_room(Settings(home=tmp_path))
    assert left(make) == [0, 1, 2, 3, 4, 5]
