"""The tables. Times are UTC; boxes are xyxy in upright pixels; scores lie in [0, 1]."""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    MetaData,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_NAMES = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=_NAMES)
    type_annotation_map = {  # noqa: RUF012
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(none_as_null=True),
    }


def _created() -> Mapped[datetime]:
    return mapped_column(server_default=func.now())


def _serial() -> Mapped[int]:
    return mapped_column(BigInteger, Identity(always=True), primary_key=True)


class DatasetVersion(Base):
    """An immutable data set; `id` is the sha256 of its manifest in S3."""

    __tablename__ = "dataset_version"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = _created()
    source: Mapped[str]
    images: Mapped[int]
    boxes: Mapped[int]
    negatives: Mapped[int]
    train_images: Mapped[int]
    validation_images: Mapped[int]
    holdout_images: Mapped[int]
    rejected_images: Mapped[int]
    rejected_boxes: Mapped[int]
    duplicates: Mapped[int]
    manifest_key: Mapped[str]
    report_key: Mapped[str]
    holdout_id: Mapped[str] = mapped_column(index=True)


class ModelVersion(Base):
    """An immutable trained or imported detector; its files lie under `models/<id>/` in S3.

    `deleted_at`: when retention took the weights away; the row stays, as others refer to it.
    """

    __tablename__ = "model_version"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = _created()
    architecture: Mapped[str]
    dataset_id: Mapped[str | None] = mapped_column(ForeignKey("dataset_version.id"), index=True)
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("model_version.id"))
    config: Mapped[dict[str, Any]]
    config_hash: Mapped[str] = mapped_column(index=True)
    code_version: Mapped[str]
    weights_key: Mapped[str]
    weights_sha256: Mapped[str]
    threshold: Mapped[float]
    training: Mapped[dict[str, Any]]
    deleted_at: Mapped[datetime | None]


class Evaluation(Base):
    """Metrics of one model on one frozen split, by one version of the evaluator."""

    __tablename__ = "evaluation"
    __table_args__ = (
        UniqueConstraint("model_id", "dataset_id", "split", "evaluator_version"),
        CheckConstraint("split IN ('validation', 'holdout')", name="split"),
    )
    id: Mapped[int] = _serial()
    created_at: Mapped[datetime] = _created()
    model_id: Mapped[str] = mapped_column(ForeignKey("model_version.id"))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset_version.id"), index=True)
    holdout_id: Mapped[str] = mapped_column(index=True)
    split: Mapped[str]
    evaluator_version: Mapped[str]
    metrics: Mapped[dict[str, Any]]
    report_key: Mapped[str]


class GateDecision(Base):
    """What the gate said of a candidate, rule by rule; `champion_id` is null for a first one.

    `policy` is the whole policy with its version, and under `promotion` what was to become of a
    candidate that passed it; `origin` is the run or person that asked.
    """

    __tablename__ = "gate_decision"
    id: Mapped[int] = _serial()
    created_at: Mapped[datetime] = _created()
    candidate_id: Mapped[str] = mapped_column(ForeignKey("model_version.id"), index=True)
    champion_id: Mapped[str | None] = mapped_column(ForeignKey("model_version.id"))
    candidate_evaluation_id: Mapped[int | None] = mapped_column(ForeignKey("evaluation.id"))
    champion_evaluation_id: Mapped[int | None] = mapped_column(ForeignKey("evaluation.id"))
    holdout_id: Mapped[str]
    passed: Mapped[bool]
    policy: Mapped[dict[str, Any] | None]
    rules: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    origin: Mapped[str | None] = mapped_column(index=True)


class Approval(Base):
    """A person's answer to a candidate that passed, or that nobody answered in time."""

    __tablename__ = "approval"
    __table_args__ = (UniqueConstraint("gate_decision_id"),)
    id: Mapped[int] = _serial()
    created_at: Mapped[datetime] = _created()
    gate_decision_id: Mapped[int] = mapped_column(ForeignKey("gate_decision.id"))
    approved: Mapped[bool]
    actor: Mapped[str]
    comment: Mapped[str] = mapped_column(server_default=text("''"))


