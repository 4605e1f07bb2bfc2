"""Pictures stay on their side of a split from one version to the next."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from gun_detection.database import open_session
from gun_detection.datasets import findings
from gun_detection.datasets.groups import perceptual_hash, split_of
from gun_detection.datasets.synthetic import Picture, draw_pictures, upload_pictures
from gun_detection.images import DecodeLimits, decode
from gun_detection.release.champion import promote
from gun_detection.release.registry import publish
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.conftest import random_model
from tests.datasets.conftest import MakeFolder, counted, manifest_of, run


def test_images_stay_in_their_split_when_the_data_grows(
    settings: Settings, storage: Storage, make_folder: MakeFolder
) -> None:
    folder = make_folder()
    first = manifest_of(run(folder, settings, storage), settings, storage)
    for picture in upload_pictures(20, seed=9):
        (folder / "Images" / f"new-{picture.name}").write_bytes(picture.data)
        (folder / "Labels" / f"new-{Path(picture.name).stem}.txt").write_text("0\n")
    # Other shares would place every image anew if the first version were not looked at.
    changed = settings.model_copy(update={"holdout_share": 0.6, "validation_share": 0.3})
    second = manifest_of(run(folder, changed, storage), settings, storage)
    assert len(second.entries) == 44
    old = {entry.sha256: entry for entry in first.entries}
    assert [entry for entry in second.entries if entry.sha256 in old] == list(first.entries)
    other = run("synthetic:30:4", settings, storage)
    assert other.created
    moved = folder.rename(folder.with_name("moved"))
    third = manifest_of(run(moved, settings, storage), settings, storage)
    assert third == second


def test_what_a_champion_learned_from_stays_where_it_was(
    settings: Settings, storage: Storage, make_folder: MakeFolder
) -> None:
    folder = make_folder()
    learned = run(folder, settings, storage)
    first = manifest_of(learned, settings, storage)
    with open_session(settings) as session:
        new = replace(random_model(1), dataset_id=learned.dataset_id)
        model = publish(new, settings, storage, session).id
    with open_session(settings) as session:
        promote(session, model, actor="tester", reason="a test")
    # Another set under the same name: the one before is the newest of nothing any more.
    for name in ("Images", "Labels"):
        folder.joinpath(name).rename(folder.with_name(f"away-{name}"))
        folder.joinpath(name).mkdir()
    for picture in draw_pictures(24, seed=31):
        (folder / "Images" / picture.name).write_bytes(picture.data)
        (folder / "Labels" / f"{Path(picture.name).stem}.txt").write_text(counted(picture.boxes))
    run(folder, settings, storage)
    again = make_folder("again")
    # Other shares would place every image anew if the champion's data were not looked at.
    changed = settings.model_copy(update={"holdout_share": 0.6, "validation_share": 0.3})
    assert manifest_of(run(again, changed, storage), settings, storage).entries == first.entries


def test_a_picture_between_two_splits_is_left_out(
    settings: Settings,
    storage: Storage,
    make_folder: MakeFolder,
    pictures: list[Picture],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = settings.validation_share, settings.holdout_share
    limits = DecodeLimits.from_settings(settings)
    one_of = {
        split_of(hashlib.sha256(picture.data).hexdigest(), *shares): picture for picture in pictures
    }
    (new,) = draw_pictures(1, seed=77)
    told = {
        perceptual_hash(decode(picture.data, limits).pixels): told
        for picture, told in ((one_of["train"], 0x1F), (one_of["holdout"], 0x1F << 10), (new, 0))
    }

    def hash_of(pixels: npt.NDArray[np.uint8]) -> int:
        real = perceptual_hash(pixels)
        return told.get(real, real)

    monkeypatch.setattr(findings, "perceptual_hash", hash_of)
    folder = make_folder()
    first = run(folder, settings, storage)
    (folder / "Images" / "90.jpeg").write_bytes(new.data)
    (folder / "Labels" / "90.txt").write_text("0\n")
    second = run(folder, settings, storage)
    assert (second.dataset_id, second.counts["images"]) == (first.dataset_id, 24)
    assert second.counts["duplicates"] == 1
    assert [(item["name"], item["reason"]) for item in second.report["problems"]] == [
        ("Images/90.jpeg", "BRIDGES_SPLITS")
    ]
