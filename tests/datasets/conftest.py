"""Folders of pictures in several layouts, and what becomes of them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gun_detection.database import open_session
from gun_detection.datasets.ingest import IngestResult, ingest
from gun_detection.datasets.labels import Boxes
from gun_detection.datasets.manifest import Manifest, load_manifest
from gun_detection.datasets.synthetic import Picture, draw_pictures
from gun_detection.settings import Settings
from gun_detection.storage import Storage

MakeFolder = Callable[..., Path]


def counted(boxes: Boxes) -> str:
    rows = [" ".join(f"{value:g}" for value in box) for box in boxes]
    return "\n".join([str(len(rows)), *rows]) + "\n"


@pytest.fixture(scope="session")
def pictures() -> list[Picture]:
    return list(draw_pictures(24, seed=5))


@pytest.fixture
def make_folder(tmp_path: Path, pictures: list[Picture]) -> MakeFolder:
    """Writes the first pictures as `Images/N.jpeg` and `Labels/N.txt` under a new folder."""

    def make(name: str = "guns", count: int = 24) -> Path:
        root = tmp_path / name
        (root / "Images").mkdir(parents=True)
        (root / "Labels").mkdir()
        for number, picture in enumerate(pictures[:count], start=1):
            (root / "Images" / f"{number}.jpeg").write_bytes(picture.data)
            (root / "Labels" / f"{number}.txt").write_text(counted(picture.boxes))
        return root

    return make


def run(spec: str | Path, settings: Settings, storage: Storage) -> IngestResult:
    with open_session(settings) as session:
        return ingest(str(spec), settings, storage, session)


def manifest_of(result: IngestResult, settings: Settings, storage: Storage) -> Manifest:
    return load_manifest(storage, settings.data_bucket, result.dataset_id)
