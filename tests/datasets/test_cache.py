import os
import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from gun_detection.datasets import cache
from gun_detection.datasets.cache import PixelCache, shrink
from gun_detection.settings import Settings

NAME = "ab" * 32
PICTURE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


class Decoder:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> np.ndarray:
        self.calls += 1
        return PICTURE


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "pixels"


def open_cache(folder: Path, side: int = 100, gigabytes: float = 1.0) -> PixelCache:
    return PixelCache(Settings(home=folder, pixel_cache_gb=gigabytes), side)


def test_a_picture_is_decoded_once(tmp_path: Path, files: Path) -> None:
    decode = Decoder()
    for _ in range(3):
        assert (open_cache(tmp_path).get(NAME, decode) == PICTURE).all()
    assert decode.calls == 1
    assert len(list(files.rglob("*.npy"))) == 1


def test_large_pictures_are_kept_small(tmp_path: Path) -> None:
    assert open_cache(tmp_path, side=30).get(NAME, Decoder()).shape == (20, 30, 3)
    assert shrink(PICTURE, 60) is PICTURE
    assert shrink(np.zeros((1000, 3, 3), np.uint8), 100).shape == (100, 1, 3)


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_file_is_made_anew(tmp_path: Path, files: Path, damage: bytes | None) -> None:
    open_cache(tmp_path).get(NAME, Decoder())
    [file] = files.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:200] if damage is None else damage)
    decode = Decoder()
    assert (open_cache(tmp_path).get(NAME, decode) == PICTURE).all()
    assert decode.calls == 1


def test_a_full_cache_takes_in_no_more(tmp_path: Path, files: Path) -> None:
    small = open_cache(tmp_path, gigabytes=10_000e-9)
    small.get("aa" * 32, Decoder())
    small.get("bb" * 32, Decoder())
    assert [file.stem for file in files.rglob("*.npy")] == ["aa" * 32]
    again = open_cache(tmp_path, gigabytes=10_000e-9)
    again.get("bb" * 32, Decoder())
    assert len(list(files.rglob("*.npy"))) == 1


def test_what_nobody_reads_any_more_makes_room(tmp_path: Path, files: Path) -> None:
    month_ago = time.time() - 31 * 86400
    for side, name in ((50, "aa" * 32), (100, "bb" * 32), (100, "cc" * 32)):
        open_cache(tmp_path, side=side).get(name, Decoder())
    made = {file.stem[:2]: file for file in files.rglob("*.npy")}
    for name in ("aa", "bb"):
        os.utime(made[name], (month_ago, month_ago))
    # Read since, as the file system says.
    os.utime(made["bb"], (time.time(), month_ago))
    open_cache(tmp_path)
    assert {file.stem[:2] for file in files.rglob("*.npy")} == {"bb", "cc"}


class Reading(Dataset[int]):
    """Pictures of 7,200 bytes, each of which is kept where there is room."""

    def __init__(self, opened: PixelCache) -> None:
        self.opened = opened

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        return self.opened.get(f"{index:064}", Decoder()).nbytes


def test_processes_share_the_room(tmp_path: Path, files: Path) -> None:
    """100,000 bytes are room for 13 pictures: for 6 of each of two processes that begin together.

    One that begins when the other has kept n of its 6 has half of what is left, room for 6 - n/2.
    """
    opened = open_cache(tmp_path, gigabytes=1e-4)
    for _ in range(3):
        assert sum(DataLoader(Reading(opened), batch_size=None, num_workers=2)) == 40 * 7200
        assert sum(file.stat().st_size for file in files.rglob("*.npy")) <= 100_000
    assert 9 <= len(list(files.rglob("*.npy"))) <= 13
    # Files of another size count as well.
    open_cache(tmp_path, side=50, gigabytes=1e-4).get("ee" * 32, Decoder())
    open_cache(tmp_path, side=50, gigabytes=1e-4).get("ff" * 32, Decoder())
    assert sum(file.stat().st_size for file in files.rglob("*.npy")) <= 100_000


def test_copies_leave_the_disk_some_room(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_RESERVE", 2**60)
    assert (open_cache(tmp_path).get(NAME, Decoder()) == PICTURE).all()
    assert not list(files.rglob("*.npy"))


def test_a_full_disk_only_means_that_nothing_is_kept(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_whole", full)
    decode = Decoder()
    opened = open_cache(tmp_path)
    assert (opened.get(NAME, decode) == PICTURE).all()
    assert (opened.get(NAME, decode) == PICTURE).all()
    assert decode.calls == 2
    assert not list(files.rglob("*.npy"))
