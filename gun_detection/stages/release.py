"""From a measured candidate to a champion: gate, approval, promotion, rollback, retention."""

import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import Approval, Evaluation, GateDecision, ModelVersion
from gun_detection.errors import NotFoundError, ReleaseError
from gun_detection.settings import Settings
from gun_detection.stages.links import card_url, decision_url, report_url
from gun_detection.storage import Storage

Json = dict[str, Any]

logger = logging.getLogger(__name__)


def gate(
    settings: Settings,
    candidate: str,
    dataset_id: str | None = None,
    policy: str | None = None,
    origin: str | None = None,
    promotion: str | None = None,
) -> Json:
    """Judge a candidate against the present champion on the same holdout, and record it.

    `policy` is a name or the path of a YAML file, `promotion` what is to become of a candidate that
    passes, both by default as the settings have it; `origin` says who asked. Where the holdout has
    few of the pictures that the champion was chosen by, somebody rolled this candidate back or
    refused it before, or the rules leave something to a person, the answer has a `caution`, and
    with `auto` a person is asked all the same.
    """
    from gun_detection.evaluation.evaluate import evaluate_version
    from gun_detection.release.canary import fly_canary
    from gun_detection.release.champion import current_champion, get_model, require_weights
    from gun_detection.release.gate import caution as look_closely
    from gun_detection.release.gate import (
        explain,
        judge,
        open_questions,
        record,
        require_same_data,
    )
    from gun_detection.release.pages import approval_text
    from gun_detection.release.policy import load_policy
    from gun_detection.release.rules import Case
    from gun_detection.training.train import get_dataset

    rules = load_policy(policy or settings.gate_policy)
    storage = Storage(settings)
    with open_session(settings) as session:
        model, champion = get_model(session, candidate), current_champion(session)
        require_weights(model)
        dataset_id = get_dataset(session, dataset_id).id
    versions = [version for version in (model, champion) if version is not None]
    rows = [evaluate_version(version, dataset_id, settings, storage) for version in versions]
    for other in rows[1:]:
        require_same_data(rows[0], other)
    measured = [_measured(*both, settings, storage) for both in zip(versions, rows, strict=True)]
    unseen = look_closely(model, champion, dataset_id, settings, storage)
    canary = fly_canary(model.id, dataset_id, measured[0].samples, settings)
    case = Case(measured[0], measured[1] if champion else None, canary)
    verdicts = judge(case, rules)
    caution = "; ".join(filter(None, [open_questions(verdicts), unseen])) or None
    promotion = promotion or settings.promotion
    if caution and promotion == "auto":
        promotion = "approve"
    with open_session(settings) as session:
        compared = rows[1] if champion else None
        decision = record(session, rows[0], compared, rules, verdicts, origin, promotion)
        question = approval_text(session, decision, settings, caution)
    _renew_card(model.id, settings, storage)
    return {
        "decision_id": decision.id,
        "passed": decision.passed,
        "candidate_id": decision.candidate_id,
        "champion_id": decision.champion_id,
        "policy": rules.name,
        "policy_version": rules.version,
        "promotion": promotion,
        "caution": caution,
        "approval_hours": settings.approval_hours,
        "rules": decision.rules,
        "explanation": "; ".join(filter(None, [explain(decision), caution])),
        "approval_text": question,
        "decision_url": decision_url(settings, decision.id),
        "report_url": report_url(settings, rows[0].report_key),
    }


def _renew_card(model_id: str, settings: Settings, storage: Storage) -> None:
    """Make the card show what was just committed, as far as that can be done now.

    A card that cannot be written is told of and fails nothing: the gate would be tried again and
    decide twice, and nobody would hear of a champion. It holds only what is recorded elsewhere,
    and is written again with every decision and promotion.
    """
    from gun_detection.release.card import write_card

    try:
        write_card(model_id, settings, storage)
    except Exception as error:
        logger.error(
            "the model card of %s is not up to date (%s: %s): once that is mended, run "
            "`gun-detection card %s --out DIR`",
            model_id,
            type(error).__name__,
            error,
            model_id,
        )


def _measured(version: ModelVersion, row: Evaluation, settings: Settings, storage: Storage) -> Any:
    from gun_detection.evaluation.evaluate import load_samples
    from gun_detection.release.rules import Measured

    return Measured(
        model_id=version.id,
        network=version.config["detector"],
        threshold=version.threshold,
        metrics=row.metrics,
        samples=load_samples(row, settings, storage).items,
        weights_bytes=storage.size(settings.data_bucket, version.weights_key),
    )


def answer(
    settings: Settings, decision_id: int, *, approved: bool, actor: str, comment: str = ""
) -> Json:
    """Record a person's answer to a candidate that passed; the same answer again changes nothing.

    Raises `ReleaseError` when the decision was answered otherwise.
    """
    with open_session(settings) as session:
        decision = _decision(session, decision_id)
        known = session.scalar(select(Approval).where(Approval.gate_decision_id == decision.id))
        if known is None:
            known = Approval(
                gate_decision_id=decision.id, approved=approved, actor=actor, comment=comment
            )
            session.add(known)
        elif known.approved != approved:
            said = "approved" if known.approved else "refused"
            raise ReleaseError(
                f"gate decision {decision_id} was {said} by {known.actor}: run the gate again"
            )
        return {"approved": known.approved, "actor": known.actor, "comment": known.comment}


