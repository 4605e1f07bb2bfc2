import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gun_detection.datasets.labels import Label
from gun_detection.datasets.sources import open_source
from gun_detection.datasets.synthetic import Picture
from gun_detection.errors import (
    DatasetError,
    GunDetectionError,
    ImageError,
    NotFoundError,
    SettingsError,
)
from gun_detection.settings import Settings
from gun_detection.storage import Storage

MakeFolder = Callable[..., Path]
Content = dict[str, tuple[bytes, list[list[float]]]]


def content(spec: str | Path, settings: Settings, storage: Storage) -> tuple[str, Content]:
    found: Content = {}
    with open_source(str(spec), settings, storage) as source:
        for sample in source:
            label = sample.label()
            assert isinstance(label, Label)
            found[sample.name] = (sample.read(), label.boxes.tolist())
        assert len(source) == len(found)
    return source.name, found


def upload_folder(storage: Storage, bucket: str, root: Path, prefix: str) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            key = prefix + path.relative_to(root).as_posix()
            storage.put(bucket, key, path.read_bytes())


def test_a_folder_however_it_is_packed(
    settings: Settings,
    storage: Storage,
    make_folder: MakeFolder,
    pictures: list[Picture],
    tmp_path: Path,
) -> None:
    folder = make_folder("guns", 5)
    name, expected = content(folder, settings, storage)
    assert name == "folder:guns"
    assert expected == {
        f"Images/{number}.jpeg": (picture.data, picture.boxes.tolist())
        for number, picture in enumerate(pictures[:5], start=1)
    }
    bucket = settings.uploads_bucket
    upload_folder(storage, bucket, folder, "sets/guns/")
    storage.put(bucket, "sets/guns-other/Images/9.jpeg", b"not of this set")
    for kind in ("zip", "tar", "gztar"):
        archive = Path(
            shutil.make_archive(str(tmp_path / kind), kind, root_dir=tmp_path, base_dir="guns")
        )
        assert content(archive, settings, storage) == (f"archive:{archive.name}", expected)
        storage.put_file(bucket, f"packed/{archive.name}", archive)
        uri = f"s3://{bucket}/packed/{archive.name}"
        assert content(uri, settings, storage) == (uri, expected)
    for uri in (f"s3://{bucket}/sets/guns", f"s3://{bucket}/sets/guns/"):
        assert content(uri, settings, storage) == (uri, expected)


def test_folder_in_the_home_folder(
    settings: Settings, storage: Storage, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(make_folder("guns", 2).parent))
    assert content("~/guns", settings, storage)[0] == "folder:guns"


@pytest.mark.parametrize(
    ("spec", "name", "count"),
    [
        ("synthetic:3", "synthetic:3:0", 3),
        ("synthetic:2:7", "synthetic:2:7", 2),
        ("synthetic::7", "synthetic:200:7", 200),
        ("synthetic", "synthetic:200:0", 200),
    ],
)
def test_synthetic(settings: Settings, storage: Storage, spec: str, name: str, count: int) -> None:
    with open_source(spec, settings, storage) as source:
        assert (source.name, len(source)) == (name, count)
        names = [sample.name for sample in source]
        assert names == sorted(set(names))
        first = source.samples[0]
        label = first.label()
        assert isinstance(label, Label)
        assert len(label.boxes) in (1, 2)
        assert first.read()[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("synthetic:many", SettingsError),
        ("synthetic:-1", SettingsError),
        ("synthetic:9999999999", SettingsError),
        ("s3://", SettingsError),
        ("s3:bucket", SettingsError),
        ("kaggle:guns", SettingsError),
        ("/no/such/folder", NotFoundError),
        ("s3://no-such-bucket-here/x", NotFoundError),
        ("s3://{uploads}/none.zip", NotFoundError),
        ("s3://{uploads}/empty/", DatasetError),
        (__file__, DatasetError),
    ],
)
def test_sources_that_are_none(
    settings: Settings, storage: Storage, spec: str, kind: type[GunDetectionError]
) -> None:
    with (
        pytest.raises(kind),
        open_source(spec.format(uploads=settings.uploads_bucket), settings, storage),
    ):
        pass


def test_objects_of_a_bucket_are_bounded_and_may_disappear(
    settings: Settings, storage: Storage, make_folder: MakeFolder
) -> None:
    bucket, root = settings.uploads_bucket, make_folder("guns", 2)
    (root / "Images" / "2.jpeg").write_bytes(bytes(2000))
    upload_folder(storage, bucket, root, "x/")
    small = settings.model_copy(update={"max_image_bytes": 1999})
    with open_source(f"s3://{bucket}/x", small, storage) as source:
        with pytest.raises(ImageError) as caught:
            source.samples[1].read()
        assert caught.value.reason == "TOO_LARGE"
        storage.delete(bucket, "x/Images/1.jpeg")
        with pytest.raises(ImageError) as caught:
            source.samples[0].read()
        assert caught.value.reason == "MISSING_IMAGE"


def test_temporary_files_go(
    settings: Settings,
    storage: Storage,
    make_folder: MakeFolder,
    tmp_path: Path,
) -> None:
    archive = shutil.make_archive(str(tmp_path / "a"), "zip", make_folder("guns", 2))
    temporary = settings.home / "tmp"
    with open_source(archive, settings, storage):
        assert any(temporary.rglob("*.jpeg"))
    assert not list(temporary.iterdir())
