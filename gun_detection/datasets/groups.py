"""Near-duplicate groups and the split that each group belongs to.

Pictures are compared by the 64-bit perceptual hash of `imagehash.phash` (DCT, Zauner 2010). Two
are near-duplicates when their hashes differ in at most `MAX_DISTANCE` = 6 bits, and groups are
the connected components. Measured on 1,380 distinct photographs (302 of the guns seed, 998
pistols, 80 without guns): re-encoding at quality 30 and half size moves a hash by at most 4 bits,
brightness × 1.2 or contrast × 1.3 by at most 6; at 6 bits 24 pairs join and the largest group has
4 pictures, catalogue shots of like guns; at 8 bits such shots chain into one group of 44.
Crops of more than 2 % and mirrored copies are not found.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import imagehash
import numpy as np
import numpy.typing as npt
from PIL import Image

Split = Literal["train", "validation", "holdout"]
SPLITS: tuple[Split, ...] = ("train", "validation", "holdout")
MAX_DISTANCE = 6

_BITS = 64
# Of `MAX_DISTANCE + 2` equal bands at least two are the same in hashes that differ in at most
# `MAX_DISTANCE` bits (pigeonhole), so pairs that share no two bands need no comparison.
_BANDS = MAX_DISTANCE + 2
# Changing this text would move images between train and holdout.
_SALT = "gun-detection/split/1:"

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an image belongs; `phash` is its perceptual hash as a 64-bit number."""

    phash: int
    group: str
    split: Split


def perceptual_hash(pixels: npt.NDArray[np.uint8]) -> int:
    """The 64-bit perceptual hash of uint8 (H, W, 3) pixels."""
    bits = imagehash.phash(Image.fromarray(pixels)).hash.ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def split_of(group: str, validation_share: float, holdout_share: float) -> Split:
    """The split of a group: a hash of its id as a fraction, so that no other group matters."""
    digest = hashlib.sha256((_SALT + group).encode()).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    if fraction < holdout_share:
        return "holdout"
    return "validation" if fraction < holdout_share + validation_share else "train"


def place(
    images: Mapping[str, int],
    known: Mapping[str, Placement],
    validation_share: float,
    holdout_share: float,
) -> dict[str, Placement]:
    """Group and split of the images, given as sha256 → perceptual hash.

    Known images stay where they are. New ones that are near-duplicates of a known one, also by
    way of other new ones, join its group and split; of several groups the one with the smallest
    name. Where known ones are in different splits, their new near-duplicates have no place in the
    answer: in either split they would tell of the other. Other groups are named after the
    smallest sha256 in them.
    """
    new = sorted(sha for sha in images if sha not in known)
    hosts: dict[int, set[Placement]] = defaultdict(set)
    for placement in known.values():
        hosts[placement.phash].add(placement)
    hashes = sorted({images[sha] for sha in new} | set(hosts))
    sets = _DisjointSets({images[sha] for sha in new})
    joined: dict[int, set[Placement]] = defaultdict(set)
    touching = [(one, one) for one in hashes] + [
        (hashes[i], hashes[j]) for i, j in near_pairs(np.array(hashes, np.uint64))
    ]
    for one, other in touching:
        if one in sets and other in sets:
            sets.join(one, other)
    for one, other in touching + [(other, one) for one, other in touching]:
        if one in sets and other in hosts:
            joined[sets.root(one)] |= hosts[other]
    names: dict[int, str] = {}
    placed = {sha: known[sha] for sha in images if sha in known}
    for sha in new:
        root = sets.root(images[sha])
        near = joined[root]
        splits = {host.split for host in near}
        if len(splits) > 1:
            continue
        if near:
            group, split = min(host.group for host in near), splits.pop()
        else:
            group = names.setdefault(root, sha)
            split = split_of(group, validation_share, holdout_share)
        placed[sha] = Placement(images[sha], group, split)
    return placed


class _DisjointSets:
    """Union-find over numbers."""

    def __init__(self, members: set[int]) -> None:
        self._parents = {member: member for member in members}

    def __contains__(self, member: int) -> bool:
        return member in self._parents

    def root(self, member: int) -> int:
        while self._parents[member] != member:
            self._parents[member] = self._parents[self._parents[member]]
            member = self._parents[member]
        return member

    def join(self, one: int, other: int) -> None:
        self._parents[self.root(one)] = self.root(other)


def near_pairs(hashes: Hashes) -> set[tuple[int, int]]:
    """All index pairs (i < j) of distinct hashes (uint64, shape (N,)) that are near each other.

    Time grows with N times the number of hashes that share two bands, about N for photographs.
    """
    width = np.uint64(_BITS // _BANDS)
    mask = np.uint64(2 ** (_BITS // _BANDS) - 1)
    bands = [(hashes >> (width * np.uint64(band))) & mask for band in range(_BANDS)]
    pairs: set[tuple[int, int]] = set()
    for one, other in combinations(bands, 2):
        pairs.update(_near_in_buckets(hashes, (one << width) | other))
    return pairs


def _near_in_buckets(hashes: Hashes, keys: Hashes) -> Iterator[tuple[int, int]]:
    """Pairs within the distance among hashes with the same key, compared at growing offsets."""
    order = np.argsort(keys, kind="stable")
    keys, hashes = keys[order], hashes[order]
    starts = np.arange(len(keys))
    offset = 1
    while len(starts := starts[starts + offset < len(keys)]):
        starts = starts[keys[starts] == keys[starts + offset]]
        near = np.bitwise_count(hashes[starts] ^ hashes[starts + offset]) <= MAX_DISTANCE
        for start in starts[near].tolist():
            i, j = sorted((int(order[start]), int(order[start + offset])))
            yield i, j
        offset += 1
