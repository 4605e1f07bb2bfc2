"""Which label format a tree of files has, and which label belongs to which picture.

| format | recognised by |
| --- | --- |
| COCO | a JSON file with `images` and `annotations` |
| Pascal VOC | `.xml` files beside the pictures or in their own folder (`Annotations/`) |
| counted text | `.txt` files (`Labels/`) that start with the number of boxes |
| YOLO | `.txt` files (`labels/`) of five fields a line; `class_names` finds what the classes are |

A picture and its label share their path but for the suffix and for folders named `images`,
`labels` and the like. A single wrapping folder, as archives have, is looked through.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import PurePosixPath

from gun_detection.datasets.class_names import find_names
from gun_detection.datasets.labels import (
    Label,
    NamedBoxes,
    gun_categories,
    is_coco,
    load_json,
    parse_coco,
    parse_counted_text,
    parse_voc,
    parse_yolo,
)
from gun_detection.datasets.trees import Tree
from gun_detection.errors import DatasetError, ImageError, LabelError

# Formats that the decoder refuses are listed too, so that they are reported and not overlooked.
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif"}
_IMAGE_FOLDERS = {"images", "image", "jpegimages", "imgs", "img"}
_LABEL_FOLDERS = {"labels", "label", "annotations", "annotation", "xmls"}
_NOT_LABELS = {"readme", "license", "licence", "classes", "notes", "train", "val", "valid", "test"}
_MAX_LABEL_BYTES = 2**20
_MAX_COCO_BYTES = 2**30
# More JSON files than this are one file per picture, which COCO never is.
_MAX_JSON_FILES = 16
_SAMPLED_LABELS = 50

LabelOf = Callable[[], Label | LabelError]
Labels = dict[str, LabelOf]
Parse = Callable[[bytes], Label]


@dataclass(frozen=True)
class Sample:
    """One picture with its label; reading it is put off until `read` is called.

    `name` is its path in the source. `read` raises `ImageError`; `label` gives the fault of a
    label that cannot be used instead of raising it.
    """

    name: str
    read: Callable[[], bytes]
    label: LabelOf


@dataclass(frozen=True)
class _Files:
    """The files of a tree under the folder that wraps them all."""

    tree: Tree
    prefix: str
    paths: list[str]
    images: list[str]

    def read_label(self, path: str, max_bytes: int = _MAX_LABEL_BYTES) -> bytes:
        try:
            return self.tree.read(self.prefix + path, max_bytes)
        except ImageError as error:
            raise LabelError(f"the label {path} cannot be read: {error.message}") from None

    def with_suffix(self, *suffixes: str) -> list[str]:
        return [path for path in self.paths if _suffix(path) in suffixes]


def find_samples(tree: Tree, max_image_bytes: int) -> list[Sample]:
    """The samples of a tree in order of their names.

    Raises `DatasetError` when there are no pictures or labels, labels of several formats or of
    unclear classes, or when no class is known to be a gun.
    """
    prefix = _wrapper(tree.paths)
    paths = [path.removeprefix(prefix) for path in tree.paths]
    files = _Files(tree, prefix, paths, [path for path in paths if _suffix(path) in _IMAGES])
    if not files.images:
        raise DatasetError(
            "the source has no pictures: expected .jpg, .png or .webp files with their labels",
            reason="EMPTY_SOURCE",
        )
    finders = {"COCO": _coco_labels, "Pascal VOC": _voc_labels, "text": _text_labels}
    found = {name: labels for name, find in finders.items() if (labels := find(files))}
    if len(found) != 1:
        raise _unclear(list(found))
    (labels,) = found.values()
    return _pair(files, labels, max_image_bytes)


def _unclear(found: list[str]) -> DatasetError:
    if found:
        return DatasetError(
            f"the source has labels in several formats ({', '.join(found)}): keep one of them",
            reason="AMBIGUOUS_LAYOUT",
        )
    return DatasetError(
        "the source has pictures but no labels that are understood: expected Labels/*.txt, "
        "a COCO JSON file, Pascal VOC XML files or YOLO text files",
        reason="UNKNOWN_LAYOUT",
    )


def _pair(files: _Files, labels: Labels, max_image_bytes: int) -> list[Sample]:
    """Every picture with its label, and every label that has no picture, by key."""
    counts = Counter(_key(path) for path in files.images)
    samples = []
    for path in files.images:
        key = _key(path)
        label = labels.get(key) or partial(LabelError, "no label", reason="MISSING_LABEL")
        if counts[key] > 1:
            label = _ambiguous(f"{counts[key]} pictures share the label {key}")
        read = partial(files.tree.read, files.prefix + path, max_image_bytes)
        samples.append(Sample(path, read, label))
    samples += [Sample(key, _missing_image, labels[key]) for key in labels if key not in counts]
    return sorted(samples, key=lambda sample: sample.name)


def _ambiguous(message: str) -> LabelOf:
    return partial(LabelError, message, reason="AMBIGUOUS_LABEL")


def _missing_image() -> bytes:
    raise ImageError("the label has no picture", reason="MISSING_IMAGE")


def _wrapper(paths: list[str]) -> str:
    """The one folder that wraps all files, with its slash, or nothing."""
    tops = {path.split("/", 1)[0] for path in paths}
    if len(tops) != 1 or any("/" not in path for path in paths):
        return ""
    (top,) = tops
    return "" if top.lower() in _IMAGE_FOLDERS | _LABEL_FOLDERS else top + "/"


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _key(path: str) -> str:
    """What a picture and its label have in common."""
    folders = [
        part
        for part in PurePosixPath(path).parts[:-1]
        if part.lower() not in _IMAGE_FOLDERS | _LABEL_FOLDERS
    ]
    return "/".join([*folders, PurePosixPath(path).stem])


def _label_files(files: _Files, suffix: str) -> list[str]:
    """Files of a suffix that belong to a picture or lie in a folder for labels."""
    keys = {_key(path) for path in files.images}
    return [
        path
        for path in files.with_suffix(suffix)
        if _key(path) in keys
        or (
            PurePosixPath(path).stem.lower() not in _NOT_LABELS
            and any(part.lower() in _LABEL_FOLDERS for part in PurePosixPath(path).parts[:-1])
        )
    ]


def _collect(pairs: Iterable[tuple[str, LabelOf]]) -> Labels:
    """Labels by key; where two labels mean the same picture, neither is believed."""
    labels: Labels = {}
    for key, label in pairs:
        labels[key] = _ambiguous(f"two labels for {key}") if key in labels else label
    return labels


def _coco_labels(files: _Files) -> Labels:
    paths = files.with_suffix(".json")
    if len(paths) > _MAX_JSON_FILES:
        return {}
    read = {path: _read_coco(files, path) for path in paths}
    guns = gun_categories(name for names, _ in read.values() for name in names)
    unnamed = (labels.values() for names, labels in read.values() if not names)
    _check_single(_class_names(chain.from_iterable(unnamed)))
    by_path = {path: _key(path) for path in files.images}
    by_name = defaultdict(set)
    for path, key in by_path.items():
        by_name[PurePosixPath(path).name].add(key)
    return _collect(
        (
            _coco_key(name, PurePosixPath(path).parent, by_path, by_name),
            partial(_named_label, item, guns if names else None),
        )
        for path, (names, labels) in read.items()
        for name, item in labels.items()
    )


def _read_coco(
    files: _Files, path: str
) -> tuple[frozenset[str], dict[str, NamedBoxes | LabelError]]:
    """The classes and labels of a COCO file, none of a JSON file that is something else."""
    try:
        content = load_json(files.read_label(path, _MAX_COCO_BYTES))
        return parse_coco(content) if is_coco(content) else (frozenset(), {})
    except LabelError as error:
        raise DatasetError(f"{path}: {error.message}", reason="BAD_LABEL") from error


def _coco_key(
    name: str, folder: PurePosixPath, by_path: dict[str, str], by_name: Mapping[str, set[str]]
) -> str:
    """The key of the picture that a COCO file means: by path, else by a name that is unique."""
    for path in (name, f"images/{name}", str(folder / name), str(folder.parent / name)):
        if path in by_path:
            return by_path[path]
    same_name = by_name.get(PurePosixPath(name).name, set())
    return next(iter(same_name)) if len(same_name) == 1 else _key(name)


def _voc_labels(files: _Files) -> Labels:
    parsed = _parse_all(files, _label_files(files, ".xml"), parse_voc)
    guns = gun_categories(_class_names(item for _, item in parsed))
    return _collect((key, partial(_named_label, item, guns)) for key, item in parsed)


def _parse_all(
    files: _Files, paths: list[str], parse: Callable[[bytes], NamedBoxes]
) -> list[tuple[str, NamedBoxes | LabelError]]:
    """(key, boxes or why there are none) of every label file."""
    parsed: list[tuple[str, NamedBoxes | LabelError]] = []
    for path in paths:
        try:
            parsed.append((_key(path), parse(files.read_label(path))))
        except LabelError as fault:
            parsed.append((_key(path), fault))
    return parsed


def _class_names(items: Iterable[NamedBoxes | LabelError]) -> set[str]:
    return {name for item in items if isinstance(item, NamedBoxes) for name in item.names}


def _check_single(numbers: set[str]) -> None:
    """A single class without a name is taken for guns; of several only some may be."""
    if len(numbers) > 1:
        some = ", ".join(number[:10] for number in sorted(numbers)[:20])
        raise DatasetError(
            f"the labels have {len(numbers)} classes ({some}), and nothing says which are guns: "
            "name them in data.yaml or classes.txt (YOLO) or in `categories` (COCO)",
            reason="UNKNOWN_CLASSES",
        )


def _named_label(item: NamedBoxes | LabelError, guns: frozenset[str] | None) -> Label | LabelError:
    try:
        return item.label(guns) if isinstance(item, NamedBoxes) else item
    except LabelError as fault:
        return fault


def _text_labels(files: _Files) -> Labels:
    paths = _label_files(files, ".txt")
    if not paths:
        return {}
    if _are_counted(files, paths):
        parsers: list[Parse] = [parse_counted_text] * len(paths)
    else:
        names_of = find_names(files.paths, paths, files.read_label)
        if not any(names_of):
            return _unnamed_labels(files, paths)
        distinct = {id(names): names for names in names_of}.values()
        guns = gun_categories(name for names in distinct for name in names.values())
        parsers = [partial(_yolo_label, names=names, guns=guns) for names in names_of]
    return _collect(
        (_key(path), partial(_text_label, files, path, parse))
        for path, parse in zip(paths, parsers, strict=True)
    )


def _text_label(files: _Files, path: str, parse: Parse) -> Label | LabelError:
    try:
        return parse(files.read_label(path))
    except LabelError as fault:
        return fault


def _are_counted(files: _Files, paths: list[str]) -> bool:
    """Whether they are counted text and not YOLO, by what most of a sample of them look like."""
    step = max(1, len(paths) // _SAMPLED_LABELS)
    votes = [_text_vote(files, path) for path in paths[::step]]
    counted, yolo = votes.count("counted"), votes.count("yolo")
    if max(counted, yolo) <= 5 * min(counted, yolo):
        raise DatasetError(
            f"the .txt labels are of no single format (of {len(votes)} looked at, {counted} start "
            f"with a count and {yolo} are YOLO lines): keep one format",
            reason="AMBIGUOUS_LAYOUT",
        )
    return counted > yolo


def _yolo_label(data: bytes, names: Mapping[int, str], guns: frozenset[str]) -> Label:
    return parse_yolo(data, names).label(guns)


def _unnamed_labels(files: _Files, paths: list[str]) -> Labels:
    """YOLO labels whose classes no file names."""
    parsed = _parse_all(files, paths, parse_yolo)
    _check_single(_class_names(item for _, item in parsed))
    return _collect((key, partial(_named_label, item, None)) for key, item in parsed)


def _text_vote(files: _Files, path: str) -> str | None:
    try:
        lines = files.read_label(path).split(b"\n", 1)
    except LabelError:
        return None
    return {1: "counted", 5: "yolo"}.get(len(lines[0].split()))
