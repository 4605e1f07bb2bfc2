"""Model versions in S3 and Postgres.

A version is immutable: its files lie under `models/<id>/` and are written with a conditional put.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import case, func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection import __version__
from gun_detection.database import open_session
from gun_detection.database.models import ModelVersion
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
from gun_detection.errors import ModelError, NotFoundError, SettingsError, TerminalError
from gun_detection.release.champion import get_model, require_weights
from gun_detection.release.copies import copies, make_room, note_use
from gun_detection.settings import Settings
from gun_detection.storage import Storage

logger = logging.getLogger(__name__)

WEIGHT_SUFFIXES = {".pth", ".pt", ".safetensors"}
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

    The row comes last, so that a crash half-way leaves no version without its files. Give it a
    session that has asked nothing yet: no transaction is open then while the files are stored.
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
        .on_conflict_do_update(
            index_elements=["id"],
            set_={
                "deleted_at": None,
                # For retention, it is as new as others that are made now.
                "created_at": case(
                    (ModelVersion.deleted_at.is_not(None), func.now()),
                    else_=ModelVersion.created_at,
                ),
            },
        )
    )
    logger.info("published %s with weights %s", model_id, sha256[:12])
    return get_model(session, model_id)


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


def load_model(version: ModelVersion, settings: Settings, storage: Storage) -> FasterRCNN:
    """The detector of a version, from the local cache or S3; its sha256 is checked every time."""
    require_weights(version)
    detector = DetectorConfig.model_validate(version.config["detector"])
    path = copies(settings) / "models" / f"{version.weights_sha256}.safetensors"
    if path.exists():
        note_use(path)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == version.weights_sha256:
            return deserialize(data, detector)
        # A damaged copy is only a copy.
        path.unlink()
    storage.download(settings.data_bucket, version.weights_key, path, sha256=version.weights_sha256)
    make_room(settings)
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
    if path.suffix in WEIGHT_SUFFIXES:
        model, detector, threshold = open_file(path)
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
    model, detector, recorded = open_file(path, architecture)
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


def open_file(
    path: Path, architecture: str = "resnet50_fpn"
) -> tuple[FasterRCNN, DetectorConfig, float]:
    """(detector, its configuration, threshold) of a weights file.

    `architecture` is that of a file which does not say; the threshold that of the `model.json`
    beside it, or 0.7.
    """
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
