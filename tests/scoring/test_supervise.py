"""The environment of the process that scores a shard."""

from pathlib import Path

import pytest

from gun_detection.scoring.supervise import _environment
from gun_detection.settings import Settings

ONE = "GPU 0: NVIDIA H200 (UUID: GPU-a)"
TWO = f"{ONE}\nGPU 1: NVIDIA H200 (UUID: GPU-b)"
# The second is split.
MIG = f"""{TWO}
  MIG 3g.71gb     Device  0: (UUID: MIG-c)
  MIG 3g.71gb     Device  1: (UUID: MIG-d)"""
LOST = f"""{TWO}
Unable to determine the device handle for gpu 0000:0A:00.0: Unknown Error"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program that lists GPUs; nobody says which of them are to be seen."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "nvidia-smi"


def visible(driver: Path, answer: str, code: int = 0) -> list[str | None]:
    """What four shards in a row are to see."""
    driver.write_text(f"#!/bin/sh\necho '{answer}'\nexit {code}\n")
    driver.chmod(0o755)
    shards = range(6, 10)
    return [_environment(Settings(), shard).get("CUDA_VISIBLE_DEVICES") for shard in shards]


def test_shards_of_the_same_time_are_scored_on_different_gpus(driver: Path) -> None:
    assert visible(driver, TWO) == ["GPU-a", "GPU-b"] * 2
    assert visible(driver, MIG) == ["GPU-a", "MIG-c", "MIG-d", "GPU-a"]
    assert visible(driver, LOST, code=15) == ["GPU-a", "GPU-b"] * 2


def test_one_gpu_or_none_is_left_to_be_found(driver: Path) -> None:
    assert visible(driver, ONE) == [None] * 4
    assert visible(driver, "No devices were found") == [None] * 4
    assert visible(driver, "NVIDIA-SMI has failed", code=9) == [None] * 4
    driver.unlink()
    assert "CUDA_VISIBLE_DEVICES" not in _environment(Settings(), 1)


@pytest.mark.parametrize("chosen", ["", "1", "0,1"])
def test_a_choice_of_gpus_is_kept(
    driver: Path, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible(driver, TWO) == [chosen] * 4
