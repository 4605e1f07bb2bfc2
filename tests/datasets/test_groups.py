import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gun_detection.datasets.groups import (
    MAX_DISTANCE,
    Placement,
    near_pairs,
    perceptual_hash,
    place,
    split_of,
)
from gun_detection.datasets.synthetic import Picture, draw_pictures

SHARES = (0.15, 0.25)


def flip(value: int, *bits: int) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


def test_pairs_are_those_of_a_full_comparison() -> None:
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, 600, dtype=np.uint64).tolist()
    for value in hashes[:300]:
        bits = random.choice(64, random.integers(1, 10), replace=False)
        hashes.append(flip(value, *bits.tolist()))
    values = np.unique(np.array(hashes, np.uint64))
    distances = np.bitwise_count(values[:, None] ^ values[None])
    rows, columns = np.nonzero(np.triu(distances <= MAX_DISTANCE, 1))
    expected = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert len(expected) > 150
    assert near_pairs(values) == expected


def test_pairs_of_nothing() -> None:
    assert near_pairs(np.array([], np.uint64)) == set()
    assert place({}, {}, *SHARES) == {}


def test_distance_decides() -> None:
    at = {"a": 0, "b": flip(0, 1, 9, 17, 25, 33, 41), "c": flip(0, *range(0, 56, 8))}
    placed = place(at, {}, *SHARES)
    assert placed["a"].group == placed["b"].group == "a"
    assert placed["c"].group == "c"


def test_groups_are_connected_components_named_after_the_smallest() -> None:
    chain = {"d": 0, "c": flip(0, *range(6)), "b": flip(0, *range(12)), "e": 2**63}
    placed = place(chain, {}, *SHARES)
    assert {sha: item.group for sha, item in placed.items()} == dict.fromkeys("dcb", "b") | {
        "e": "e" if chain["e"].bit_count() > MAX_DISTANCE else "b"
    }
    assert placed["c"].phash == chain["c"]


def test_shares_are_met_and_do_not_depend_on_other_groups() -> None:
    splits = [split_of(f"{number:064x}", *SHARES) for number in range(4000)]
    assert splits.count("holdout") / 4000 == pytest.approx(0.25, abs=0.03)
    assert splits.count("validation") / 4000 == pytest.approx(0.15, abs=0.03)
    # Pinned: another outcome would move images of existing data sets between the splits.
    assert splits[:6] == ["holdout", "holdout", "train", "train", "train", "train"]


KNOWN = {
    "t": Placement(0b0111, "T", "train"),
    "u": Placement(0b0011, "U", "train"),
    "v": Placement(0b1011, "V", "validation"),
    "h": Placement(0b1101, "H", "holdout"),
}


@pytest.mark.parametrize(
    ("known", "images", "expected"),
    [
        ("t", {"a": 0b0110}, {"a": ("T", "train")}),
        ("tu", {"a": 0}, {"a": ("T", "train")}),
        ("tv", {"a": 0}, {}),
        ("tvh", {"a": 0, "b": 2**64 - 1}, {"b": ("b", "validation")}),
        ("t", {"a": 0b0111}, {"a": ("T", "train")}),
        (
            "h",
            {"a": flip(0b1101, *range(10, 16)), "b": flip(0b1101, *range(10, 22))},
            {"a": ("H", "holdout"), "b": ("H", "holdout")},
        ),
        (
            "th",
            {"t": 99, "h": 2**60, "a": 0},
            {"t": ("T", "train"), "h": ("H", "holdout")},
        ),
    ],
    ids=[
        "joins",
        "smallest-name",
        "bridges-two-splits",
        "bridges-three-splits",
        "same-hash",
        "by-way-of-another",
        "known-stay",
    ],
)
def test_new_images_near_known_ones(
    known: str, images: Mapping[str, int], expected: dict[str, tuple[str, str]]
) -> None:
    placed = place(images, {sha: KNOWN[sha] for sha in known}, *SHARES)
    assert {sha: (item.group, item.split) for sha, item in placed.items()} == expected


def test_nothing_moves_when_the_data_grows() -> None:
    random = np.random.default_rng(3)
    seeds = random.integers(0, 2**64, 60, dtype=np.uint64).tolist()
    images = {
        f"{random.integers(2**60):016x}": flip(
            seeds[number % 60], *random.choice(64, 3, replace=False).tolist()
        )
        for number in range(240)
    }
    names = sorted(images)
    random.shuffle(names)
    known: dict[str, Placement] = {}
    for count in (40, 120, 240):
        placed = place({name: images[name] for name in names[:count]}, known, *SHARES)
        assert {sha: placed[sha] for sha in known} == known
        by_group = {}
        for item in placed.values():
            assert by_group.setdefault(item.group, item.split) == item.split
        known = placed
    assert len({item.group for item in known.values()}) < 120


@pytest.mark.parametrize(
    ("quality", "scale"), [(40, 1.0), (85, 0.5), (30, 0.6)], ids=["quality", "half", "both"]
)
def test_other_encodings_are_near_duplicates(quality: int, scale: float) -> None:
    for picture in draw_pictures(6, seed=2):
        image = Image.open(io.BytesIO(picture.data))
        small = image.resize((int(image.width * scale), int(image.height * scale)))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality)
        again = Image.open(io.BytesIO(buffer.getvalue()))
        distance = perceptual_hash(np.array(image)) ^ perceptual_hash(np.array(again))
        assert distance.bit_count() <= MAX_DISTANCE


def test_different_pictures_are_not(pictures: list[Picture]) -> None:
    hashes = [
        perceptual_hash(np.array(Image.open(io.BytesIO(picture.data)))) for picture in pictures
    ]
    assert near_pairs(np.array(sorted(hashes), np.uint64)) == set()


@pytest.mark.seed
def test_real_photographs(shared_data: Path) -> None:
    """Near-duplicates that people see as such are found, and groups stay small."""
    hashes = {
        path.stem: perceptual_hash(np.array(Image.open(path).convert("RGB")))
        for path in (shared_data / "pistols" / "Images").iterdir()
    }
    placed = place(hashes, {}, *SHARES)
    for one, other in (("49", "817"), ("537", "637"), ("133", "482")):
        assert placed[one].group == placed[other].group
    sizes = [item.group for item in placed.values()]
    assert len(set(sizes)) == 980
    assert max(map(sizes.count, set(sizes))) == 4
