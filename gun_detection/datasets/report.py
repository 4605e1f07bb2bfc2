"""The report of an ingested or refused source: as data, and as a page that needs no other file."""

import base64
import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gun_detection.datasets.checks import Problem
from gun_detection.datasets.findings import Findings
from gun_detection.datasets.groups import SPLITS
from gun_detection.datasets.manifest import (
    Entry,
    Manifest,
    html_report_key,
    image_key,
    report_key,
)
from gun_detection.images import DecodeLimits, decode, encode_jpeg
from gun_detection.settings import Settings
from gun_detection.storage import Storage

_EXAMPLES = 8
_THUMBNAILS = 12
_THUMBNAIL_SIDE = 240
_BINS = 10
_RED = (230, 30, 30)

_KINDS = ("image", "box", "clipped", "duplicate")
_MEANINGS = {
    "BAD_BOX": "a box cannot be used, so the picture is left out",
    "BAD_LABEL": "the label cannot be read",
    "COUNT_MISMATCH": "the label counts other boxes than it has",
    "CROWD": "guns are marked together, not one by one",
    "AMBIGUOUS_LABEL": "several pictures or labels have the same name",
    "MISSING_LABEL": "the picture has no label",
    "MISSING_IMAGE": "the label has no picture",
    "DUPLICATE": "a further copy of the same bytes",
    "LABEL_CONFLICT": "the same bytes have another label elsewhere",
    "SIZE_MISMATCH": "the label is for a picture of another size",
    "BRIDGES_SPLITS": "like earlier pictures of more than one split",
    "NOT_FINITE": "a coordinate is not a number",
    "INVERTED": "left and right or top and bottom are exchanged",
    "ZERO_AREA": "the box has no area",
    "OUT_OF_FRAME": "the box reaches over the edge of the picture",
    "TOO_SMALL": "the picture or the box is too small",
    "TOO_NARROW": "one side is more than 100 times the other",
}


def describe(source: str, dataset: Manifest, findings: Findings) -> dict[str, Any]:
    """The report of a data set version, ready for JSON."""
    return {
        "status": "accepted",
        "dataset_id": dataset.id,
        "holdout_id": dataset.holdout_id,
        "source": source,
        "counts": _counts(findings) | _group_counts(dataset),
        "splits": {split: _split_counts(dataset.split(split)) for split in SPLITS},
        "classes": _classes(findings),
        "box_sizes": _box_sizes(dataset.entries),
        "reasons": _reasons(findings.problems),
        "problems": [asdict(problem) for problem in findings.problems],
    }


def describe_rejected(source: str, findings: Findings, budget: float) -> dict[str, Any]:
    """The report of a source that was refused, ready for JSON."""
    return {
        "status": "refused",
        "source": source,
        "budget": budget,
        "counts": _counts(findings),
        "classes": _classes(findings),
        "reasons": _reasons(findings.problems),
        "problems": [asdict(problem) for problem in findings.problems],
    }


def store(dataset: Manifest, content: dict[str, Any], settings: Settings, storage: Storage) -> str:
    """Write both forms of a version's report; the key of the page."""
    bucket, page = settings.data_bucket, _page(dataset, content, settings, storage)
    _store(storage, bucket, report_key(dataset.id), html_report_key(dataset.id), content, page)
    return html_report_key(dataset.id)


def store_again(
    dataset: Manifest, content: dict[str, Any], source: str, settings: Settings, storage: Storage
) -> str:
    """The key of the page for a further ingest of a version, which was made from `source`.

    It is the version's own, unless this ingest found other things: pictures that cannot be used are
    no part of the version.
    """
    bucket, first = settings.data_bucket, report_key(dataset.id)
    expected = _json(content | {"source": source})
    if storage.exists(bucket, first) and storage.get(bucket, first) == expected:
        return html_report_key(dataset.id)
    key = f"datasets/{dataset.id}/report-{hashlib.sha256(_json(content)).hexdigest()}"
    page = _page(dataset, content, settings, storage)
    _store(storage, bucket, f"{key}.json", f"{key}.html", content, page)
    return f"{key}.html"


def store_rejected(source: str, findings: Findings, settings: Settings, storage: Storage) -> str:
    """Write both forms of the report of a refused source; the key of the page."""
    content = describe_rejected(source, findings, settings.dataset_reject_budget)
    digest = hashlib.sha256(_json(content)).hexdigest()
    key = f"datasets/rejected/{digest}/report"
    page = render(content, [])
    _store(storage, settings.data_bucket, f"{key}.json", f"{key}.html", content, page)
    return f"{key}.html"


def _store(
    storage: Storage, bucket: str, json_key: str, html_key: str, content: dict[str, Any], page: str
) -> None:
    storage.put_if_absent(bucket, json_key, _json(content), content_type="application/json")
    html = page.encode("utf-8", "replace")
    storage.put_if_absent(bucket, html_key, html, content_type="text/html; charset=utf-8")


