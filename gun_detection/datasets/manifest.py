"""A data set version: which images with which boxes, and the split of each.

The manifest is JSON Lines, sorted by sha256, and its own sha256 is the version's id. The images
themselves lie in the data bucket under their sha256, once for all versions.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gun_detection.datasets.groups import Placement, Split
from gun_detection.errors import DatasetError
from gun_detection.storage import Storage

_HEADER = {"format": "gun-detection-manifest", "version": 1}

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Entry:
    """One image: `size` in bytes, `width` and `height` upright in pixels, `boxes` xyxy inside it.

    `name` is the sample's path in its source, `phash` 16 hexadecimal digits.
    """

    sha256: str
    size: int
    width: int
    height: int
    boxes: tuple[Box, ...]
    name: str
    phash: str
    group: str
    split: Split

    def box_array(self) -> npt.NDArray[np.float32]:
        """The boxes as float32 of shape (N, 4), also for N = 0."""
        return np.array(self.boxes, np.float32).reshape(-1, 4)

    @property
    def placement(self) -> Placement:
        return Placement(int(self.phash, 16), self.group, self.split)

    def line(self) -> bytes:
        return _line(asdict(self))


@dataclass(frozen=True)
class Manifest:
    """The entries in order of their sha256."""

    entries: tuple[Entry, ...]

    @cached_property
    def id(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @cached_property
    def holdout_id(self) -> str:
        """The same for two versions only if their holdouts are the same, boxes included."""
        lines = b"".join(entry.line() for entry in self.split("holdout"))
        return hashlib.sha256(lines).hexdigest()

    def split(self, split: Split) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.split == split)

    def to_bytes(self) -> bytes:
        return _line(_HEADER) + b"".join(entry.line() for entry in self.entries)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Raises `DatasetError` for another format or version of manifests."""
        lines = data.splitlines()
        if not lines or lines[0] + b"\n" != _line(_HEADER):
            raise DatasetError(
                "this is not a manifest that this version of gun-detection reads",
                reason="BAD_MANIFEST",
            )
        return cls(tuple(_entry(json.loads(line)) for line in lines[1:]))


def _line(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


def _entry(content: dict[str, object]) -> Entry:
    boxes = content.pop("boxes")
    assert isinstance(boxes, list)
    return Entry(**content, boxes=tuple(tuple(box) for box in boxes))  # type: ignore[arg-type]


def source_of(entry: Entry) -> str:
    """The top folder of its path: data sets that are put together have one for each."""
    return entry.name.partition("/")[0] if "/" in entry.name else ""


def image_key(sha256: str) -> str:
    return f"images/{sha256[:2]}/{sha256}"


def manifest_key(dataset_id: str) -> str:
    return f"datasets/{dataset_id}/manifest.jsonl"


def report_key(dataset_id: str) -> str:
    return f"datasets/{dataset_id}/report.json"


def html_report_key(dataset_id: str) -> str:
    return f"datasets/{dataset_id}/report.html"


def load_manifest(storage: Storage, bucket: str, dataset_id: str) -> Manifest:
    """Raises `NotFoundError` for an unknown id, `DatasetError` (`SHA256_MISMATCH`) for bytes that
    do not belong to it.
    """
    data = storage.get(bucket, manifest_key(dataset_id))
    found = hashlib.sha256(data).hexdigest()
    if found != dataset_id:
        raise DatasetError(
            f"the manifest of data set {dataset_id} has sha256 {found}: it was changed or damaged; "
            f"restore s3://{bucket}/{manifest_key(dataset_id)} from a backup; ingesting cannot "
            "make it anew, as it keeps pictures in the splits that this file names",
            reason="SHA256_MISMATCH",
        )
    return Manifest.from_bytes(data)
