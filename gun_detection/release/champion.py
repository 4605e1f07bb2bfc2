"""The append-only log of who was champion, and model versions by their names.

Nothing here loads a model.
"""

import logging

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from gun_detection.database.models import Approval, GateDecision, ModelVersion, Promotion
from gun_detection.errors import (
    ModelError,
    NotFoundError,
    ReleaseError,
    ServiceUnavailableError,
    SettingsError,
)
from gun_detection.settings import Settings

logger = logging.getLogger(__name__)

_PROMOTION_LOCK = 0x67756E70


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


def require_weights(version: ModelVersion) -> None:
    """Raise `ModelError` where retention has deleted them."""
    if version.deleted_at is not None:
        raise ModelError(
            f"the weights of {version.id} were deleted by retention on "
            f"{version.deleted_at:%Y-%m-%d}: take another version, or train it again",
            reason="MODEL_DELETED",
        )


def require_storable(name: str, threshold: float, settings: Settings) -> None:
    """Raise `SettingsError` where a model would find what nobody stores or answers."""
    if threshold < settings.score_floor:
        raise SettingsError(
            f"the threshold of {name}, {threshold:g}, is below GUN_DETECTION_SCORE_FLOOR "
            f"({settings.score_floor:g}), below which nothing is stored: lower that one"
        )


def current_champion(session: Session) -> ModelVersion | None:
    """The model of the last promotion, if there was one."""
    last = select(Promotion.model_id).order_by(Promotion.id.desc()).limit(1).scalar_subquery()
    return session.scalar(select(ModelVersion).where(ModelVersion.id == last))


def policy_name(decision: GateDecision) -> str:
    """Of the rules that it was made by."""
    return str((decision.policy or {}).get("name", "unknown"))


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
    person or followed by one that did not pass, and have compared the model with the present
    champion: another may have been promoted since. Raises `ReleaseError`, and
    `ServiceUnavailableError` while another promotion is made.
    """
    take_turn(session)
    model = get_model(session, model_id)
    # Retention takes turns with promotions.
    require_weights(model)
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
        rejected = _rejected_since(session, decision)
        if rejected is not None and champion_id != model.id:
            raise ReleaseError(
                f"gate decision {rejected.id}, by the policy {policy_name(rejected)}, rejected "
                f"{model.id} after decision {decision.id} let it through: run the gate again, or "
                "promote with --force and a reason",
                reason="GATE_NOT_PASSED",
            )
        if decision.champion_id != champion_id and champion_id != model.id:
            raise ReleaseError(
                f"the champion is {champion_id} by now, and {model.id} was compared with "
                f"{decision.champion_id}: run the gate again",
                reason="CHAMPION_CHANGED",
            )
        if champion_id != model.id and _carried_out(session, decision):
            raise ReleaseError(
                f"{model.id} was promoted by gate decision {decision.id}, and {champion_id} is "
                "champion since: run the gate again, or promote with --force and a reason",
                reason="CHAMPION_CHANGED",
            )
    if champion_id == model.id:
        last = session.scalar(select(Promotion).order_by(Promotion.id.desc()).limit(1))
        assert last is not None
        return last
    return _append(session, model.id, champion_id, "promote", actor, reason, decision)


def _rejected_since(session: Session, decision: GateDecision) -> GateDecision | None:
    """The last decision on the same model after this one that did not pass, if there is one."""
    return session.scalar(
        select(GateDecision)
        .where(
            GateDecision.candidate_id == decision.candidate_id,
            GateDecision.id > decision.id,
            GateDecision.passed.is_(False),
        )
        .order_by(GateDecision.id.desc())
        .limit(1)
    )


def _carried_out(session: Session, decision: GateDecision) -> bool:
    """Whether it made its model champion: after a rollback, who tries again does not do so."""
    made = select(Promotion.id).where(Promotion.gate_decision_id == decision.id).limit(1)
    return session.scalar(made) is not None


def rollback(
    session: Session, *, actor: str, reason: str, to: str | None = None, once: bool = False
) -> Promotion:
    """Go back to the champion before this one, or to an earlier champion `to`, by one more row.

    With `once` an actor that has rolled back before adds none: it is tried again. Raises
    `ReleaseError`, also where another promotion was made since, and `ServiceUnavailableError`
    while one is made.
    """
    take_turn(session)
    if once and (row := rolled_back(session, actor)) is not None:
        return row
    target, champion = rollback_target(session, to), current_champion(session)
    assert champion is not None
    return _append(session, target.id, champion.id, "rollback", actor, reason, None)


def rolled_back(session: Session, actor: str) -> Promotion | None:
    """The last rollback of this actor, if there was one.

    Raises `ReleaseError` where it is not the last word any more: who tries again would be told of
    a champion that is none.
    """
    row = session.scalar(
        select(Promotion)
        .where(Promotion.kind == "rollback", Promotion.actor == actor)
        .order_by(Promotion.id.desc())
        .limit(1)
    )
    if row is not None and row.id != session.scalar(select(func.max(Promotion.id))):
        champion = current_champion(session)
        assert champion is not None
        raise ReleaseError(
            f"{actor} rolled back to {row.model_id} on {row.created_at:%Y-%m-%d}, and "
            f"{champion.id} is champion since: trigger a new run",
            reason="CHAMPION_CHANGED",
        )
    return row


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
            # As it was when this model was champion last.
            del stack[len(stack) - 1 - stack[::-1].index(row.model_id) :]
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
    passed = f", which passed the policy {policy_name(decision)}" if decision else ""
    logger.info("%s: %s after %s, by %s%s", kind, model_id, previous_id, actor, passed)
    return row


def take_turn(session: Session) -> None:
    """Promotions happen one after the other, in the order in which this is granted."""
    got = session.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _PROMOTION_LOCK})
    if not got:
        raise ServiceUnavailableError(
            "another promotion is under way: try again", reason="PROMOTION_UNDER_WAY"
        )
