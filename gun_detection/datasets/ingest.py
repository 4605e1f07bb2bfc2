"""Ingesting: from a source to an immutable data set version.

Images go to the data bucket under their sha256, then the manifest and the report, and last the
row in the database: what a crash leaves behind is no version, and the next attempt uses it.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import DatasetVersion, ModelVersion, Promotion
from gun_detection.datasets import manifest as keys
from gun_detection.datasets import report
from gun_detection.datasets.findings import Findings, Kept, look_at
from gun_detection.datasets.groups import SPLITS, Placement, place
from gun_detection.datasets.manifest import Entry, Manifest, load_manifest
from gun_detection.datasets.sources import Source, open_source
from gun_detection.errors import DatasetError
from gun_detection.images import SandboxedDecoder
from gun_detection.settings import Settings
from gun_detection.storage import Storage

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

_UPLOADERS = 8
# Bounds the time of an ingest where every night has a source of its own name.
_REMEMBERED_SOURCES = 32
_BRIDGES = "it resembles earlier pictures of more than one split: in either it would be a leak"


@dataclass(frozen=True)
class IngestResult:
    """`created` is False when this version was there before; `counts` are those of the report, and
    `page_key` is that of its page.
    """

    dataset_id: str
    created: bool
    holdout_id: str
    counts: dict[str, int]
    report: dict[str, Any]
    page_key: str


def ingest(
    spec: str,
    settings: Settings,
    storage: Storage,
    session: Session,
    progress: Progress | None = None,
) -> IngestResult:
    """Check, store and describe the data set that `spec` names; `progress` gets (done, total).

    The same data gives the same id and stores nothing new, but a report of its own where other
    things were found beside it. The caller commits the session. Give it one that has asked nothing
    yet: no transaction is open then while the source and the bucket are read and written.

    Raises `DatasetError` when nothing can be used, when more is rejected than the budget allows
    (the report is stored all the same), when a split would have no picture with a gun or when an
    earlier manifest is damaged; besides what `open_source` raises.
    """
    storage.ensure_bucket(settings.data_bucket)
    with open_source(spec, settings, storage) as source:
        findings = _inspect(source, settings, storage, progress)
        name = source.name.encode("utf-8", "replace").decode()
    _check_budget(name, findings, settings, storage)
    known = _known_placements(settings, storage)
    dataset = _manifest(findings, known, settings)
    _check_splits(dataset)
    content = report.describe(name, dataset, findings)
    created, page_key = _publish(name, dataset, content, settings, storage, session)
    log.info(
        "data set ingested" if created else "data set is unchanged: nothing new was stored",
        extra={"dataset": dataset.id, "source": name} | content["counts"] | content["classes"],
    )
    return IngestResult(
        dataset.id, created, dataset.holdout_id, content["counts"], content, page_key
    )


def _inspect(
    source: Source, settings: Settings, storage: Storage, progress: Progress | None
) -> Findings:
    """Look at the samples one by one and upload the images that can be used."""
    findings = Findings()
    with SandboxedDecoder(settings) as decoder, _uploads(settings, storage) as upload:
        for done, sample in enumerate(source, start=1):
            checked = look_at(sample, findings, decoder.decode)
            if checked is not None:
                upload(checked.sha256, checked.data)
            if progress is not None:
                progress(done, len(source))
    return findings


@contextmanager
def _uploads(settings: Settings, storage: Storage) -> Iterator[Callable[[str, bytes], None]]:
    """A function that stores an image unless it is there, in a few threads at once."""
    pending: list[Future[None]] = []

    def store(sha256: str, data: bytes) -> None:
        key = keys.image_key(sha256)
        if not storage.exists(settings.data_bucket, key):
            storage.put_if_absent(settings.data_bucket, key, data)

    with ThreadPoolExecutor(_UPLOADERS) as pool:

        def upload(sha256: str, data: bytes) -> None:
            # Waiting for the oldest keeps the number of images in memory small.
            if len(pending) >= 2 * _UPLOADERS:
                pending.pop(0).result()
            pending.append(pool.submit(store, sha256, data))

        yield upload
        for future in pending:
            future.result()


def _check_budget(name: str, findings: Findings, settings: Settings, storage: Storage) -> None:
    budget = settings.dataset_reject_budget
    images = findings.files - findings.duplicates
    boxes = findings.boxes + findings.rejected_boxes
    if findings.files == 0:
        raise DatasetError(f"{name} has no pictures", reason="EMPTY_SOURCE")
    within = (
        findings.rejected_images <= budget * images and findings.rejected_boxes <= budget * boxes
    )
    if within and findings.kept:
        return
    key = report.store_rejected(name, findings, settings, storage)
    rejects = [problem for problem in findings.problems if problem.kind == "image"]
    first = "; ".join(
        f"{problem.name}: {problem.reason} ({problem.message})" for problem in rejects[:3]
    )
    raise DatasetError(
        f"{name} is refused: {findings.rejected_images} of {images} images and "
        f"{findings.rejected_boxes} of {boxes} boxes cannot be used, the budget is {budget:.0%}. "
        f"First: {first}. Full report: s3://{settings.data_bucket}/{key}. "
        "Correct the data or raise GUN_DETECTION_DATASET_REJECT_BUDGET",
        reason="REJECT_BUDGET",
    )


def _known_placements(settings: Settings, storage: Storage) -> dict[str, Placement]:
    """Where images belong by the newest version of every source, of which the youngest decides, and
    before all by what the last champions learned from.
    """
    source, made = DatasetVersion.source, DatasetVersion.created_at
    newest = select(source, func.max(made)).group_by(source)
    youngest = (
        select(DatasetVersion.id)
        .where(tuple_(source, made).in_(newest))
        .order_by(made.desc())
        .limit(_REMEMBERED_SOURCES)
    )
    learned = (
        select(ModelVersion.dataset_id)
        .join(Promotion, Promotion.model_id == ModelVersion.id)
        .where(ModelVersion.dataset_id.is_not(None))
        .group_by(ModelVersion.dataset_id)
        .order_by(func.max(Promotion.id).desc())
        .limit(_REMEMBERED_SOURCES)
    )
    with open_session(settings) as session:
        ids = dict.fromkeys([*session.scalars(learned), *session.scalars(youngest)])
    known: dict[str, Placement] = {}
    for dataset_id in ids:
        for entry in load_manifest(storage, settings.data_bucket, dataset_id).entries:
            known.setdefault(entry.sha256, entry.placement)
    return known


def _manifest(findings: Findings, known: dict[str, Placement], settings: Settings) -> Manifest:
    """The manifest of what is kept; the findings keep no picture that belongs into no split."""
    hashes = {sha256: image.phash for sha256, image in findings.kept.items()}
    placed = place(hashes, known, settings.validation_share, settings.holdout_share)
    for sha256 in sorted(hashes.keys() - placed.keys()):
        findings.leave_out(sha256, "BRIDGES_SPLITS", _BRIDGES)
    return Manifest(tuple(_entries(findings.kept, placed)))


def _entries(kept: dict[str, Kept], placed: dict[str, Placement]) -> Iterable[Entry]:
    for sha256, image in sorted(kept.items()):
        place_of = placed[sha256]
        yield Entry(
            sha256=sha256,
            size=image.size,
            width=image.width,
            height=image.height,
            boxes=tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in image.boxes.tolist()),
            name=image.name,
            phash=f"{place_of.phash:016x}",
            group=place_of.group,
            split=place_of.split,
        )


def _check_splits(dataset: Manifest) -> None:
    for split in SPLITS:
        entries = dataset.split(split)
        if not any(entry.boxes for entry in entries):
            raise DatasetError(
                f"the {split} split has {len(entries)} pictures and none with a gun: add pictures "
                "(some dozens with guns are needed at least) or change "
                "GUN_DETECTION_HOLDOUT_SHARE and GUN_DETECTION_VALIDATION_SHARE",
                reason="EMPTY_SPLIT",
            )


def _publish(
    name: str,
    dataset: Manifest,
    content: dict[str, Any],
    settings: Settings,
    storage: Storage,
    session: Session,
) -> tuple[bool, str]:
    """Store manifest, reports and row unless they are there; whether the row is new, and the key of
    the report's page.
    """
    with open_session(settings) as asking:
        known = asking.get(DatasetVersion, dataset.id)
    if known is not None:
        page_key = report.store_again(dataset, content, known.source, settings, storage)
        # Ingested again, as after a version that was a mistake, it is the newest from here on.
        session.execute(
            update(DatasetVersion)
            .where(DatasetVersion.id == dataset.id)
            .values(created_at=func.now())
        )
        return False, page_key
    bucket = settings.data_bucket
    manifest_key, report_key = keys.manifest_key(dataset.id), keys.report_key(dataset.id)
    storage.put_if_absent(bucket, manifest_key, dataset.to_bytes())
    page_key = report.store(dataset, content, settings, storage)
    counts, splits = content["counts"], content["splits"]
    row = insert(DatasetVersion).values(
        id=dataset.id,
        source=name,
        images=counts["images"],
        boxes=counts["boxes"],
        negatives=counts["negatives"],
        train_images=splits["train"]["images"],
        validation_images=splits["validation"]["images"],
        holdout_images=splits["holdout"]["images"],
        rejected_images=counts["rejected_images"],
        rejected_boxes=counts["rejected_boxes"],
        duplicates=counts["duplicates"],
        manifest_key=manifest_key,
        report_key=report_key,
        holdout_id=dataset.holdout_id,
    )
    new = row.on_conflict_do_nothing().returning(DatasetVersion.id)
    return session.scalar(new) is not None, page_key
