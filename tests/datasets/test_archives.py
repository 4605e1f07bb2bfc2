import gzip
import io
import random
import stat
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gun_detection.datasets.archives import ExtractLimits, extract
from gun_detection.errors import DatasetError

FILES = {
    "guns/Images/1.jpeg": b"pixels",
    "guns/Images/2.jpeg": bytes(3 * 2**20),
    "guns/Labels/1.txt": b"0\n",
}


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.mkdir("guns")
        for name, data in files.items():
            file.writestr(name, data)
    return path


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def add_tar_member(path: Path, kind: bytes, target: str = "") -> Path:
    with tarfile.open(path, "w") as file:
        info = tarfile.TarInfo("member")
        info.type, info.linkname = kind, target
        file.addfile(info)
    return path


def add_zip_link(path: Path) -> Path:
    info = zipfile.ZipInfo("member")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(info, "/etc/passwd")
    return path


def encrypted_zip(path: Path) -> Path:
    make_zip(path, {"secret": b"x"})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.rfind(signature)
        data[at + offset] |= 1
    path.write_bytes(data)
    return path


def tar_header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("member")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def files_under(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("name", "make"), [("a.zip", make_zip), ("a.tar", make_tar), ("a.tgz", make_tar)]
)
def test_extract(tmp_path: Path, name: str, make: Callable[..., Path]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    extract(make(tmp_path / name, FILES), folder)
    assert files_under(folder) == FILES


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "a/" + "ü" * 128])
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_names_for_no_folder(tmp_path: Path, make: Callable[..., Path], name: str) -> None:
    folder = tmp_path / "box" / "out"
    folder.mkdir(parents=True)
    archive = make(tmp_path / "archive", {name: b"x"})
    with pytest.raises(DatasetError) as caught:
        extract(archive, folder)
    assert caught.value.reason == "UNSAFE_ARCHIVE"
    assert files_under(tmp_path) == {"archive": archive.read_bytes()}


