"""Label formats: the text of one label file → boxes.

Every parser returns boxes as xyxy float64 of shape (N, 4), in upright pixels or, where the format
gives shares of the picture's size, in [0, 1] with `relative` set: a `Label`, or `NamedBoxes` where
boxes have classes. What a box holds is not judged here (`checks` does); a file that cannot be read
as its format raises `LabelError` with reason `BAD_LABEL` or `COUNT_MISMATCH`.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import yaml
from defusedxml import DefusedXmlException, ElementTree

from gun_detection.errors import DatasetError, LabelError

Boxes = npt.NDArray[np.float64]
# Width and height.
Size = tuple[float, float]

# A name becomes words: at whatever is no letter or digit, and where camel case starts a new one.
_GAPS = re.compile(r"[\W_]+|(?<=[a-z0-9])(?=[A-Z])")
# The group is how the word begins, as in handgun; what goes on is something else, as in gunman.
_GUNS = re.compile(
    r"\b(\w*)(?:(?:gun|rifle|revolver|firearm|weapon|carbine|musket|glock|smg|sniper|bazooka"
    r"|launcher)s?\d*|pistol\w*)\b|\bak ?47\b"
)
_NO_GUNS = {"no", "non", "not", "without"}
_NO_GUNS |= {"toy", "water", "glue", "nail", "heat", "staple", "spray", "massage"}
_NUMBER = re.compile(r"[0-9]{1,9}")
_GENERIC = re.compile(r"(?:(?:obj|object|class|item|target|label|thing)s?)? ?\d*")


@dataclass(frozen=True, eq=False)
class Label:
    """The boxes of one picture; none of them means a picture without a gun.

    `size` is what the label says of the picture, if it does. `classes` has the name of every box
    that the label file has, and whether it counts as a gun.
    """

    boxes: Boxes
    relative: bool = False
    size: Size | None = None
    classes: tuple[tuple[str, bool], ...] = ()

    def pixels(self, width: int, height: int) -> Boxes:
        """The boxes in pixels of an upright picture of this size."""
        if not self.relative:
            return self.boxes
        return self.boxes * np.array([width, height, width, height], np.float64)


@dataclass(frozen=True, eq=False)
class NamedBoxes:
    """Boxes with the names of their classes, before these are narrowed down to guns.

    `crowds` are the classes of regions that mark many things as one.
    """

    boxes: Boxes
    names: list[str]
    relative: bool = False
    size: Size | None = None
    crowds: tuple[str, ...] = ()

    def label(self, guns: frozenset[str] | None) -> Label:
        """The boxes of the classes that are guns, or all.

        Raises `LabelError` with reason `CROWD` where guns are marked as a crowd: without boxes they
        would pass for background.
        """
        if any(guns is None or name in guns for name in self.crowds):
            raise LabelError(
                "guns are in a crowd region (iscrowd), without boxes of their own: mark each gun",
                reason="CROWD",
            )
        classes = tuple((name, guns is None or name in guns) for name in self.names)
        kept = np.array([is_gun for _, is_gun in classes], bool)
        return Label(self.boxes[kept], self.relative, self.size, classes)


def to_boxes(rows: Iterable[Iterable[float]]) -> Boxes:
    """Rows of four numbers as an array of shape (N, 4), also for N = 0."""
    return np.array([list(row) for row in rows], np.float64).reshape(-1, 4)


def gun_categories(names: Iterable[str]) -> frozenset[str]:
    """Of the classes of a whole source those that are guns, by the words in their names.

    `person`, `toy gun` and `no-weapon` are left out. Where no name tells, all are guns, if there
    is one class or the names mean nothing (`object`, `class_1`, `0`). Raises `DatasetError` with
    reason `UNKNOWN_CLASSES` otherwise.
    """
    every = frozenset(names)
    words = {name: " ".join(_GAPS.split(name)).strip().lower() for name in every}
    found = {name: _GUNS.findall(text) for name, text in words.items()}
    guns = frozenset(
        name
        for name, starts in found.items()
        if starts and _NO_GUNS.isdisjoint([*starts, *words[name].split()])
    )
    alone = len(every) == 1 and not any(found.values())
    if guns or alone or all(map(_GENERIC.fullmatch, words.values())):
        return guns or every
    some = ", ".join(name[:40] for name in sorted(every)[:20])
    raise DatasetError(
        f"no class has the name of a gun ({some}): rename those that are guns to gun, or leave out "
        "the others",
        reason="UNKNOWN_CLASSES",
    )


def decode_text(data: bytes) -> str:
    """Raises `LabelError` for bytes that are not UTF-8 text."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LabelError("the label is not UTF-8 text") from None


