"""Files that uploads have in store, and what is to become of each: one table for every stage.

python -m tests.bad_pictures > docs/bad-pictures.md
"""

import json
from base64 import b85decode
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from gun_detection.images import Reason
from tests import bad_picture_files as bad
from tests.bad_picture_files import Files, Make
from tests.picture_files import (
    BLUE,
    FILES,
    GREEN,
    HEIGHT,
    ONE_COLOUR,
    RED,
    WIDTH,
    YELLOW,
    exif,
    png,
    saved,
    scene,
    with_segment,
)

# So that a file that is too large can be small; otherwise the default settings hold.
LIMITS: dict[str, Any] = {"max_image_bytes": 2**21}

Size = tuple[int, int]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """A file, the key that it is uploaded under, and its outcome.

    `reason` is None where it is scored; then `size` is (width, height) of the upright picture and
    `corner` its colour at the upper left, where that is of one colour. `not_in_bucket` and
    `not_in_folder` say why the tests' S3 server or a file system cannot hold the key,
    `not_ingested` why an ingest does not take it for a picture's.
    """

    group: str
    name: str
    key: str
    make: Make
    reason: Reason | None = None
    size: Size | None = None
    corner: Colour | None = None
    not_in_bucket: str = ""
    not_in_folder: str = ""
    not_ingested: str = ""


def _refused(group: str, reason: Reason, files: Files) -> Iterator[Case]:
    for name, data in files.items():
        yield Case(group, name, _key(name), _make(data), reason)


def _scored(
    group: str, files: Files, size: Size = (WIDTH, HEIGHT), corner: Colour | None = RED
) -> Iterator[Case]:
    for name, data in files.items():
        yield Case(group, name, _key(name), _make(data), None, size, corner)


def _key(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name) + ".jpg"


def _make(data: bytes | Make) -> Make:
    return data if callable(data) else lambda: data


def _refused_cases() -> Iterator[Case]:
    no_picture, large = "No picture that is read", "Bombs and odd sizes"
    yield from _refused(no_picture, Reason.EMPTY, {"no bytes": b""})
    yield from _refused(no_picture, Reason.NOT_IMAGE, bad.NOT_IMAGE)
    yield from _refused(no_picture, Reason.UNSUPPORTED_FORMAT, bad.UNSUPPORTED)
    yield from _refused("Cut off", Reason.TRUNCATED, bad.TRUNCATED)
    yield from _refused("Damaged or crafted", Reason.CORRUPT, bad.CORRUPT)
    yield from _refused(large, Reason.TOO_MANY_PIXELS, bad.TOO_MANY_PIXELS)
    yield from _refused(large, Reason.TOO_SMALL, bad.TOO_SMALL)
    yield from _refused(large, Reason.TOO_NARROW, bad.TOO_NARROW)
    too_large: Files = {
        "more bytes than allowed": lambda: FILES["jpeg"] + bytes(LIMITS["max_image_bytes"])
    }
    yield from _refused(large, Reason.TOO_LARGE, too_large)


def _large_cases() -> Iterator[Case]:
    """What is just within the limits, or has a bomb where no pixel depends on it."""
    group, black = "Bombs and odd sizes", (0, 0, 0)
    for name, size in (
        ("smallest", (16, 16)),
        ("narrowest", (16, 1600)),
        ("widest", (65_535, 700)),
        ("largest", (7071, 7071)),
    ):
        make = partial(saved, Image.new("1", size), "PNG")
        yield from _scored(group, {f"{name} PNG": make}, size, black)
    make = partial(saved, Image.new("L", (7071, 7071)), "JPEG")
    yield from _scored(group, {"largest JPEG": make}, (7071, 7071), black)
    make = partial(png, depth=8, colour=0, row=bytes(32), rows=2**21)
    yield from _scored(group, {"PNG of 32x32 with 66 MiB of data": make}, (32, 32), black)


