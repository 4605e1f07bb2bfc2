"""Local pictures: folders, bad files, and what is written about them."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gun_detection.errors import NotFoundError
from gun_detection.scoring.local import document, find_pictures, look_at, write_files
from gun_detection.settings import Settings
from tests.picture_files import saved, scene
from tests.scoring.simulated import Simulated

THRESHOLD = 0.5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good pictures, one too large to be looked at whole, and files that are none."""
    root = tmp_path / "pictures"
    (root / "b" / "c").mkdir(parents=True)
    (root / "a.JPG").write_bytes(saved(scene(320, 200), "JPEG"))
    (root / "b" / "a.png").write_bytes(saved(scene(64, 64), "PNG"))
    (root / "b" / "c" / "large.webp").write_bytes(saved(scene(3000, 2000), "WEBP"))
    (root / "b" / "words.jpg").write_bytes(b"words")
    (root / "b" / "notes.txt").write_bytes(b"words")
    (root / "dangling.png").symlink_to(root / "nowhere.png")
    (root / "round").symlink_to(root)
    return root


def test_folders_are_searched_for_pictures(folder: Path) -> None:
    names = [str(path.relative_to(folder)) for path in find_pictures([folder])]
    assert names == ["a.JPG", "b/a.png", "b/c/large.webp", "b/words.jpg"]
    assert find_pictures([folder / "b" / "notes.txt"]) == [folder / "b" / "notes.txt"]
    assert find_pictures([folder / "b", folder], besides=folder / "b" / "c")[0].name == "a.png"
    with pytest.raises(NotFoundError, match="no picture in"):
        find_pictures([folder / "b" / "c"], besides=folder / "b")


def test_every_picture_has_its_row(folder: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    out = tmp_path / "out"
    (out / "overlays").mkdir(parents=True)
    pictures = find_pictures([folder, folder / "nowhere.jpg"])
    heard: list[tuple[int, int]] = []
    looked = look_at(
        pictures,
        Simulated(),
        settings,
        THRESHOLD,
        out / "overlays",
        lambda *done: heard.append(done),
    )
    assert [one.path for one in looked] == pictures
    assert heard == [(number, 5) for number in range(1, 6)]
    found = document(looked, "a-model", THRESHOLD)
    assert found["review"] == "unreviewed"
    errors = [image.get("error") for image in found["images"]]
    assert errors[:3] == [None, None, None]
    assert "not a picture" in errors[3]
    assert "No such file" in errors[4]

    write_files(out, found)
    assert json.loads((out / "predictions.json").read_text()) == found
    rows = list(csv.DictReader(io.StringIO((out / "images.csv").read_text())))
    assert [row["file"] for row in rows] == [str(path) for path in pictures]
    assert {row["review"] for row in rows} == {"unreviewed"}
    boxes = list(csv.DictReader(io.StringIO((out / "detections.csv").read_text())))
    assert len(boxes) == sum(int(row["guns"] or 0) for row in rows) > 0
    assert all(float(row["score"]) >= THRESHOLD for row in boxes)

    overlays = sorted((out / "overlays").iterdir())
    assert [path.name for path in overlays] == ["00001-a.png", "00002-a.png", "00003-large.png"]
    for path, picture in zip(overlays, pictures, strict=False):
        drawn, whole = Image.open(path), Image.open(picture)
        assert drawn.size == whole.size
        assert drawn.text == {}
        assert (np.asarray(drawn) != np.asarray(whole.convert("RGB"))).any()


def test_full_disk_is_no_fault_of_the_picture(folder: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    with pytest.raises(OSError, match="No such file"):
        look_at(
            [folder / "a.JPG"],
            Simulated(),
            settings,
            THRESHOLD,
            tmp_path / "nowhere",
            lambda *_: None,
        )
