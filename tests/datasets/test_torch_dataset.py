import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from gun_detection.database import open_session
from gun_detection.datasets.ingest import ingest
from gun_detection.datasets.manifest import Manifest, image_key, load_manifest
from gun_detection.datasets.torch_dataset import DetectionDataset, collate
from gun_detection.errors import DatasetError
from gun_detection.settings import Settings
from gun_detection.storage import Storage


@pytest.fixture
def manifest(settings: Settings, storage: Storage, make_folder: Callable[..., Path]) -> Manifest:
    with open_session(settings) as session:
        result = ingest(str(make_folder()), settings, storage, session)
    return load_manifest(storage, settings.data_bucket, result.dataset_id)


def test_samples_are_as_the_models_take_them(
    manifest: Manifest, settings: Settings, storage: Storage
) -> None:
    dataset = DetectionDataset(manifest, "train", settings, storage)
    assert len(dataset) == len(manifest.split("train")) > 5
    negatives = 0
    for index, entry in enumerate(manifest.split("train")):
        image, target = dataset[index]
        assert image.dtype == torch.uint8
        assert image.shape == (3, entry.height, entry.width)
        assert image.is_contiguous()
        assert target["boxes"].dtype == torch.float32
        assert target["boxes"].shape == (len(entry.boxes), 4)
        assert target["boxes"].tolist() == [list(box) for box in entry.boxes]
        assert target["labels"].tolist() == [1] * len(entry.boxes)
        assert target["labels"].dtype == torch.int64
        assert target["image_id"].tolist() == [index]
        negatives += not entry.boxes
    assert negatives


def test_batches_of_worker_processes(
    manifest: Manifest, settings: Settings, storage: Storage
) -> None:
    dataset = DetectionDataset(manifest, "train", settings, storage)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=collate)
    ids = [int(target["image_id"]) for images, targets in loader for target in targets]
    assert ids == list(range(len(dataset)))


def test_pickled_data_set_opens_its_own_connection(
    manifest: Manifest, settings: Settings, storage: Storage
) -> None:
    dataset = pickle.loads(pickle.dumps(DetectionDataset(manifest, "train", settings, storage)))
    assert dataset[0][0].dtype == torch.uint8


def test_the_cache_is_used_and_repaired(
    manifest: Manifest, settings: Settings, storage: Storage
) -> None:
    dataset = DetectionDataset(manifest, "holdout", settings, storage)
    entry = dataset.entries[0]
    data = dataset.read(0)
    path = settings.home / "cache" / "images" / entry.sha256[:2] / entry.sha256
    assert path.read_bytes() == data
    assert [item.name for item in path.parent.iterdir()] == [entry.sha256]
    path.write_bytes(bytes(len(data)))
    assert dataset.read(0) == data
    assert path.read_bytes() == data
    storage.delete(settings.data_bucket, image_key(entry.sha256))
    assert dataset.read(0) == data


def test_other_bytes_in_the_bucket_are_refused(
    manifest: Manifest, settings: Settings, storage: Storage
) -> None:
    dataset = DetectionDataset(manifest, "holdout", settings, storage)
    entry = dataset.entries[0]
    storage.put(settings.data_bucket, image_key(entry.sha256), bytes(entry.size))
    with pytest.raises(DatasetError) as caught:
        dataset[0]
    assert caught.value.reason == "SHA256_MISMATCH"
    assert not list((settings.home / "cache").rglob(entry.sha256))


def test_a_picture_of_twenty_megapixels_is_learnt_from_in_little(
    settings: Settings, storage: Storage, make_folder: Callable[..., Path]
) -> None:
    folder = make_folder()
    # Two of them, as their splits follow from their bytes.
    for number in (2, 3):
        file = folder / "Images" / f"{number}.jpeg"
        with Image.open(file) as picture:
            factor = round((20e6 / (picture.width * picture.height)) ** 0.5) + 1
            picture.resize((picture.width * factor, picture.height * factor)).save(file, "JPEG")
        label = folder / "Labels" / f"{number}.txt"
        count, *boxes = label.read_text().splitlines()
        larger = [" ".join(str(int(x) * factor) for x in box.split()) for box in boxes]
        label.write_text("\n".join([count, *larger]))
    with open_session(settings) as session:
        result = ingest(str(folder), settings, storage, session)
    manifest = load_manifest(storage, settings.data_bucket, result.dataset_id)
    dataset = DetectionDataset(manifest, "train", settings, storage, side=300)
    large = [i for i, entry in enumerate(dataset.entries) if entry.width * entry.height > 20e6]
    assert large
    for index in large:
        entry = dataset.entries[index]
        image, target = dataset[index]
        assert max(image.shape) == 300
        assert len(target["boxes"]) == len(entry.boxes) > 0
        shown = target["boxes"] / torch.tensor([image.shape[2], image.shape[1]] * 2)
        whole = torch.from_numpy(entry.box_array()) / torch.tensor([entry.width, entry.height] * 2)
        assert torch.allclose(shown, whole, atol=1e-4)
        for x1, y1, x2, y2 in target["boxes"].round().int().tolist():
            assert image[:, y1:y2, x1:x2].float().mean() < image.float().mean(), "guns are dark"