def parse_counted_text(data: bytes) -> Label:
    """First line the number of boxes, then one `x1 y1 x2 y2` line per box, in pixels.

    `0` alone is a picture without a gun. Raises `LabelError`, with reason `COUNT_MISMATCH`
    when the first line does not count the lines that follow it.
    """
    lines = [line.split() for line in decode_text(data).splitlines() if line.strip()]
    # Python refuses to read numbers of thousands of digits.
    if not lines or len(lines[0]) != 1 or not lines[0][0].isdecimal() or len(lines[0][0]) > 9:
        raise LabelError("the first line is not the number of boxes")
    rows = [_numbers(fields, 4) for fields in lines[1:]]
    if int(lines[0][0]) != len(rows):
        raise LabelError(
            f"the first line says {lines[0][0]} boxes, {len(rows)} follow", reason="COUNT_MISMATCH"
        )
    return Label(to_boxes(rows))


def parse_yolo(data: bytes, names: Mapping[int, str] | None = None) -> NamedBoxes:
    """One `class cx cy width height` line per box, in shares of the picture's size.

    Without `names` a class is named by its number. An empty file has no gun.
    """
    rows, classes = [], []
    for line in decode_text(data).splitlines():
        if not line.strip():
            continue
        index, cx, cy, width, height = _numbers(line.split(), 5)
        if not index.is_integer() or index < 0:
            raise LabelError(f"{index:g} is not the number of a class")
        if names and int(index) not in names:
            raise LabelError(f"class {index:g} has no name in data.yaml, or the file in its place")
        classes.append(names[int(index)] if names else f"{index:.0f}")
        rows.append([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2])
    return NamedBoxes(to_boxes(rows), classes, relative=True)


