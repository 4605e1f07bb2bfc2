"""Model versions in S3 and Postgres, and the append-only log of who was champion.

A version is immutable: its files lie under `models/<id>/` and are written with a conditional put.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection import __version__
from gun_detection.database import open_session
from gun_detection.database.models import Approval, GateDecision, ModelVersion, Promotion
from gun_detection.detector.architectures import (
    ARCHITECTURES,
    DetectorConfig,
    build_detector,
    select_device,
)
from gun_detection.detector.inference import Predictor
from gun_detection.detector.weights import (
    config_of,
    deserialize,
    load_detector,
    read_state_dict,
    serialize,
)
from gun_detection.errors import (
    ModelError,
    NotFoundError,
    ReleaseError,
    ServiceUnavailableError,
    SettingsError,
    TerminalError,
)
from gun_detection.settings import Settings
from gun_detection.storage import Storage

logger = logging.getLogger(__name__)

_PROMOTION_LOCK = 0x67756E70
_WEIGHT_SUFFIXES = {".pth", ".pt", ".safetensors"}
# Of weights that come without one; the well-known value for detectors of this kind.
DEFAULT_THRESHOLD = 0.7


@dataclass(frozen=True)
class NewModel:
    """What is to be published. `config` is the whole training configuration as JSON types."""

    model: FasterRCNN
    detector: DetectorConfig
    config: dict[str, Any]
    config_hash: str
    dataset_id: str | None
    parent_id: str | None
    threshold: float
    training: dict[str, Any]


def publish(new: NewModel, settings: Settings, storage: Storage, session: Session) -> ModelVersion:
    """Store a model version; equal weights from equal data and recipe are the same version.

    The row comes last, so that a crash half-way leaves no version without its files.
    """
    weights, sha256 = serialize(new.model, new.detector)
    identity = f"{sha256} {new.config_hash} {new.dataset_id}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    model_id = f"{new.detector.architecture.replace('_', '-')}-{digest}"
    prefix = f"models/{model_id}"
    document = {
        "id": model_id,
        "detector": new.detector.model_dump(mode="json"),
        "config": new.config,
        "config_hash": new.config_hash,
        "dataset_id": new.dataset_id,
        "parent_id": new.parent_id,
        "code_version": __version__,
        "weights_sha256": sha256,
        "threshold": new.threshold,
        "training": new.training,
    }
    storage.put_if_absent(settings.data_bucket, f"{prefix}/weights.safetensors", weights)
    storage.put_if_absent(
        settings.data_bucket,
        f"{prefix}/model.json",
        json.dumps(document, indent=2).encode(),
        content_type="application/json",
    )
    session.execute(
        insert(ModelVersion)
        .values(
            id=model_id,
            architecture=new.detector.architecture,
            dataset_id=new.dataset_id,
            parent_id=new.parent_id,
            config=new.config,
            config_hash=new.config_hash,
            code_version=__version__,
            weights_key=f"{prefix}/weights.safetensors",
            weights_sha256=sha256,
            threshold=new.threshold,
            training=new.training,
        )
        # What retention had deleted and was trained again is there again.
        .on_conflict_do_update(index_elements=["id"], set_={"deleted_at": None})
    )
    logger.info("published %s with weights %s", model_id, sha256[:12])
    return get_model(session, model_id)


def get_model(session: Session, name: str) -> ModelVersion:
    """The version with this id, or the champion for `champion`; raises `NotFoundError`."""
    if name == "champion":
        champion = current_champion(session)
        if champion is None:
            raise NotFoundError(
                "there is no champion yet: run the retrain DAG, or `gun-detection promote MODEL`",
                reason="NO_CHAMPION",
            )
        return champion
    model = session.get(ModelVersion, name)
    if model is None:
        raise NotFoundError(f"there is no model version {name!r}: see `gun-detection models`")
    return model


def verify_weights(version: ModelVersion, settings: Settings, storage: Storage) -> None:
    """Read the stored weights once; raises `TerminalError` unless they are those of the version."""
    require_weights(version)
    digest = hashlib.sha256()
    with storage.open(settings.data_bucket, version.weights_key) as body:
        while chunk := body.read(2**20):
            digest.update(chunk)
    if digest.hexdigest() != version.weights_sha256:
        raise TerminalError(
            f"the stored weights of {version.id} have sha256 {digest.hexdigest()}, recorded is "
            f"{version.weights_sha256}: they were changed or damaged; restore them from a backup",
            reason="SHA256_MISMATCH",
        )


def require_weights(version: ModelVersion) -> None:
    """Raise `ModelError` where retention has deleted them."""
    if version.deleted_at is not None:
        raise ModelError(
            f"the weights of {version.id} were deleted by retention on "
            f"{version.deleted_at:%Y-%m-%d}: take another version, or train it again",
            reason="MODEL_DELETED",
        )


def load_model(version: ModelVersion, settings: Settings, storage: Storage) -> FasterRCNN:
    """The detector of a version, from the local cache or S3; its sha256 is checked every time."""
    require_weights(version)
    detector = DetectorConfig.model_validate(version.config["detector"])
    path = settings.home / "cache" / "models" / f"{version.weights_sha256}.safetensors"
    if path.exists():
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == version.weights_sha256:
            return deserialize(data, detector)
        # A damaged copy is only a copy.
        path.unlink()
    storage.download(settings.data_bucket, version.weights_key, path, sha256=version.weights_sha256)
    return deserialize(path.read_bytes(), detector, sha256=version.weights_sha256)


def load_predictor(
    version: ModelVersion, settings: Settings, storage: Storage, floor: float
) -> Predictor:
    """The version ready to look at pictures, down to a score of `floor`."""
    detector = DetectorConfig.model_validate(version.config["detector"])
    model = load_model(version, settings, storage)
    device = select_device(settings.device)
    return Predictor(model, device, floor, mirrored=detector.mirrored)


def open_predictor(name: str, settings: Settings, floor: float) -> tuple[str, Predictor, float]:
    """(name, predictor, operating threshold) of `champion`, a version, or a weights file.

    A file needs no database; a `.pth` is taken for a plain `resnet50_fpn`. Its threshold is that
    of its `model.json` beside it, or 0.7.
    """
    path = Path(name)
    if path.suffix in _WEIGHT_SUFFIXES:
        model, detector, threshold = _open_file(path, "resnet50_fpn")
        device = select_device(settings.device)
        predictor = Predictor(model, device, floor, mirrored=detector.mirrored)
        return path.name, predictor, threshold
    with open_session(settings) as session:
        version = get_model(session, name)
    predictor = load_predictor(version, settings, Storage(settings), floor)
    return version.id, predictor, version.threshold


def import_file(
    path: Path,
    architecture: str,
    threshold: float | None,
    settings: Settings,
    storage: Storage,
    session: Session,
) -> ModelVersion:
    """Publish a weights file from elsewhere; its whole detector must be in it.

    Without a threshold it takes that of the file's `model.json` beside it, or 0.7.
    """
    model, detector, recorded = _open_file(path, architecture)
    if threshold is None:
        threshold = recorded
    # The same weights at another threshold are another version.
    config = {
        "detector": detector.model_dump(mode="json"),
        "imported_from": path.name,
        "threshold": threshold,
    }
    new = NewModel(
        model=model,
        detector=detector,
        config=config,
        config_hash=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        dataset_id=None,
        parent_id=None,
        threshold=threshold,
        training={},
    )
    return publish(new, settings, storage, session)


def _open_file(path: Path, architecture: str) -> tuple[FasterRCNN, DetectorConfig, float]:
    """(detector, its configuration, threshold) of a weights file."""
    if not path.is_file():
        raise NotFoundError(f"there is no weights file {path}")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise SettingsError(f"unknown architecture {architecture!r}: choose from {known}")
    data = path.read_bytes()
    detector = config_of(data) if path.suffix == ".safetensors" else None
    detector = detector or DetectorConfig(architecture=architecture)
    model = build_detector(detector)
    load_detector(model, detector, read_state_dict(data, path.name), path.name)
    return model, detector, _recorded_threshold(path, data)


def _recorded_threshold(path: Path, data: bytes) -> float:
    """What the `model.json` beside the weights says, if it is that of these weights; or 0.7."""
    record = path.with_name("model.json")
    if not record.is_file():
        return DEFAULT_THRESHOLD
    try:
        document = json.loads(record.read_bytes())
        if document["weights_sha256"] != hashlib.sha256(data).hexdigest():
            return DEFAULT_THRESHOLD
        threshold = float(document["threshold"])
        if not 0 <= threshold <= 1:
            raise ValueError(f"a threshold of {threshold}")
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{record} is damaged ({error!r}): restore it, or remove it to go without"
        ) from error
    return threshold


def current_champion(session: Session) -> ModelVersion | None:
    """The model of the last promotion, if there was one."""
    last = select(Promotion.model_id).order_by(Promotion.id.desc()).limit(1).scalar_subquery()
    return session.scalar(select(ModelVersion).where(ModelVersion.id == last))


def promote(
    session: Session,
    model_id: str,
    *,
    actor: str,
    reason: str,
    decision: GateDecision | None = None,
) -> Promotion:
    """Make a version champion, by one more row; promoting the champion again adds none.

    With a gate decision it must have passed, be about this model, not have been refused by a
    person, and have compared the model with the present champion: another may have been promoted
    since. Raises `ReleaseError`, and `ServiceUnavailableError` while another promotion is made.
    """
    take_turn(session)
    model = get_model(session, model_id)
    champion = current_champion(session)
    champion_id = champion.id if champion else None
    if decision is not None:
        if decision.candidate_id != model.id or not decision.passed:
            raise ReleaseError(f"gate decision {decision.id} does not allow {model.id}")
        refused = session.scalar(
            select(Approval).where(
                Approval.gate_decision_id == decision.id, Approval.approved.is_(False)
            )
        )
        if refused is not None:
            raise ReleaseError(
                f"{refused.actor} refused gate decision {decision.id}: run the gate again, "
                "or promote with --force and a reason"
            )
        if decision.champion_id != champion_id and champion_id != model.id:
            raise ReleaseError(
                f"the champion is {champion_id} by now, and {model.id} was compared with "
                f"{decision.champion_id}: run the gate again",
                reason="CHAMPION_CHANGED",
            )
    if champion_id == model.id:
        last = session.scalar(select(Promotion).order_by(Promotion.id.desc()).limit(1))
        assert last is not None
        return last
    return _append(session, model.id, champion_id, "promote", actor, reason, decision)


def rollback(session: Session, *, actor: str, reason: str, to: str | None = None) -> Promotion:
    """Go back to the champion before this one, or to an earlier champion `to`, by one more row."""
    take_turn(session)
    target, champion = rollback_target(session, to), current_champion(session)
    assert champion is not None
    return _append(session, target.id, champion.id, "rollback", actor, reason, None)


def rollback_target(session: Session, to: str | None = None) -> ModelVersion:
    """Where a rollback would go to; raises `ReleaseError` where there is nothing like it."""
    champion = current_champion(session)
    if champion is None:
        raise ReleaseError("there is no champion to roll back", reason="NO_CHAMPION")
    earlier = _earlier_champions(session, champion.id)
    if to is not None and to not in earlier:
        raise ReleaseError(
            f"{to} was not a champion before {champion.id}: "
            f"choose from {', '.join(earlier) or 'none'}"
        )
    if not earlier:
        raise ReleaseError(f"{champion.id} is the first champion: there is nothing to go back to")
    return get_model(session, to or earlier[0])


def _earlier_champions(session: Session, champion_id: str) -> list[str]:
    """The champions that this one came after, latest first.

    A rollback does not count as coming after what it left: two in a row go back two steps.
    """
    stack: list[str] = []
    for row in session.scalars(select(Promotion).order_by(Promotion.id)):
        if row.kind == "rollback" and row.model_id in stack:
            del stack[stack.index(row.model_id) :]
        stack.append(row.model_id)
    return [model for model in reversed(stack[:-1]) if model != champion_id]


def _append(
    session: Session,
    model_id: str,
    previous_id: str | None,
    kind: str,
    actor: str,
    reason: str,
    decision: GateDecision | None,
) -> Promotion:
    if not actor or not reason:
        raise ReleaseError(f"a {kind} needs who does it and why")
    row = Promotion(
        model_id=model_id,
        previous_id=previous_id,
        kind=kind,
        actor=actor,
        reason=reason,
        gate_decision_id=decision.id if decision else None,
    )
    session.add(row)
    session.flush()
    logger.info("%s: %s after %s, by %s", kind, model_id, previous_id, actor)
    return row


def take_turn(session: Session) -> None:
    """Promotions happen one after the other, in the order in which this is granted."""
    got = session.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _PROMOTION_LOCK})
    if not got:
        raise ServiceUnavailableError(
            "another promotion is under way: try again", reason="PROMOTION_UNDER_WAY"
        )
