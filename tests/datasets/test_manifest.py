import hashlib
from dataclasses import replace

import numpy as np
import pytest

from gun_detection.datasets.manifest import Entry, Manifest, image_key, load_manifest, manifest_key
from gun_detection.errors import DatasetError, NotFoundError
from gun_detection.settings import Settings
from gun_detection.storage import Storage


def entry(number: int, **changes: object) -> Entry:
    sound = Entry(
        sha256=f"{number:064x}",
        size=10,
        width=20,
        height=30,
        boxes=((1.0, 2.0, 3.5, 4.0),),
        name=f"Images/{number} \udcff é.jpeg",
        phash=f"{number:016x}",
        group=f"{number:064x}",
        split="holdout" if number % 2 else "train",
    )
    return replace(sound, **changes)


MANIFEST = Manifest(tuple(entry(number) for number in range(4)))


def test_round_trip() -> None:
    again = Manifest.from_bytes(MANIFEST.to_bytes())
    assert again == MANIFEST
    assert again.id == MANIFEST.id == hashlib.sha256(MANIFEST.to_bytes()).hexdigest()


def test_format_is_pinned() -> None:
    """Other bytes for the same content would change the ids of existing data sets."""
    assert entry(1, name="a.jpg").line() == (
        b'{"boxes":[[1.0,2.0,3.5,4.0]],"group":"' + b"0" * 63 + b'1","height":30,"name":"a.jpg",'
        b'"phash":"0000000000000001","sha256":"' + b"0" * 63 + b'1","size":10,"split":"holdout",'
        b'"width":20}\n'
    )


@pytest.mark.parametrize(
    ("number", "changes", "same_holdout"),
    [
        (0, {"boxes": ()}, True),
        (1, {"boxes": ()}, False),
        (1, {"split": "train"}, False),
        (0, {"split": "holdout"}, False),
        (0, {"group": "x"}, True),
    ],
)
def test_ids_follow_the_content(
    number: int, changes: dict[str, object], same_holdout: bool
) -> None:
    entries = list(MANIFEST.entries)
    entries[number] = replace(entries[number], **changes)
    changed = Manifest(tuple(entries))
    assert changed.id != MANIFEST.id
    assert (changed.holdout_id == MANIFEST.holdout_id) is same_holdout


def test_splits_and_boxes() -> None:
    assert [item.sha256[-1] for item in MANIFEST.split("holdout")] == ["1", "3"]
    assert MANIFEST.split("validation") == ()
    assert entry(0).box_array().dtype == np.float32
    assert entry(0, boxes=()).box_array().shape == (0, 4)
    assert entry(5).placement.phash == 5


@pytest.mark.parametrize("data", [b"", b"{}\n", MANIFEST.to_bytes().replace(b"1}", b"2}", 1)])
def test_other_formats(data: bytes) -> None:
    with pytest.raises(DatasetError) as caught:
        Manifest.from_bytes(data)
    assert caught.value.reason == "BAD_MANIFEST"


def test_keys() -> None:
    assert image_key("ab" + "0" * 62) == "images/ab/ab" + "0" * 62


def test_load_verifies_the_hash(settings: Settings, storage: Storage) -> None:
    bucket, key = settings.data_bucket, manifest_key(MANIFEST.id)
    with pytest.raises(NotFoundError):
        load_manifest(storage, bucket, MANIFEST.id)
    storage.put(bucket, key, MANIFEST.to_bytes())
    assert load_manifest(storage, bucket, MANIFEST.id) == MANIFEST
    storage.put(bucket, key, MANIFEST.to_bytes()[:-1])
    with pytest.raises(DatasetError, match="from a backup") as caught:
        load_manifest(storage, bucket, MANIFEST.id)
    assert caught.value.reason == "SHA256_MISMATCH"
    assert f"s3://{bucket}/{key}" in caught.value.message