def parse_yolo_names(data: bytes) -> dict[int, str]:
    """Class number → name from a `data.yaml`; empty when it names none."""
    try:
        # All scalars are text: a class may be called no, and nothing is made of tags.
        content = yaml.load(decode_text(data), yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LabelError(f"data.yaml is not YAML: {_first_line(error)}") from None
    names = (content.get("names") if isinstance(content, dict) else None) or {}
    if isinstance(names, list):
        names = {str(index): name for index, name in enumerate(names)}
    # What aliases repeat may be endless when it is written out.
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise LabelError("`names` in data.yaml is neither a list nor numbers with names")
    if not all(isinstance(index, str) and _NUMBER.fullmatch(index) for index in names):
        raise LabelError("`names` in data.yaml has keys that are no numbers of classes")
    return {int(index): name for index, name in names.items()}


def parse_name_lines(data: bytes) -> dict[int, str]:
    """Class number → name from a `classes.txt`, of which each line names a class, from 0 on."""
    lines = decode_text(data).splitlines()
    return {index: line.strip() for index, line in enumerate(lines) if line.strip()}


def parse_voc(data: bytes) -> NamedBoxes:
    """A Pascal VOC annotation: `object/name`, `object/bndbox/{xmin,ymin,xmax,ymax}` in pixels."""
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, DefusedXmlException) as error:
        raise LabelError(f"not a readable XML file: {_first_line(error)}") from None
    if root.tag != "annotation":
        raise LabelError(f"the XML root is <{root.tag}>, not <annotation>")
    boxes, names = [], []
    for item in root.iterfind("object"):
        corners = [item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        boxes.append(_numbers([text or "" for text in corners], 4))
        names.append((item.findtext("name") or "").strip())
    size = _size(root.findtext("size/width"), root.findtext("size/height"))
    return NamedBoxes(to_boxes(boxes), names, size=size)


def load_json(data: bytes) -> object:
    """The content of a JSON file; raises `LabelError` if it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise LabelError(f"not JSON: {_first_line(error)}") from None


def is_coco(content: object) -> TypeGuard[dict[str, Any]]:
    return (
        isinstance(content, dict)
        and isinstance(content.get("images"), list)
        and isinstance(content.get("annotations"), list)
    )


def parse_coco(
    content: dict[str, Any],
) -> tuple[frozenset[str], dict[str, NamedBoxes | LabelError]]:
    """COCO detection JSON: the names of its categories, and file name → its boxes.

    They come from `bbox` = x, y, width, height in pixels; without `categories` their class is
    named by its number. Of crowd regions only the class is kept. Images without annotations are
    negatives.
    Raises `LabelError` when the file as a whole is not COCO; a bad annotation makes only its
    image a fault.
    """
    try:
        names = {item["id"]: str(item["name"]) for item in content.get("categories") or []}
        images = {item["id"]: (str(item["file_name"]), item) for item in content["images"]}
        by_image = _annotations_by_image(content["annotations"])
    except (KeyError, TypeError, AttributeError) as error:
        raise LabelError(f"not COCO: an entry is not as it should be ({error})") from None
    strangers = by_image.keys() - images.keys()
    if strangers:
        raise LabelError(f"not COCO: image_id {next(iter(strangers))!r} is not in `images`")
    labels: dict[str, NamedBoxes | LabelError] = {}
    for image_id, (name, image) in images.items():
        if name in labels:
            labels[name] = LabelError(f"{name} is in `images` twice")
            continue
        try:
            size = _size(image.get("width"), image.get("height"))
            labels[name] = _coco_boxes(by_image[image_id], names, size)
        except LabelError as fault:
            labels[name] = fault
    return frozenset(names.values()), labels


def _annotations_by_image(annotations: list[Any]) -> dict[Any, list[dict[str, Any]]]:
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        by_image[annotation["image_id"]].append(annotation)
    return by_image


def _coco_boxes(
    annotations: list[dict[str, Any]], names: dict[Any, str], size: Size | None
) -> NamedBoxes:
    rows, classes, crowds = [], [], []
    for annotation in annotations:
        category = annotation.get("category_id")
        if names and not (isinstance(category, Hashable) and category in names):
            raise LabelError(f"category {category!r} is not in `categories`")
        name = names[category] if names else str(category)
        if annotation.get("iscrowd"):
            crowds.append(name)
            continue
        bbox = annotation.get("bbox")
        if not isinstance(bbox, list):
            raise LabelError("an annotation has no `bbox`")
        x, y, width, height = _numbers([str(value) for value in bbox], 4)
        rows.append([x, y, x + width, y + height])
        classes.append(name)
    return NamedBoxes(to_boxes(rows), classes, size=size, crowds=tuple(crowds))


def _size(width: object, height: object) -> Size | None:
    """The size that a label states; many tools leave it out or write 0."""
    try:
        size = float(str(width)), float(str(height))
    except ValueError:
        return None
    return size if all(0 < side < math.inf for side in size) else None


def _numbers(fields: list[str], count: int) -> list[float]:
    if len(fields) != count:
        raise LabelError(f"a line has {len(fields)} fields instead of {count}")
    try:
        return [float(text) for text in fields]
    except ValueError:
        raise LabelError(f"{' '.join(fields)[:60]!r} are not {count} numbers") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
