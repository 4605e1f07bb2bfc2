"""Where data sets come from, behind one function.

| specification | source |
| --- | --- |
| `synthetic[:N[:seed]]` | drawn pictures |
| `kaggle[:owner/name]` | a data set of Kaggle |
| `s3://bucket/prefix` | objects under a prefix, or an archive in a bucket |
| a path | a local folder or archive (.zip, .tar, .tar.gz, .tgz) |
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gun_detection.datasets import kaggle, synthetic
from gun_detection.datasets.archives import extract, is_archive
from gun_detection.datasets.labels import Label
from gun_detection.datasets.layouts import Sample, find_samples
from gun_detection.datasets.trees import Tree, open_folder, open_prefix
from gun_detection.errors import DatasetError, NotFoundError, SettingsError
from gun_detection.scratch import scratch
from gun_detection.settings import Settings
from gun_detection.storage import Storage, parse_s3_uri

__all__ = ["Sample", "Source", "open_source"]


@dataclass(frozen=True)
class Source:
    """A named sequence of samples in order of their names; pictures are read one by one.

    The name says where the samples come from and is the same at every opening.
    """

    name: str
    samples: list[Sample]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


@contextmanager
def open_source(spec: str, settings: Settings, storage: Storage) -> Iterator[Source]:
    """Open what `spec` names; temporary files go when the block ends.

    Raises `SettingsError` for a specification or credentials that cannot be used,
    `NotFoundError` for a source that is not there and `DatasetError` for one whose layout
    is unknown or whose archive is unsafe.
    """
    kind, _, rest = spec.partition(":")
    with scratch(settings, "source") as folder:
        if kind == "synthetic":
            yield _synthetic(rest)
        elif kind == "kaggle":
            dataset = rest or kaggle.DEFAULT_DATASET
            archive = kaggle.download(dataset, folder)
            yield _archive(f"kaggle:{dataset}", archive, folder, settings)
        elif kind == "s3":
            yield _bucket(spec, folder, settings, storage)
        else:
            yield _local(Path(spec).expanduser(), folder, settings)


def _synthetic(rest: str) -> Source:
    count_text, _, seed_text = rest.partition(":")
    count = _number(count_text, synthetic.DEFAULT_COUNT)
    seed = _number(seed_text, 0)
    return Source(
        f"synthetic:{count}:{seed}", [_synthetic_sample(index, seed) for index in range(count)]
    )


def _number(text: str, default: int) -> int:
    if not text:
        return default
    if not text.isdecimal() or len(text) > 9:
        raise SettingsError(f"{text!r} is not a number: write synthetic:200:0 (pictures, seed)")
    return int(text)


def _synthetic_sample(index: int, seed: int) -> Sample:
    # Drawn once for the picture and once for the boxes: cheap, and nothing is kept.
    return Sample(
        synthetic.picture_name(index),
        lambda: synthetic.draw_picture(index, seed).data,
        lambda: Label(synthetic.draw_picture(index, seed).boxes),
    )


def _tree(name: str, tree: Tree, settings: Settings) -> Source:
    return Source(name, find_samples(tree, settings.max_image_bytes))


def _local(path: Path, folder: Path, settings: Settings) -> Source:
    if path.is_dir():
        return _tree(f"folder:{path.resolve().name}", open_folder(path), settings)
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist: check the data set source")
    if not is_archive(path.name):
        raise DatasetError(
            f"{path.name} is not a folder or an archive (.zip, .tar, .tar.gz, .tgz)",
            reason="BAD_ARCHIVE",
        )
    return _archive(f"archive:{path.name}", path, folder, settings)


def _archive(name: str, archive: Path, folder: Path, settings: Settings) -> Source:
    content = folder / "content"
    content.mkdir()
    extract(archive, content)
    return _tree(name, open_folder(content), settings)


def _bucket(spec: str, folder: Path, settings: Settings, storage: Storage) -> Source:
    bucket, key = parse_s3_uri(spec)
    if is_archive(key):
        archive = storage.download(bucket, key, folder / "archive")
        return _archive(spec, archive, folder, settings)
    return _tree(spec, open_prefix(storage, bucket, key), settings)
