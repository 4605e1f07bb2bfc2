"""A tree of files to read from: a local folder or a prefix of a bucket.

`paths` are relative, with `/`, in order; hidden files and what operating systems leave behind
are not in it. Reading raises `ImageError` for a file that is too large or gone.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gun_detection.errors import DatasetError, ImageError, NotFoundError, TerminalError
from gun_detection.storage import Storage


class Tree(Protocol):
    @property
    def paths(self) -> list[str]: ...

    def read(self, path: str, max_bytes: int) -> bytes: ...


@dataclass(frozen=True)
class FolderTree:
    root: Path
    paths: list[str]

    def read(self, path: str, max_bytes: int) -> bytes:
        try:
            with open(self.root / path, "rb") as file:
                data = file.read(max_bytes + 1)
        except FileNotFoundError:
            raise _gone(path) from None
        except OSError as error:
            raise ImageError(
                f"{path} cannot be read ({error.strerror})", reason="UNREADABLE"
            ) from error
        if len(data) > max_bytes:
            raise _too_large(path, max_bytes)
        return data


@dataclass(frozen=True)
class BucketTree:
    storage: Storage
    bucket: str
    prefix: str
    paths: list[str]

    def read(self, path: str, max_bytes: int) -> bytes:
        try:
            return self.storage.get(self.bucket, self.prefix + path, max_bytes=max_bytes)
        except NotFoundError:
            raise _gone(path) from None
        except TerminalError as error:
            if error.reason != "TOO_LARGE":
                raise
            raise _too_large(path, max_bytes) from None


def open_folder(root: Path) -> FolderTree:
    """All regular files under a folder; raises `NotFoundError` when it is not there."""
    if not root.is_dir():
        raise NotFoundError(f"the folder {root} does not exist: check the data set source")
    found = []
    for folder, _, files in os.walk(root, onerror=_refuse):
        base = Path(folder).relative_to(root)
        found += [(base / name).as_posix() for name in files if (Path(folder) / name).is_file()]
    return FolderTree(root, _visible(found))


def open_prefix(storage: Storage, bucket: str, prefix: str) -> BucketTree:
    """All objects under a prefix, which is read as a folder."""
    if prefix and not prefix.endswith("/"):
        prefix += "/"
    listed = storage.list_objects(bucket, prefix)
    return BucketTree(
        storage, bucket, prefix, _visible(item.key.removeprefix(prefix) for item in listed)
    )


def _refuse(error: OSError) -> None:
    # Without this a folder that may not be listed would silently be an empty one.
    raise DatasetError(
        f"{error.filename} cannot be listed ({error.strerror}): check its rights"
    ) from error


def _visible(paths: Iterable[str]) -> list[str]:
    return sorted(
        path
        for path in paths
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))
    )


def _gone(path: str) -> ImageError:
    return ImageError(f"{path} disappeared while the data set was read", reason="MISSING_IMAGE")


def _too_large(path: str, max_bytes: int) -> ImageError:
    return ImageError(f"{path} has more than {max_bytes} bytes", reason="TOO_LARGE")
