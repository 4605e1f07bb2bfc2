"""The images of a split as a PyTorch data set, through a local cache of their bytes."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from gun_detection.datasets.cache import PixelCache, keep
from gun_detection.datasets.groups import Split
from gun_detection.datasets.manifest import Entry, Manifest, image_key
from gun_detection.errors import DatasetError, GunDetectionError
from gun_detection.images import DecodeLimits, decode
from gun_detection.settings import Settings
from gun_detection.storage import Storage

Target = dict[str, Tensor]
Batch = tuple[list[Tensor], list[Target]]


class ImageDataset(Protocol):
    """Items are (uint8 (3, H, W), target with boxes float32 (N, 4) and labels int64 (N,))."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, Target]: ...


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Image and target of every entry of a split, in the manifest's order.

    An image is uint8 (3, H, W) RGB, upright. A target has `boxes` float32 (N, 4) xyxy in pixels,
    (0, 4) for a picture without a gun, `labels` int64 (N,), all 1, and `image_id` int64 (1,), the
    index. Bytes come from `home/cache/images`, where they are put when first read; other bytes
    than the manifest's are fetched anew, and raise `DatasetError` (`SHA256_MISMATCH`) if the
    bucket holds no better.

    With `side`, for training, pictures are made smaller until their longer side is at most so many
    pixels, boxes with them, and are kept decoded (up to the setting `pixel_cache_gb`). With `fit`
    they are decoded as scoring does for a network of that input size (`images.decode`).
    """

    def __init__(
        self,
        manifest: Manifest,
        split: Split,
        settings: Settings,
        storage: Storage,
        *,
        side: int | None = None,
        fit: tuple[int, int] | None = None,
    ) -> None:
        self.entries: tuple[Entry, ...] = manifest.split(split)
        self._settings = settings
        self._limits = DecodeLimits.from_settings(settings)
        self._cache = settings.home / "cache" / "images"
        self._pixels = PixelCache(settings, side) if side else None
        self._fit = fit
        self._storage = storage
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        entry = self.entries[index]
        pixels = self._decoded(index)
        boxes = torch.from_numpy(entry.box_array())
        # Rounded sizes: the two sides are not scaled by quite the same.
        height, width = pixels.shape[:2]
        boxes *= torch.tensor([width / entry.width, height / entry.height] * 2)
        target = {
            "boxes": boxes,
            "labels": torch.ones(len(boxes), dtype=torch.int64),
            "image_id": torch.tensor([index % len(self.entries)], dtype=torch.int64),
        }
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous(), target

    def _decoded(self, index: int) -> NDArray[np.uint8]:
        def decoded() -> NDArray[np.uint8]:
            return decode(self.read(index), self._limits, self._fit).pixels

        if self._pixels is None:
            return decoded()
        return self._pixels.get(self.entries[index].sha256, decoded)

    def read(self, index: int) -> bytes:
        """The encoded bytes of an image, from the cache if they are there and whole."""
        entry = self.entries[index]
        path = self._cache / entry.sha256[:2] / entry.sha256
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        if _is(data, entry):
            return data
        data = self._client().get(self._settings.data_bucket, image_key(entry.sha256))
        if not _is(data, entry):
            raise DatasetError(
                f"{entry.name} is not in the bucket as it was ingested (sha256 {entry.sha256}): "
                "it was changed or damaged; delete it there and ingest the source again",
                reason="SHA256_MISMATCH",
            )
        keep(path, data)
        return data

    def _client(self) -> Storage:
        # Connections do not survive a fork, so every worker process opens its own.
        if self._process != os.getpid():
            self._storage, self._process = Storage(self._settings), os.getpid()
        return self._storage

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_storage": None, "_process": 0}


def _is(data: bytes, entry: Entry) -> bool:
    return len(data) == entry.size and hashlib.sha256(data).hexdigest() == entry.sha256


class Batches(Dataset[Batch | GunDetectionError]):
    """Batches by the keys of their samples, or the error of ours that reading one ended with.

    In a process of a `DataLoader` it would lose its reason, and its message become a traceback.
    """

    def __init__(self, samples: Dataset[tuple[Tensor, Target]]) -> None:
        self._samples = samples

    def __getitem__(self, keys: Sequence[Any]) -> Batch | GunDetectionError:
        try:
            return collate([self._samples[key] for key in keys])
        except GunDetectionError as error:
            return error


def as_it_is(batch: Any) -> Any:
    """In place of what a `DataLoader` makes of a batch by itself."""
    return batch


def collate(batch: list[tuple[Tensor, Target]]) -> Batch:
    """A batch as detection models take it: a list of images of any size, a list of targets."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)
