"""Which model versions keep their weights: the newest, champions, and what is in use.

Only weights are deleted, which are nearly all of the space. Rows, records, cards and reports stay,
as decisions and detections refer to them.
"""

import logging
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import (
    Approval,
    GateDecision,
    ModelVersion,
    Promotion,
    ScoringRun,
)
from gun_detection.errors import ServiceUnavailableError
from gun_detection.release.registry import current_champion, take_turn
from gun_detection.settings import Settings
from gun_detection.storage import Storage

logger = logging.getLogger(__name__)


def prune(settings: Settings, storage: Storage, keep: int, *, dry_run: bool) -> dict[str, Any]:
    """Delete the weights of versions that nothing needs; the ids of those.

    Kept are the `keep` newest, all that ever were champion, those pinned by an open scoring run,
    and those that passed the gate and wait for a person. Versions are marked first, and every
    call deletes what is left of marked ones: a crash half-way leaves work for the next call.
    Raises `ServiceUnavailableError` while a promotion is made, or when weights are still listed
    after they were deleted.
    """
    with open_session(settings) as session:
        # Nothing is promoted between this look and the mark.
        take_turn(session)
        old = _unneeded(session, keep)
        if dry_run:
            return {"dry_run": True, "deleted": sorted(model.id for model in old)}
        for model in old:
            model.deleted_at = func.now()
    with open_session(settings) as session:
        marked = select(ModelVersion.weights_key, ModelVersion.id)
        rows = session.execute(marked.where(ModelVersion.deleted_at.is_not(None)))
        gone = {row.weights_key: row.id for row in rows}
    stored = gone.keys() & _stored(settings, storage)
    storage.delete_many(settings.data_bucket, stored)
    left = stored & _stored(settings, storage)
    if left:
        raise ServiceUnavailableError(
            f"{len(left)} weights are still in {settings.data_bucket} after they were deleted, "
            f"the first is {min(left)}"
        )
    deleted = sorted(gone[key] for key in stored)
    for model_id in deleted:
        logger.info("deleted the weights of %s", model_id)
    return {"dry_run": False, "deleted": deleted}


def _unneeded(session: Session, keep: int) -> list[ModelVersion]:
    newest = select(ModelVersion.id).order_by(ModelVersion.created_at.desc()).limit(keep)
    champions = select(Promotion.model_id)
    pinned = select(ScoringRun.model_id).where(ScoringRun.state == "open")
    champion = current_champion(session)
    # Those that were compared with an earlier champion cannot be promoted any more.
    waiting = select(GateDecision.candidate_id).where(
        GateDecision.passed,
        GateDecision.champion_id == (champion.id if champion else None),
        GateDecision.id.not_in(select(Approval.gate_decision_id)),
    )
    return list(
        session.scalars(
            select(ModelVersion).where(
                ModelVersion.deleted_at.is_(None),
                *(ModelVersion.id.not_in(kept) for kept in (newest, champions, pinned, waiting)),
            )
        )
    )


def _stored(settings: Settings, storage: Storage) -> set[str]:
    """The keys of all that lies in the registry's part of the bucket."""
    return {item.key for item in storage.list_objects(settings.data_bucket, "models/")}
