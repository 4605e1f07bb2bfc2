"""Temporary folders of processes that live, end and are killed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from gun_detection import scratch as module
from gun_detection.scratch import scratch
from gun_detection.settings import Settings

_HOLD = """
import sys, time
from pathlib import Path
from gun_detection.scratch import scratch
from gun_detection.settings import Settings
with scratch(Settings(home=Path(sys.argv[1])), "other") as folder:
    (folder / "large").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_it_goes_with_its_block(tmp_path: Path) -> None:
    with scratch(Settings(home=tmp_path), "a") as one, scratch(Settings(home=tmp_path), "a") as two:
        assert one != two
        assert one.parent == two.parent == tmp_path / "tmp"
        (one / "file").write_bytes(b"x")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_YOUNG", 0.0)
    settings = Settings(home=tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        folder = Path(other.stdout.readline().strip())
        with scratch(settings, "mine"):
            assert (folder / "large").exists()
        other.kill()
        other.wait()
        assert folder.exists()
        with scratch(settings, "mine") as mine:
            assert list((tmp_path / "tmp").iterdir()) == [mine]


def test_a_young_folder_may_not_be_locked_yet(tmp_path: Path) -> None:
    young = tmp_path / "tmp" / "other-x"
    young.mkdir(parents=True)
    with scratch(Settings(home=tmp_path), "mine"):
        assert young.exists()
    assert time.time() - young.stat().st_ctime < module._YOUNG