@pytest.mark.parametrize(
    "make",
    [
        lambda path: add_tar_member(path, tarfile.SYMTYPE, "/etc/passwd"),
        lambda path: add_tar_member(path, tarfile.SYMTYPE, "inside"),
        lambda path: add_tar_member(path, tarfile.LNKTYPE, "inside"),
        lambda path: add_tar_member(path, tarfile.CHRTYPE),
        lambda path: add_tar_member(path, tarfile.FIFOTYPE),
        add_zip_link,
        encrypted_zip,
        lambda path: make_zip(path, {"a": b"1", "./a": b"2"}),
        lambda path: make_zip(path, {"a": b"1", "a/b": b"2"}),
    ],
    ids=[
        "symlink",
        "inner-symlink",
        "hardlink",
        "device",
        "fifo",
        "zip-symlink",
        "encrypted",
        "twice",
        "file-and-folder",
    ],
)
def test_members_that_are_refused(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(DatasetError) as caught:
        extract(make(tmp_path / "archive"), folder)
    assert caught.value.reason == "UNSAFE_ARCHIVE"
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_other_packing_methods_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("a", b"x")
    with pytest.raises(DatasetError) as caught:
        extract(tmp_path / "a.zip", tmp_path)
    assert caught.value.reason == "UNSAFE_ARCHIVE"


@pytest.mark.parametrize(
    ("limits", "files"),
    [
        (ExtractLimits(files=2), {"a": b"", "b": b"", "c": b""}),
        (ExtractLimits(total_bytes=1000), {"a": b"x" * 600, "b": b"x" * 600}),
        (ExtractLimits(ratio=10, ratio_from=1000), {"a": bytes(10**6)}),
    ],
    ids=["files", "bytes", "ratio"],
)
@pytest.mark.parametrize("suffix", [".zip", ".tgz"])
def test_limits(
    tmp_path: Path, suffix: str, limits: ExtractLimits, files: dict[str, bytes]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    make = make_zip if suffix == ".zip" else make_tar
    archive = make(tmp_path / f"a{suffix}", files)
    with pytest.raises(DatasetError) as caught:
        extract(archive, folder, limits)
    assert caught.value.reason == "UNSAFE_ARCHIVE"
    extract(archive, tmp_path / "fine")


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tgz"])
@pytest.mark.parametrize("cut", [3, 40, -30])
def test_damaged_archives(tmp_path: Path, suffix: str, cut: int) -> None:
    make = make_zip if suffix == ".zip" else make_tar
    archive = make(tmp_path / f"a{suffix}", {"a": bytes(range(256)) * 40, "b": b"x"})
    data = archive.read_bytes()
    # The end of a tar file is only padding.
    archive.write_bytes(data[:cut] if suffix != ".tar" or cut > 0 else data[:5000])
    with pytest.raises(DatasetError) as caught:
        extract(archive, tmp_path / "out")
    assert caught.value.reason == "BAD_ARCHIVE"


@pytest.mark.parametrize("suffix", [".zip", ".tgz"])
@pytest.mark.parametrize("at", [0.3, 0.5, 0.7])
def test_damaged_content(tmp_path: Path, suffix: str, at: float) -> None:
    make = make_zip if suffix == ".zip" else make_tar
    archive = make(tmp_path / f"a{suffix}", {"a": random.Random(0).randbytes(9000)})
    data = bytearray(archive.read_bytes())
    data[int(len(data) * at)] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(DatasetError) as caught:
        extract(archive, tmp_path / "out")
    assert caught.value.reason == "BAD_ARCHIVE"


def test_data_after_the_end_of_a_tar_file(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar", {"a": b"x"})
    with open(archive, "ab") as file:
        file.write(b"y" * 2**21)
    with pytest.raises(DatasetError, match="after its end"):
        extract(archive, tmp_path / "out")


LONG_NAME = tar_header(tarfile.GNUTYPE_LONGNAME, 512) + b"a" * 512
PAX_NUMBER = b"1" * 5000 + b" path=a\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar_header(tarfile.GNUTYPE_LONGNAME, 2**26) + bytes(2**26), "header in it has more"),
        (tar_header(tarfile.XHDTYPE, 2**26) + bytes(2**26), "header in it has more"),
        (tar_header(tarfile.XHDTYPE, -1024) + bytes(2**26), "header in it has more"),
        ((tar_header(tarfile.XHDTYPE, 2**19) + bytes(2**19)) * 100, "header in it has more"),
        (tar_header(tarfile.REGTYPE, -1024), "points back"),
        (LONG_NAME * 900, "damaged"),
        (tar_header(tarfile.XHDTYPE, len(PAX_NUMBER)) + PAX_NUMBER.ljust(5120), "damaged"),
    ],
    ids=["long-name", "pax", "to-the-end", "many", "back", "chain", "number"],
)
def test_headers_of_tar_files_are_limited(tmp_path: Path, data: bytes, message: str) -> None:
    archive = tmp_path / "a.tgz"
    archive.write_bytes(gzip.compress(data + bytes(10240)))
    tracemalloc.start()
    try:
        with pytest.raises(DatasetError, match=message):
            extract(archive, tmp_path / "out")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2**24


def test_headers_count_as_unpacked_and_are_not_kept(tmp_path: Path) -> None:
    record = b"40000 comment=".ljust(39999, b"x") + b"\n"
    header = tar_header(tarfile.XHDTYPE, len(record)) + record.ljust(40448, b"\0")
    folders = (header + tar_header(tarfile.DIRTYPE, 0)) * 600
    archive = tmp_path / "a.tgz"
    archive.write_bytes(gzip.compress(folders + bytes(10240)))
    tracemalloc.start()
    try:
        extract(archive, tmp_path / "out")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < len(folders) / 4
    with pytest.raises(DatasetError, match="unpacks to more") as caught:
        extract(archive, tmp_path / "out", ExtractLimits(total_bytes=2**20))
    assert caught.value.reason == "UNSAFE_ARCHIVE"


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_folders_count_as_files(tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"a{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for number in range(3):
                packed.mkdir(f"{number}")
    else:
        archive.write_bytes(tar_header(tarfile.DIRTYPE, 0) * 3 + bytes(1024))
    with pytest.raises(DatasetError, match="more than 2 files and folders") as caught:
        extract(archive, tmp_path / "out", ExtractLimits(files=2))
    assert caught.value.reason == "UNSAFE_ARCHIVE"
    extract(archive, tmp_path / "out", ExtractLimits(files=3))