# Pillow does not write arithmetic coding: the scene through `jpegtran -arithmetic`.
_ARITHMETIC = (
    "|JeWF01!$>Nk#wx0RR9200961|JwjV01yid4h#wq4h;?x5fBp?C>j_R78o%jB^@X_Gd(;xGdMRuNL)@pL{~*OI8bd-"
    "S6^ahXlFi6ad~iLcwA*?WB=O#Lje&I5*QU2FB%#zV?sDWV`F1uV`F1uV`F1uV`F1uV`F1uV`F1uV`F1uV`F1uV`F1u"
    "V`F1uV`F1uV`F1uV`Klx01*fP9sno<0U`hb5di}c0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid06zf!(!(JOh7-1m1TkHW"
    "0udMST|>&YTMW5cI2s%b{C)rt%=&2zw1Zd`-JhpVV=!9V)b0xT&-vf0Hi~~n>Zif~0Lh44z9p^r(1(FUt3s!xOnVu@"
    "yOo`de+lwQTLJ`cV2;IyWNDdF$hX-)|Je"
)


def _good_cases() -> Iterator[Case]:
    yield from _scored("Odd around the pixels", bad.ODD_BUT_GOOD)
    group = "Rare but good"
    pale = {name for name in FILES if "grey" in name or "palette" in name or "1-bit" in name}
    yield from _scored(group, {name: FILES[name] for name in FILES if name not in pale})
    yield from _scored(group, {name: FILES[name] for name in FILES if name in pale}, corner=None)
    yield from _scored(group, {"arithmetic-coded jpeg": b85decode(_ARITHMETIC)})
    for name, (data, colour) in ONE_COLOUR.items():
        yield from _scored(group, {name: data}, (32, 32), colour)
    for name, suffix in (("PNG", "jpg"), ("JPEG", "png"), ("WEBP", "jpeg"), ("BMP", "webp")):
        data, key = saved(scene(60, 40), name), f"{name.lower()}-named.{suffix}"
        yield Case(group, f"{name} named .{suffix}", key, _make(data), None, (60, 40), RED)


def _exif_cases() -> Iterator[Case]:
    group = "EXIF"
    # Where the upper left corner lies in the file, by orientation.
    corners = (RED, GREEN, YELLOW, BLUE, RED, BLUE, YELLOW, GREEN)
    for format_name in ("JPEG", "PNG", "WEBP"):
        for orientation, corner in enumerate(corners, start=1):
            data = saved(scene(), format_name, exif=exif(orientation), quality=95)
            size = (WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH)
            name = f"{format_name} of orientation {orientation}"
            yield from _scored(group, {name: data}, size, corner)
    big_endian = saved(scene(), "JPEG", exif=exif(6, ">"), quality=95)
    yield from _scored(group, {"big-endian orientation 6": big_endian}, (HEIGHT, WIDTH), BLUE)
    broken = {
        "empty": b"Exif\0\0",
        "offset past the end": b"Exif\0\0II*\0\xff\xff\xff\xff",
        "cut off": exif(6)[:-8],
        "orientation 9": exif(9),
        "orientation 0": exif(0),
        "orientation of a wrong type": exif(6, kind=2),
        "garbage": b"Exif\0\0" + b"X" * 40,
        "endless directories": exif(1)[:-4] + b"\x08\0\0\0",
    }
    files = {
        f"EXIF: {name}": with_segment(FILES["jpeg"], 0xE1, exif) for name, exif in broken.items()
    }
    yield from _scored(group, dict(files))