class Promotion(Base):
    """Append-only; the champion is the model of the row with the largest id."""

    __tablename__ = "promotion"
    __table_args__ = (CheckConstraint("kind IN ('promote', 'rollback')", name="kind"),)
    id: Mapped[int] = _serial()
    created_at: Mapped[datetime] = _created()
    model_id: Mapped[str] = mapped_column(ForeignKey("model_version.id"))
    previous_id: Mapped[str | None] = mapped_column(ForeignKey("model_version.id"))
    kind: Mapped[str]
    actor: Mapped[str]
    reason: Mapped[str]
    gate_decision_id: Mapped[int | None] = mapped_column(ForeignKey("gate_decision.id"))


class Upload(Base):
    """One version of one uploaded object; other bytes under the same key are another row.

    `current`: the version that the last listing showed, one for each key.
    """

    __tablename__ = "upload"
    __table_args__ = (
        UniqueConstraint("bucket", "key", "etag"),
        Index("uq_upload_current", "bucket", "key", unique=True, postgresql_where=text("current")),
    )
    id: Mapped[int] = _serial()
    first_seen_at: Mapped[datetime] = _created()
    bucket: Mapped[str]
    key: Mapped[str]
    etag: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    uploaded_at: Mapped[datetime]
    current: Mapped[bool] = mapped_column(server_default=text("true"))


class PendingUpload(Base):
    """A current upload that waits: it has no outcome by any model, or one to be judged anew.

    What a plan asks of it stands here, too, so that planning reads no more than what waits.
    `wanted`: some configured source covers its key. `deferred`: it was tried in vain or judged
    before, so that others that wait come first. `waits_since`: when it was uploaded, or was found
    to need another look.
    """

    __tablename__ = "pending_upload"
    __table_args__ = (Index(None, "bucket", "deferred", "uploaded_at", "upload_id"),)
    upload_id: Mapped[int] = mapped_column(
        BigInteger, ForeignKey("upload.id"), primary_key=True, autoincrement=False
    )
    bucket: Mapped[str]
    key: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    uploaded_at: Mapped[datetime]
    wanted: Mapped[bool] = mapped_column(server_default=text("true"))
    deferred: Mapped[bool] = mapped_column(server_default=text("false"))
    waits_since: Mapped[datetime] = mapped_column(server_default=func.now())


class ScoringRun(Base):
    """One run over uploads without an outcome; the champion is pinned in `model_id`.

    `kind`: `new` covers what no model has scored, `rescore` what another model has. `survey` is
    what was found before the run was opened, `stats` what it did, by stage. The counts are those
    of its end, so that nobody has to count them again.
    """

    __tablename__ = "scoring_run"
    __table_args__ = (
        CheckConstraint("state IN ('open', 'finished', 'failed')", name="state"),
        CheckConstraint("kind IN ('new', 'rescore')", name="kind"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = _created()
    finished_at: Mapped[datetime | None]
    kind: Mapped[str] = mapped_column(server_default="new")
    model_id: Mapped[str] = mapped_column(ForeignKey("model_version.id"))
    bucket: Mapped[str]
    prefix: Mapped[str]
    threshold: Mapped[float]
    planned: Mapped[int]
    left_over: Mapped[int]
    state: Mapped[str] = mapped_column(server_default="open")
    survey: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    stats: Mapped[dict[str, Any] | None]
    scored: Mapped[int | None]
    quarantined: Mapped[int | None]
    detections: Mapped[int | None]


class Shard(Base):
    """A part of a run that one worker holds by lease; `attempt` fences off older holders.

    `crashes` counts attempts that ended without a word; after one, pictures are taken one by one,
    each noted in `suspect_id` first, and `suspect_crashes` counts those that died of it.
    """

    __tablename__ = "shard"
    __table_args__ = (UniqueConstraint("run_id", "number"),)
    id: Mapped[int] = _serial()
    run_id: Mapped[str] = mapped_column(ForeignKey("scoring_run.id"))
    number: Mapped[int]
    upload_ids: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))
    bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")
    attempt: Mapped[int] = mapped_column(server_default="0")
    crashes: Mapped[int] = mapped_column(server_default="0")
    suspect_id: Mapped[int | None] = mapped_column(BigInteger)
    suspect_crashes: Mapped[int] = mapped_column(server_default="0")
    lease_until: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    stats: Mapped[dict[str, Any] | None]