def _page(dataset: Manifest, content: dict[str, Any], settings: Settings, storage: Storage) -> str:
    """Reads a few images back for the thumbnails."""
    examples = _examples(dataset.entries)
    return render(content, [_thumbnail(entry, settings, storage) for entry in examples])


def render(content: dict[str, Any], thumbnails: list[dict[str, Any]]) -> str:
    """The page; `thumbnails` have `name`, `split`, `boxes` (a number) and `uri` (a data URI)."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.jinja")
    return template.render(report=content, thumbnails=thumbnails, meanings=_MEANINGS)


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode("ascii")


def _counts(findings: Findings) -> dict[str, int]:
    kinds = Counter(problem.kind for problem in findings.problems)
    reasons = Counter(problem.reason for problem in findings.problems)
    return {
        "files": findings.files,
        "images": len(findings.kept),
        "boxes": findings.boxes,
        "other_boxes": sum(
            not is_gun for image in findings.kept.values() for _, is_gun in image.classes
        ),
        "negatives": sum(len(image.boxes) == 0 for image in findings.kept.values()),
        "duplicates": findings.duplicates,
        "label_conflicts": reasons["LABEL_CONFLICT"],
        "clipped_boxes": kinds["clipped"],
        "rejected_images": findings.rejected_images,
        "rejected_boxes": findings.rejected_boxes,
    }


def _classes(findings: Findings) -> dict[str, dict[str, int]]:
    """Boxes by class, of those that count as guns and of others; none if labels name no classes.

    As everywhere, of the pictures that are kept.
    """
    boxes = Counter(item for image in findings.kept.values() for item in image.classes)
    found: dict[str, dict[str, int]] = {"guns": {}, "others": {}}
    for (name, is_gun), count in sorted(boxes.items()):
        found["guns" if is_gun else "others"][name] = count
    return found if boxes else {}


def _group_counts(dataset: Manifest) -> dict[str, int]:
    sizes = Counter(entry.group for entry in dataset.entries)
    return {"groups": len(sizes), "largest_group": max(sizes.values())}


def _split_counts(entries: tuple[Entry, ...]) -> dict[str, int]:
    return {
        "images": len(entries),
        "boxes": sum(len(entry.boxes) for entry in entries),
        "negatives": sum(not entry.boxes for entry in entries),
        "groups": len({entry.group for entry in entries}),
    }


def _box_sizes(entries: tuple[Entry, ...]) -> list[int]:
    """How many boxes have which size, the root of their area over the shorter side, in tenths."""
    sizes = [
        ((x2 - x1) * (y2 - y1)) ** 0.5 / min(entry.width, entry.height)
        for entry in entries
        for x1, y1, x2, y2 in entry.boxes
    ]
    # A box of a panorama can be larger than the shorter side; it counts in the last bin.
    counts, _ = np.histogram(np.clip(sizes, 0, 1), bins=_BINS, range=(0, 1))
    return [int(count) for count in counts]


def _reasons(problems: list[Problem]) -> list[dict[str, Any]]:
    """By kind and reason: how many, and the first few."""
    found: dict[tuple[str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        found[problem.kind, problem.reason].append(problem)
    return [
        {
            "kind": kind,
            "reason": reason,
            "count": len(items),
            "first": [{"name": item.name, "message": item.message} for item in items[:_EXAMPLES]],
        }
        for (kind, reason), items in sorted(
            found.items(), key=lambda item: (_KINDS.index(item[0][0]), item[0][1])
        )
    ]


def _examples(entries: tuple[Entry, ...]) -> list[Entry]:
    """A few images spread over the set; their order by sha256 is as good as random."""
    with_boxes = [entry for entry in entries if entry.boxes]
    negatives = [entry for entry in entries if not entry.boxes]
    few = negatives[: _THUMBNAILS // 4]
    return with_boxes[: _THUMBNAILS - len(few)] + few


def _thumbnail(entry: Entry, settings: Settings, storage: Storage) -> dict[str, Any]:
    data = storage.get(settings.data_bucket, image_key(entry.sha256))
    pixels = decode(data, DecodeLimits.from_settings(settings)).pixels
    scale = min(1.0, _THUMBNAIL_SIDE / max(entry.width, entry.height))
    size = max(1, round(entry.width * scale)), max(1, round(entry.height * scale))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    for box in entry.boxes:
        x1, y1, x2, y2 = (round(value * scale) for value in box)
        cv2.rectangle(small, (x1, y1), (x2 - 1, y2 - 1), _RED, 2)
    uri = base64.b64encode(encode_jpeg(small.astype(np.uint8), 80)).decode()
    return {
        "name": entry.name,
        "split": entry.split,
        "boxes": len(entry.boxes),
        "width": size[0],
        "height": size[1],
        "uri": f"data:image/jpeg;base64,{uri}",
    }