_REFUSED, _RENAMED = "refused by SeaweedFS", "renamed by SeaweedFS"
_HIDDEN, _PATH = "a hidden file", "another path on disk"
_LONG = "a name of more than 255 bytes"
# (what, key, why not in a bucket, in a folder, ingested)
_KEYS = (
    ("accents", "café-ü.jpg", "", "", ""),
    ("accents, decomposed", "cafe\u0301-u\u0308.jpg", "", "", ""),
    ("Chinese", "枪 照片.jpg", "", "", ""),
    ("emoji", "🔫.jpg", "", "", ""),
    ("right-to-left override", "\u202egpj.exe.jpg", "", "", ""),
    ("no-width space", "no\u200bwidth.jpg", "", "", ""),
    ("newline", "new\nline.jpg", "", "", ""),
    ("carriage return", "carriage\rreturn.jpg", "", "", ""),
    ("tab", "ta\tb.jpg", "", "", ""),
    ("bell", "be\x07ll.jpg", "", "", ""),
    ("escape sequence", "\x1b[31mred.jpg", "", "", ""),
    ("zero byte", "zero\0byte.jpg", _REFUSED, "no zero bytes", ""),
    ("parent folder", "a/../parent.jpg", _REFUSED, _PATH, ""),
    ("parent folder first", "../above.jpg", _REFUSED, _PATH, ""),
    ("own folder", "a/./own.jpg", _REFUSED, _PATH, ""),
    ("slash first", "/slash.jpg", _RENAMED, _PATH, ""),
    ("two slashes", "two//slashes.jpg", _RENAMED, _PATH, ""),
    ("slash last", "slash.jpg/", "a folder in SeaweedFS", "a folder", "a folder marker"),
    ("backslash", "back\\slash.jpg", _RENAMED, "", ""),
    ("dot first", ".hidden.jpg", "", "", _HIDDEN),
    ("two dots first", "..two-dots.jpg", "", "", _HIDDEN),
    ("folder named like a picture", "folder.jpg/picture.jpg", "", "", ""),
    ("space first", " space.jpg", "", "", ""),
    ("space last", "space.jpg ", "", "", "no suffix of a picture"),
    ("no suffix", "no-suffix", "", "", "no suffix of a picture"),
    ("upper-case suffix", "UPPER.JPG", "", "", ""),
    ("dash first", "-rf.jpg", "", "", ""),
    ("percent signs", "%2e%2e%2fpercent.jpg", "", "", ""),
    ("parts of a URL", "a?b=c&d#e+f.jpg", "", "", ""),
    ("SQL", "'; DROP TABLE ledger; --.jpg", "", "", ""),
    ("HTML", "<img src=x onerror=alert(1)>.jpg", "", "", ""),
    ("shell", "$(reboot) `id`.jpg", "", "", ""),
    ("template", "{{7*7}} %s {0}.jpg", "", "", ""),
    ("name of 255 bytes", "n" * 251 + ".jpg", "", "", ""),
    ("key of 1024 bytes", "/".join(["k" * 100] * 9 + ["k" * 111]) + ".jpg", "", "", ""),
    ("name of 1024 bytes", "m" * 1020 + ".jpg", _REFUSED, _LONG, ""),
)


def _key_cases() -> Iterator[Case]:
    for what, key, *reasons in _KEYS:
        # Other bytes for every key, as the same ones would be scored only once.
        data = with_segment(FILES["jpeg"], 0xFE, key.encode())
        name = f"key: {what}"
        yield Case("Keys", name, key, _make(data), None, (WIDTH, HEIGHT), RED, *reasons)


CASES: tuple[Case, ...] = (
    *_refused_cases(),
    *_large_cases(),
    *_good_cases(),
    *_exif_cases(),
    *_key_cases(),
)


def document() -> str:
    """The table for people, as Markdown."""
    lines = [
        "# Bad pictures, and what becomes of them",
        "",
        f"Generated by `python -m tests.bad_pictures`: {len(CASES)} files that the tests make,",
        "ingest, score and compare with this table, at the default settings. Only the limit on",
        "bytes is lower there, so that the file that passes it can be small.",
        "",
        "What is refused keeps its reason and never stops the pictures around it. Sizes are",
        "upright, in pixels.",
    ]
    for group in dict.fromkeys(case.group for case in CASES):
        lines += ["", f"## {group}", "", "| file | outcome | remarks |", "| --- | --- | --- |"]
        lines += [_row(case) for case in CASES if case.group == group]
    return "\n".join(lines)


def _row(case: Case) -> str:
    outcome = f"`{case.reason}`" if case.reason else "scored, {}x{}".format(*case.size or ())
    remarks = [
        f"{where}: {why}"
        for where, why in (
            ("not in the bucket", case.not_in_bucket),
            ("not in a folder", case.not_in_folder),
            ("not ingested", case.not_ingested),
        )
        if why
    ]
    if case.group == "Keys":
        key = json.dumps(case.key if len(case.key) < 60 else case.key[:20] + "…")
        remarks.insert(0, f"``{key}``")
    return f"| {case.name} | {outcome} | {'; '.join(remarks)} |"


if __name__ == "__main__":
    print(document())