class LedgerEntry(Base):
    """The one outcome of an upload for a model version.

    `stale`: it is to be judged anew (what was gone is there again, or somebody asked for it);
    the next outcome replaces it. `tries` counts how often it was judged.
    """

    __tablename__ = "ledger"
    __table_args__ = (
        UniqueConstraint("upload_id", "model_id"),
        Index("ix_ledger_sha256_model", "sha256", "model_id"),
        Index("ix_ledger_quarantined", "upload_id", postgresql_where=text("reason IS NOT NULL")),
        CheckConstraint("outcome IN ('scored', 'quarantined')", name="outcome"),
        CheckConstraint("(outcome = 'quarantined') = (reason IS NOT NULL)", name="reason"),
    )
    id: Mapped[int] = _serial()
    created_at: Mapped[datetime] = _created()
    upload_id: Mapped[int] = mapped_column(ForeignKey("upload.id"))
    model_id: Mapped[str] = mapped_column(ForeignKey("model_version.id"))
    run_id: Mapped[str] = mapped_column(ForeignKey("scoring_run.id"), index=True)
    shard_id: Mapped[int] = mapped_column(ForeignKey("shard.id"))
    attempt: Mapped[int]
    outcome: Mapped[str]
    reason: Mapped[str | None]
    message: Mapped[str | None]
    sha256: Mapped[str | None]
    width: Mapped[int | None]
    height: Mapped[int | None]
    decode_ms: Mapped[float | None]
    inference_ms: Mapped[float | None]
    engine: Mapped[str | None]
    stale: Mapped[bool] = mapped_column(server_default=text("false"))
    tries: Mapped[int] = mapped_column(server_default="1")


class Detection(Base):
    """A box that a model marked; unreviewed until a row in `review` says otherwise."""

    __tablename__ = "detection"
    __table_args__ = (CheckConstraint("x2 > x1 AND y2 > y1", name="box"),)
    id: Mapped[int] = _serial()
    ledger_id: Mapped[int] = mapped_column(ForeignKey("ledger.id", ondelete="CASCADE"), index=True)
    x1: Mapped[float]
    y1: Mapped[float]
    x2: Mapped[float]
    y2: Mapped[float]
    score: Mapped[float]


class Review(Base):
    """A person's verdict on a detection; append-only, the last one counts."""

    __tablename__ = "review"
    __table_args__ = (CheckConstraint("verdict IN ('confirmed', 'rejected')", name="verdict"),)
    id: Mapped[int] = _serial()
    created_at: Mapped[datetime] = _created()
    detection_id: Mapped[int] = mapped_column(ForeignKey("detection.id"), index=True)
    verdict: Mapped[str]
    reviewer: Mapped[str]
    comment: Mapped[str] = mapped_column(server_default=text("''"))


class EnginePackage(Base):
    """A model version made ready for an inference engine, and how it compares with the reference.

    `files` maps the names of what lies under `models/<id>/engines/<engine>/` to their sha256.
    """

    __tablename__ = "engine_package"
    __table_args__ = (UniqueConstraint("model_id", "engine"),)
    id: Mapped[int] = _serial()
    created_at: Mapped[datetime] = _created()
    model_id: Mapped[str] = mapped_column(ForeignKey("model_version.id"))
    engine: Mapped[str]
    accepted: Mapped[bool]
    reason: Mapped[str]
    reference_ap50: Mapped[float | None]
    ap50: Mapped[float | None]
    pictures: Mapped[int]
    milliseconds: Mapped[float | None]
    reference_milliseconds: Mapped[float | None]
    files: Mapped[dict[str, Any]]
    toolchain: Mapped[str]


class SourceListing(Base):
    """When a source that is laid out by date was last listed whole."""

    __tablename__ = "source_listing"
    bucket: Mapped[str] = mapped_column(primary_key=True)
    prefix: Mapped[str] = mapped_column(primary_key=True)
    listed_at: Mapped[datetime]


class UploadWatch(Base):
    """How far the watcher of uploads has told of them: up to `upload_id`, for each bucket.

    `told_at` is when it told last.
    """

    __tablename__ = "upload_watch"
    bucket: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[int] = mapped_column(BigInteger)
    told_at: Mapped[datetime | None]


class SourceLook(Base):
    """When the watcher of uploads last looked at a source, and why the last look failed, if it did.

    Where it never did, `looked_at` is since when it should have, or null where its looks failed.
    The view `unseen_sources` has those whose new uploads nobody sees.
    """

    __tablename__ = "source_look"
    source: Mapped[str] = mapped_column(primary_key=True)
    looked_at: Mapped[datetime | None]
    message: Mapped[str | None]
