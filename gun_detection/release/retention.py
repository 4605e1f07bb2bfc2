"""Which model versions keep their weights: the newest, champions, and what is in use.

Weights are deleted, and what engines were made of them: nearly all of the space. Other rows,
records, cards and reports stay, as decisions and detections refer to them.
"""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import (
    Approval,
    EnginePackage,
    GateDecision,
    ModelVersion,
    Promotion,
    ScoringRun,
)
from gun_detection.errors import ServiceUnavailableError
from gun_detection.release.champion import current_champion, take_turn
from gun_detection.settings import Settings
from gun_detection.storage import Storage

logger = logging.getLogger(__name__)

_GIVEN_UP = timedelta(days=30)


def prune(settings: Settings, storage: Storage, keep: int, *, dry_run: bool) -> dict[str, Any]:
    """Delete the weights and packages of versions that nothing needs, and the checkpoints of
    trainings that were given up; the ids of those, and how many these are.

    Kept are the `keep` newest, all that ever were champion, those pinned by an open scoring run,
    and those that passed the gate and wait for a person. Versions are marked first, and every
    call deletes what is left of marked ones: a crash half-way leaves work for the next call.
    Raises `ServiceUnavailableError` while a promotion is made, or when objects are still listed
    after they were deleted.
    """
    given_up = _given_up(settings, storage)
    with open_session(settings) as session:
        # Nothing is promoted between this look and the mark.
        take_turn(session)
        old = _unneeded(session, keep)
        if dry_run:
            ids = sorted(model.id for model in old)
            return {"dry_run": True, "deleted": ids, "checkpoints": len(given_up)}
        for model in old:
            model.deleted_at = func.now()
    with open_session(settings) as session:
        marked = select(ModelVersion.weights_key, ModelVersion.id)
        rows = session.execute(marked.where(ModelVersion.deleted_at.is_not(None)))
        weights = {row.weights_key: row.id for row in rows}
        # Before their files, so that no row promises a file that is gone.
        session.execute(delete(EnginePackage).where(EnginePackage.model_id.in_(weights.values())))
    gone = _stored(weights, settings, storage)
    storage.delete_many(settings.data_bucket, [*gone, *given_up])
    left = gone.keys() & _stored(weights, settings, storage).keys()
    if left:
        raise ServiceUnavailableError(
            f"{len(left)} objects are still in {settings.data_bucket} after they were deleted, "
            f"the first is {min(left)}"
        )
    deleted = sorted(set(gone.values()))
    for model_id in deleted:
        logger.info("deleted the weights and packages of %s", model_id)
    return {"dry_run": False, "deleted": deleted, "checkpoints": len(given_up)}


def _given_up(settings: Settings, storage: Storage) -> list[str]:
    """Checkpoints that no training went on from for long: one that ends deletes its own."""
    now = datetime.now(UTC)
    return [
        item.key
        for item in storage.list_objects(settings.data_bucket, "checkpoints/")
        if now - item.last_modified > _GIVEN_UP
    ]


def _unneeded(session: Session, keep: int) -> list[ModelVersion]:
    newest = select(ModelVersion.id).order_by(ModelVersion.created_at.desc()).limit(keep)
    champions = select(Promotion.model_id)
    pinned = select(ScoringRun.model_id).where(ScoringRun.state == "open")
    champion = current_champion(session)
    # Those that were compared with an earlier champion cannot be promoted any more.
    waiting = select(GateDecision.candidate_id).where(
        GateDecision.passed,
        GateDecision.champion_id == (champion.id if champion else None),
        GateDecision.id.not_in(
            select(Approval.gate_decision_id).where(Approval.approved.is_(False))
        ),
    )
    return list(
        session.scalars(
            select(ModelVersion).where(
                ModelVersion.deleted_at.is_(None),
                *(ModelVersion.id.not_in(kept) for kept in (newest, champions, pinned, waiting)),
            )
        )
    )


def _stored(weights: dict[str, str], settings: Settings, storage: Storage) -> dict[str, str]:
    """What lies in the bucket of these versions' weights and packages: the version by the key."""
    versions = set(weights.values())
    found = {}
    for item in storage.list_objects(settings.data_bucket, "models/"):
        model_id, _, rest = item.key.removeprefix("models/").partition("/")
        if item.key in weights or (model_id in versions and rest.startswith("engines/")):
            found[item.key] = model_id
    return found
