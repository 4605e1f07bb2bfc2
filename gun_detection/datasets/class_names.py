"""Which file of a source names the classes of which YOLO labels.

| file | holds |
| --- | --- |
| `data.yaml`, or else any other YAML file | `names`: a list, or numbers with names |
| `classes.txt`, `*.names`, `*.labels` | a name on each line, from class 0 on |
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import PurePosixPath

from gun_detection.datasets.labels import parse_name_lines, parse_yolo_names
from gun_detection.errors import DatasetError, LabelError

Names = dict[int, str]
_Read = Callable[[str], bytes]
# By folder.
_Found = dict[PurePosixPath, Names]

_YAML = {".yaml", ".yml"}
_LISTS = {".names", ".labels"}
# More YAML files than this beside labels are one per picture, which name no classes.
_MAX_YAML_FILES = 64


def find_names(paths: list[str], labels: list[str], read: _Read) -> list[Names]:
    """For every label file the names of its classes, from the nearest `data.yaml` above it, or else
    from the nearest other file that has names; all of them are empty where no file has.

    A single `data.yaml` that lies beside all of them names the classes of all. Raises
    `DatasetError` for files that cannot be read, contradict each other or leave out some labels.
    """
    found = _in_data_yaml(paths, read)
    near = [_nearest(found, label) for label in labels]
    if len(found) == 1 and not any(near):
        return [*found.values()] * len(labels)
    others: _Found = {} if all(near) else _in_others(paths, labels, read)
    near = [names or _nearest(others, label) for names, label in zip(near, labels, strict=True)]
    if (found or others) and not all(near):
        raise DatasetError(
            f"no data.yaml or other names of classes are above {labels[near.index({})]}, and those "
            "of other folders may not mean it: give each part of the source its own",
            reason="AMBIGUOUS_LAYOUT",
        )
    return near


def _nearest(found: _Found, label: str) -> Names:
    return next((found[top] for top in PurePosixPath(label).parents if top in found), {})


def _in_data_yaml(paths: list[str], read: _Read) -> _Found:
    found: _Found = {}
    for path in map(PurePosixPath, paths):
        if path.stem == "data" and path.suffix.lower() in _YAML:
            names = _names(path, read, parse_yolo_names)
            if names:
                found.setdefault(path.parent, names)
    return found


def _in_others(paths: list[str], labels: list[str], read: _Read) -> _Found:
    """What other files in folders above the labels have."""
    taken = set(labels)
    above = {top for label in labels for top in PurePosixPath(label).parents}
    near = [path for path in map(PurePosixPath, paths) if path.parent in above]
    yamls = [path for path in near if path.suffix.lower() in _YAML and path.stem != "data"]
    lists = [
        path
        for path in near
        if path.suffix.lower() in _LISTS
        or (path.name.lower() == "classes.txt" and str(path) not in taken)
    ]
    found: _Found = {}
    for path in yamls if len(yamls) <= _MAX_YAML_FILES else []:
        # Such files may be anything.
        with suppress(LabelError):
            _add(found, path, parse_yolo_names(read(str(path))))
    for path in lists:
        _add(found, path, _names(path, read, parse_name_lines))
    return found


def _names(path: PurePosixPath, read: _Read, parse: Callable[[bytes], Names]) -> Names:
    try:
        return parse(read(str(path)))
    except LabelError as error:
        raise DatasetError(f"{path}: {error.message}", reason="BAD_LABEL") from error


def _add(found: _Found, path: PurePosixPath, names: Names) -> None:
    if names and found.setdefault(path.parent, names) != names:
        raise DatasetError(
            f"{path} names other classes than another file beside it: keep one of them, or write "
            "the names into data.yaml",
            reason="AMBIGUOUS_LAYOUT",
        )