def promote(
    settings: Settings,
    model: str,
    actor: str,
    reason: str,
    decision_id: int | None = None,
) -> Json:
    """Make a model version champion; with a gate decision, only if that one allows it.

    The stored weights are read and checked first, whoever promotes. The answer says by which
    `policy` the model passed: a look by hand may have taken another than the settings have.
    """
    from gun_detection.release.champion import get_model, policy_name, require_storable
    from gun_detection.release.champion import promote as promote_model
    from gun_detection.release.registry import verify_weights

    storage = Storage(settings)
    with open_session(settings) as session:
        version = get_model(session, model)
    require_storable(version.id, version.threshold, settings)
    verify_weights(version, settings, storage)
    with open_session(settings) as session:
        decision = None if decision_id is None else _decision(session, decision_id)
        row = promote_model(session, model, actor=actor, reason=reason, decision=decision)
        result = {
            "promotion_id": row.id,
            "champion_id": row.model_id,
            "previous_id": row.previous_id,
            "actor": row.actor,
            "policy": None if decision is None else policy_name(decision),
            "card_url": card_url(settings, row.model_id),
        }
    _renew_card(row.model_id, settings, storage)
    return result


def require_passed(settings: Settings, model: str) -> int:
    """The id of the last gate decision on a model; raises `ReleaseError` unless it passed."""
    with open_session(settings) as session:
        last = session.scalar(
            select(GateDecision)
            .where(GateDecision.candidate_id == model)
            .order_by(GateDecision.id.desc())
            .limit(1)
        )
    if last is None or not last.passed:
        raise ReleaseError(
            f"{model} has not passed the gate: run `gun-detection gate {model}`, "
            "or promote it all the same with --force and a reason",
            reason="GATE_NOT_PASSED",
        )
    return last.id


def rollback(
    settings: Settings, actor: str, reason: str, to: str | None = None, *, once: bool = False
) -> Json:
    """Make an earlier champion the champion again, from the next scoring run on.

    With `once` an actor that has done so before does nothing more: for what may be tried again.
    Raises `ReleaseError` where there is nothing to go back to, or another champion since.
    """
    from gun_detection.release.champion import require_storable, rollback_target, rolled_back
    from gun_detection.release.champion import rollback as rollback_model
    from gun_detection.release.registry import verify_weights

    with open_session(settings) as session:
        done = once and rolled_back(session, actor) is not None
        target = None if done else rollback_target(session, to)
    if target is not None:
        require_storable(target.id, target.threshold, settings)
        verify_weights(target, settings, Storage(settings))
        to = target.id
    with open_session(settings) as session:
        row = rollback_model(session, actor=actor, reason=reason, to=to, once=once)
        return {
            "promotion_id": row.id,
            "champion_id": row.model_id,
            "previous_id": row.previous_id,
            "actor": row.actor,
            "reason": row.reason,
            "card_url": card_url(settings, row.model_id),
        }


def prune(settings: Settings, keep: int | None = None, *, dry_run: bool = False) -> Json:
    """Delete the weights of old versions that never were champion; see `release.retention`."""
    from gun_detection.release.retention import prune as prune_models

    keep = settings.keep_models if keep is None else keep
    return prune_models(settings, Storage(settings), keep, dry_run=dry_run)


def package(
    settings: Settings,
    model: str,
    engine: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Json:
    """Make a version ready for an engine, by default for those that the settings may choose."""
    from gun_detection.release.champion import get_model
    from gun_detection.release.packaging import package as make_one
    from gun_detection.release.packaging import package_all

    wanted = settings.engine if engine is None else engine
    with open_session(settings) as session:
        version = get_model(session, model)
    storage = Storage(settings)
    if wanted == "auto":
        made = package_all(version, settings, storage, on_progress)
    elif wanted == "eager":
        made = []
    else:
        made = [make_one(version, wanted, settings, storage, on_progress)]
    return {
        "model_id": version.id,
        "packages": [
            {
                "engine": row.engine,
                "accepted": row.accepted,
                "ap50": row.ap50,
                "reference_ap50": row.reference_ap50,
                "times_reference": row.milliseconds / row.reference_milliseconds
                if row.milliseconds and row.reference_milliseconds
                else None,
                "reason": row.reason,
            }
            for row in made
        ],
    }


def model_card(settings: Settings, model: str) -> dict[str, bytes]:
    """The files of a model's card (HTML, Markdown, pictures), made anew from what is recorded."""
    from gun_detection.release.card import write_card
    from gun_detection.release.champion import get_model

    with open_session(settings) as session:
        version = get_model(session, model)
    return write_card(version.id, settings, Storage(settings))


def _decision(session: Session, decision_id: int) -> GateDecision:
    decision = session.get(GateDecision, decision_id)
    if decision is None:
        raise NotFoundError(f"there is no gate decision {decision_id}")
    return decision
