"""Unpacking archives that nobody vouches for: only regular files, only inside the folder, capped.

An archive with anything else in it is refused as a whole with reason `UNSAFE_ARCHIVE`.
"""

import gzip
import io
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from gun_detection.errors import DatasetError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_CHUNK = 2**20
# A file of a tar archive brings a header, a header for a long name and padding to whole blocks.
_TAR_OVERHEAD = 4096
# The last two are what `tarfile` makes of numbers and chains of headers without an end.
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    ValueError,
    RecursionError,
)

_LONGEST_NAME = 255

Member = tuple[str, IO[bytes] | None]


@dataclass(frozen=True)
class ExtractLimits:
    """Most files and folders, most bytes when unpacked, and most of them for each packed byte.

    The ratio is not looked at below `ratio_from` bytes: small text packs very well.
    """

    files: int = 1_000_000
    total_bytes: int = 50 * 2**30
    ratio: float = 100.0
    ratio_from: int = 64 * 2**20


def is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def extract(archive: Path, folder: Path, limits: ExtractLimits | None = None) -> None:
    """Unpack a zip or tar[.gz] into an empty folder, file by file.

    Raises `DatasetError` with reason `UNSAFE_ARCHIVE` for a member that is a link, a device or
    outside the folder and for an archive over the limits, `BAD_ARCHIVE` for a damaged one.
    """
    budget = _Budget(limits or ExtractLimits(), archive.stat().st_size)
    try:
        with open(archive, "rb") as file:
            magic = file.read(4)
        members = _zip_members if magic[:2] == b"PK" else _tar_members
        for name, content in members(archive, folder, budget):
            budget.add_file()
            if content is not None:
                _write(folder.joinpath(*_safe_parts(name)), content, budget)
    except _DAMAGE as error:
        raise DatasetError(
            f"{archive.name} is damaged or not a zip or tar archive ({error}): make it again",
            reason="BAD_ARCHIVE",
        ) from error


class _Budget:
    def __init__(self, limits: ExtractLimits, archive_bytes: int) -> None:
        self._limits = limits
        self._files = 0
        self._bytes = 0
        self._most = min(
            limits.total_bytes, max(limits.ratio_from, int(limits.ratio * archive_bytes))
        )

    def add_file(self) -> None:
        self._files += 1
        if self._files > self._limits.files:
            raise _unsafe(f"it holds more than {self._limits.files} files and folders")

    def add_bytes(self, count: int) -> None:
        self._bytes += count
        self._check(self._bytes)

    def reach(self, position: int) -> None:
        """Come so far in the unpacked stream, headers and what is skipped included."""
        self._check(position - _TAR_OVERHEAD * (self._files + 1))

    def _check(self, count: int) -> None:
        if count > self._most:
            raise _unsafe(f"it unpacks to more than {self._most} bytes")


def _unsafe(why: str) -> DatasetError:
    return DatasetError(
        f"the archive is refused: {why}; unpack it yourself, check it and give the folder",
        reason="UNSAFE_ARCHIVE",
    )


def _safe_parts(name: str) -> tuple[str, ...]:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise _unsafe(f"{name[:100]!r} is outside the folder")
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        raise _unsafe(f"{name[:100]!r}… is longer than file systems allow")
    return path.parts


def _zip_members(archive: Path, folder: Path, budget: _Budget) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir():
                _safe_parts(info.filename)
                yield info.filename, None
                continue
            if kind not in (0, stat.S_IFREG):
                raise _unsafe(f"{info.filename[:100]!r} is not a regular file")
            if info.flag_bits & 1:
                raise _unsafe(f"{info.filename[:100]!r} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _unsafe(f"{info.filename[:100]!r} is packed by a method other than deflate")
            with file.open(info) as content:
                yield info.filename, content


def _tar_members(archive: Path, folder: Path, budget: _Budget) -> Iterator[Member]:
    with open(archive, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(archive) if packed else open(archive, "rb") as stream:
        metered = _Metered(stream, budget)
        with tarfile.open(fileobj=cast("IO[bytes]", metered), mode="r:") as file:
            for info in file:
                metered.header_bytes = None
                yield info.name, _tar_content(file, info, folder)
                # tarfile would keep every member, and every global header, to the end.
                file.members, file.pax_headers = [], {}  # type: ignore[attr-defined]
                metered.header_bytes = 0
        # Only the end of a gzip stream has its checksum; a tar file ends in some padding.
        if len(stream.read(_CHUNK)) == _CHUNK:
            raise _unsafe("there is more after its end")


class _Metered:
    """What `tarfile` needs of an unpacked stream, within limits.

    `tarfile` reads a header of any size at once, and keeps those that come before one member.
    `header_bytes` counts them, and is None while the content of a file is read.
    """

    def __init__(self, stream: gzip.GzipFile | io.BufferedReader, budget: _Budget) -> None:
        self._stream = stream
        self._budget = budget
        self.header_bytes: int | None = 0

    def read(self, size: int) -> bytes:
        if self.header_bytes is not None:
            self.header_bytes += size
        if size < 0 or max(size, self.header_bytes or 0) > _CHUNK:
            raise _unsafe(f"a header in it has more than {_CHUNK} bytes")
        data = self._stream.read(size)
        self._budget.reach(self.tell())
        return data

    def seek(self, position: int) -> None:
        if position < self.tell():
            raise _unsafe("a header in it points back")
        self._budget.reach(position)
        self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()


def _tar_content(file: tarfile.TarFile, info: tarfile.TarInfo, folder: Path) -> IO[bytes] | None:
    try:
        tarfile.data_filter(info, str(folder))
    except tarfile.FilterError as error:
        raise _unsafe(str(error)[:200]) from error
    if info.isdir():
        return None
    content = file.extractfile(info) if info.isreg() else None
    if content is None:
        raise _unsafe(f"{info.name[:100]!r} is not a regular file")
    return content


def _write(target: Path, content: IO[bytes], budget: _Budget) -> None:
    if target.exists():
        raise _unsafe(f"{target.name[:100]!r} is in it twice")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as file:
            while chunk := content.read(_CHUNK):
                budget.add_bytes(len(chunk))
                file.write(chunk)
    except (FileExistsError, NotADirectoryError):
        raise _unsafe(f"{target.name[:100]!r} is a file and a folder in it") from None
