"""Label formats: the text of one label file → boxes.

Every parser returns `Label`s whose boxes are xyxy float64 of shape (N, 4), in upright pixels or,
where the format gives shares of the picture's size, in [0, 1] with `relative` set. What a box
holds is not judged here (`checks` does); a file that cannot be read as its format raises
`LabelError` with reason `BAD_LABEL` or `COUNT_MISMATCH`.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import yaml
from defusedxml import DefusedXmlException, ElementTree

from gun_detection.errors import LabelError

Boxes = npt.NDArray[np.float64]

_GUN_WORDS = re.compile(
    r"gun|pistol|rifle|revolver|firearm|weapon|carbine|musket|glock|^ak.?47$|^smg$", re.IGNORECASE
)


@dataclass(frozen=True, eq=False)
class Label:
    """The boxes of one picture; none of them means a picture without a gun."""

    boxes: Boxes
    relative: bool = False

    def pixels(self, width: int, height: int) -> Boxes:
        """The boxes in pixels of an upright picture of this size."""
        if not self.relative:
            return self.boxes
        return self.boxes * np.array([width, height, width, height], np.float64)


@dataclass(frozen=True)
class NamedBoxes:
    """Boxes with their category names, before the names are narrowed down to guns."""

    boxes: list[list[float]]
    names: list[str]

    def label(self, guns: frozenset[str]) -> Label:
        kept = [box for box, name in zip(self.boxes, self.names, strict=True) if name in guns]
        return Label(to_boxes(kept))


def to_boxes(rows: Iterable[Iterable[float]]) -> Boxes:
    """Rows of four numbers as an array of shape (N, 4), also for N = 0."""
    return np.array([list(row) for row in rows], np.float64).reshape(-1, 4)


def gun_categories(names: Iterable[str]) -> frozenset[str]:
    """The categories that count as guns: those with a gun-like name, or all if none has one.

    A set of one unnamed class (`object`, `0`) is thus read as guns, while `person` and `knife`
    beside `pistol` are left out.
    """
    every = frozenset(names)
    return frozenset(name for name in every if _GUN_WORDS.search(name)) or every


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
    if not lines or len(lines[0]) != 1 or not lines[0][0].isdecimal():
        raise LabelError("the first line is not the number of boxes")
    rows = [_numbers(fields, 4) for fields in lines[1:]]
    if int(lines[0][0]) != len(rows):
        raise LabelError(
            f"the first line says {lines[0][0]} boxes, {len(rows)} follow", reason="COUNT_MISMATCH"
        )
    return Label(to_boxes(rows))


def parse_yolo(data: bytes, names: Mapping[int, str] | None = None) -> Label:
    """One `class cx cy width height` line per box, in shares of the picture's size.

    Without `names` (from `data.yaml`) every class is a gun. An empty file has no gun.
    """
    guns = gun_categories(names.values()) if names else None
    rows = []
    for line in decode_text(data).splitlines():
        if not line.strip():
            continue
        index, cx, cy, width, height = _numbers(line.split(), 5)
        if not index.is_integer() or index < 0:
            raise LabelError(f"{index:g} is not the number of a class")
        if guns is not None and names is not None:
            if int(index) not in names:
                raise LabelError(f"class {index:g} is not named in data.yaml")
            if names[int(index)] not in guns:
                continue
        rows.append([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2])
    return Label(to_boxes(rows), relative=True)


def parse_yolo_names(data: bytes) -> dict[int, str]:
    """Class number → name from a `data.yaml`; empty when it names none."""
    try:
        content = yaml.safe_load(decode_text(data))
    except (yaml.YAMLError, RecursionError) as error:
        raise LabelError(f"data.yaml is not YAML: {_first_line(error)}") from None
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, list):
        return {index: str(name) for index, name in enumerate(names)}
    if isinstance(names, dict) and all(str(index).isdecimal() for index in names):
        return {int(index): str(name) for index, name in names.items()}
    return {}


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
    return NamedBoxes(boxes, names)


def load_json(data: bytes) -> object:
    """The content of a JSON file; raises `LabelError` if it is none."""
    try:
        return json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise LabelError(f"not JSON: {_first_line(error)}") from None


def is_coco(content: object) -> TypeGuard[dict[str, Any]]:
    return (
        isinstance(content, dict)
        and isinstance(content.get("images"), list)
        and isinstance(content.get("annotations"), list)
    )


def parse_coco(content: dict[str, Any]) -> dict[str, Label | LabelError]:
    """COCO detection JSON: file name → its boxes, from `bbox` = x, y, width, height in pixels.

    Crowd regions are skipped. Images without annotations are negatives. Raises `LabelError`
    when the file as a whole is not COCO; a bad annotation makes only its image a fault.
    """
    try:
        names = {item["id"]: str(item["name"]) for item in content.get("categories") or []}
        files = {item["id"]: str(item["file_name"]) for item in content["images"]}
        by_image = _annotations_by_image(content["annotations"])
    except (KeyError, TypeError, AttributeError) as error:
        raise LabelError(f"not COCO: an entry is not as it should be ({error})") from None
    strangers = by_image.keys() - files.keys()
    if strangers:
        raise LabelError(f"not COCO: image_id {next(iter(strangers))!r} is not in `images`")
    guns = gun_categories(names.values())
    labels: dict[str, Label | LabelError] = {}
    for image_id, name in files.items():
        if name in labels:
            labels[name] = LabelError(f"{name} is in `images` twice")
            continue
        try:
            labels[name] = Label(to_boxes(_coco_boxes(by_image[image_id], names, guns)))
        except LabelError as fault:
            labels[name] = fault
    return labels


def _annotations_by_image(annotations: list[Any]) -> dict[Any, list[dict[str, Any]]]:
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        if not annotation.get("iscrowd"):
            by_image[annotation["image_id"]].append(annotation)
    return by_image


def _coco_boxes(
    annotations: list[dict[str, Any]], names: dict[Any, str], guns: frozenset[str]
) -> Iterator[list[float]]:
    for annotation in annotations:
        category = annotation.get("category_id")
        if names and category not in names:
            raise LabelError(f"category {category!r} is not in `categories`")
        if names and names[category] not in guns:
            continue
        bbox = annotation.get("bbox")
        if not isinstance(bbox, list):
            raise LabelError("an annotation has no `bbox`")
        x, y, width, height = _numbers([str(value) for value in bbox], 4)
        yield [x, y, x + width, y + height]


def _numbers(fields: list[str], count: int) -> list[float]:
    if len(fields) != count:
        raise LabelError(f"a line has {len(fields)} fields instead of {count}")
    try:
        return [float(text) for text in fields]
    except ValueError:
        raise LabelError(f"{' '.join(fields)[:60]!r} are not {count} numbers") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
