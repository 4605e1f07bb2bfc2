"""The gate: may this candidate become champion? Judged by a policy, recorded with its reasons."""

from collections.abc import Sequence

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.models import (
    Approval,
    Evaluation,
    GateDecision,
    ModelVersion,
    Promotion,
)
from gun_detection.datasets.checks import labels_agree
from gun_detection.datasets.manifest import Entry, load_manifest
from gun_detection.errors import ReleaseError
from gun_detection.release.champion import current_champion
from gun_detection.release.policy import Policy
from gun_detection.release.rules import METRICS, Better, Case, NotClearlyWorse, NotWorse, Rule
from gun_detection.release.verdict import Outcome, Verdict
from gun_detection.settings import Settings
from gun_detection.storage import Storage

# Pictures are left out of a source now and then; another source has none of them.
_ENOUGH_KEPT = 0.9
# What another threshold gives for the other, and what none changes.
_TRADED = {
    "recall": "false_positives_per_negative",
    "false_positives_per_negative": "recall",
}
_PRECISIONS = {"ap50", "ap75", "ap"}


def require_same_data(candidate: Evaluation, champion: Evaluation) -> None:
    """Raise `ReleaseError` unless both were measured on the same data by the same code."""
    for name in ("dataset_id", "holdout_id", "split", "evaluator_version"):
        if getattr(candidate, name) != getattr(champion, name):
            raise ReleaseError(
                f"{candidate.model_id} and {champion.model_id} were evaluated with another {name}: "
                "evaluate both on the same holdout"
            )


def caution(
    candidate: ModelVersion,
    champion: ModelVersion | None,
    dataset_id: str,
    settings: Settings,
    storage: Storage,
) -> str | None:
    """What no rule sees and a person should know before this candidate is champion, or None.

    No transaction is open while manifests are read.
    """
    if champion is not None and champion.id == candidate.id:
        return None
    known = None
    with open_session(settings) as session:
        said = [_rolled_back(session, candidate), _refused(session, candidate)]
        if champion is not None:
            known = champion.dataset_id or _measured_on(session, champion)
    if champion is not None:
        said.insert(0, _holdout_changed(known, dataset_id, settings, storage))
    return "; ".join(filter(None, said)) or None


def open_questions(verdicts: Sequence[Verdict]) -> str | None:
    """What the rules leave to a person, in words and numbers, or None."""
    said = (str(verdict) for verdict in verdicts if verdict.outcome is Outcome.OPEN)
    return "; ".join(said) or None


def _holdout_changed(
    known: str | None, dataset_id: str, settings: Settings, storage: Storage
) -> str | None:
    """What is said where a holdout has too few of the pictures that the champion was measured on,
    those of the data set `known`.

    A picture counts only with the same label, and those with a gun count for themselves, too: who
    finds a gun that lost its label is charged with a false alarm.
    """
    if known is None:
        return (
            "nobody knows which pictures the champion was measured on: what it was good at was "
            "not compared"
        )
    bucket = settings.data_bucket
    own = load_manifest(storage, bucket, known).split("holdout")
    new = load_manifest(storage, bucket, dataset_id).split("holdout")
    found = {entry.sha256: entry for entry in new}
    guns = tuple(entry for entry in own if entry.boxes)
    for kind, entries in (("pictures", own), ("pictures with a gun", guns)):
        here = [(entry, found[entry.sha256]) for entry in entries if entry.sha256 in found]
        kept = sum(_same_label(*both) for both in here)
        if kept < _ENOUGH_KEPT * len(entries):
            return (
                f"only {kept / len(entries):.0%} of the {len(entries)} {kind} that the champion "
                f"was measured on are in this holdout as they were, {len(here) - kept} have other "
                f"labels now and {len(entries) - len(here)} are gone: what it was good at was not "
                "compared"
            )
    return None


def _measured_on(session: Session, champion: ModelVersion) -> str | None:
    """The data set by which a model of unknown origin was made champion.

    What it was measured on since, as the champion of later decisions, says nothing about that.
    """
    made = session.scalar(
        select(Promotion)
        .where(Promotion.model_id == champion.id, Promotion.kind == "promote")
        .order_by(Promotion.id.desc())
        .limit(1)
    )
    if made is None:
        return None
    if made.gate_decision_id is not None:
        decision = session.get_one(GateDecision, made.gate_decision_id)
        if decision.candidate_evaluation_id is not None:
            return session.get_one(Evaluation, decision.candidate_evaluation_id).dataset_id
    return session.scalar(
        select(Evaluation.dataset_id)
        .where(
            Evaluation.model_id == champion.id,
            Evaluation.split == "holdout",
            Evaluation.created_at <= made.created_at,
        )
        .order_by(Evaluation.id.desc())
        .limit(1)
    )


def _same_label(one: Entry, other: Entry) -> bool:
    return labels_agree(*(entry.box_array().astype(np.float64) for entry in (one, other)))


def _rolled_back(session: Session, candidate: ModelVersion) -> str | None:
    """Who went back from this model last, when and why."""
    row = session.scalar(
        select(Promotion)
        .where(Promotion.kind == "rollback", Promotion.previous_id == candidate.id)
        .order_by(Promotion.id.desc())
        .limit(1)
    )
    if row is None:
        return None
    return (
        f"{candidate.id} was champion before, and {row.actor} rolled it back on "
        f"{row.created_at:%Y-%m-%d}: {row.reason}"
    )


def _refused(session: Session, candidate: ModelVersion) -> str | None:
    """Who refused this model last, when and why."""
    row = _last_refusal(session, candidate.id)
    if row is None:
        return None
    said = f"{candidate.id} was refused on {row.created_at:%Y-%m-%d} by {row.actor}"
    return f"{said}: {row.comment}" if row.comment else said


def _last_refusal(session: Session, candidate_id: str) -> Approval | None:
    """Of any decision on this model: who looks at it again by hand takes nothing back."""
    return session.scalar(
        select(Approval)
        .join(GateDecision, GateDecision.id == Approval.gate_decision_id)
        .where(GateDecision.candidate_id == candidate_id, Approval.approved.is_(False))
        .order_by(Approval.id.desc())
        .limit(1)
    )


def judge(case: Case, policy: Policy) -> list[Verdict]:
    """What each rule of the policy says, in its order; a trade is left to a person."""
    return _open_trade(policy.rules, [rule.judge(case) for rule in policy.rules])


def _open_trade(rules: Sequence[Rule], verdicts: list[Verdict]) -> list[Verdict]:
    """What a gun found is worth in false alarms, no rule knows.

    Where one of the two is all that keeps a candidate out, the other is shown to be better and
    average precision passed, it has another operating point: a person decides.
    """
    judged = list(zip(rules, verdicts, strict=True))
    blocking = [(rule, verdict) for rule, verdict in judged if verdict.blocks]
    if len(blocking) != 1:
        return verdicts
    [(guard, loss)] = blocking
    if not isinstance(guard, NotClearlyWorse) or loss.outcome is not Outcome.FAILED:
        return verdicts
    passed = [
        (rule.metric, verdict)
        for rule, verdict in judged
        if isinstance(rule, NotWorse | Better | NotClearlyWorse)
        and verdict.outcome is Outcome.PASSED
    ]
    gains = [
        f"{METRICS[metric]} better by {verdict.value:.3f} [{verdict.span}]"
        for metric, verdict in passed
        if metric == _TRADED.get(guard.metric) and verdict.interval and verdict.interval[0] > 0
    ]
    if not gains or not any(metric in _PRECISIONS for metric, _ in passed):
        return verdicts
    update = {"outcome": Outcome.OPEN, "blocks": False, "note": f"a trade: {gains[0]}"}
    traded = loss.model_copy(update=update)
    return [traded if verdict is loss else verdict for verdict in verdicts]


def passes(verdicts: Sequence[Verdict]) -> bool:
    """Whether nothing keeps the candidate out, and at least one rule found for it."""
    return not any(verdict.blocks for verdict in verdicts) and any(
        verdict.outcome is Outcome.PASSED for verdict in verdicts
    )


def record(
    session: Session,
    candidate: Evaluation,
    champion: Evaluation | None,
    policy: Policy,
    verdicts: Sequence[Verdict],
    origin: str | None = None,
    promotion: str | None = None,
) -> GateDecision:
    """Store the decision with all that it rests on; `origin` is who asked for it, `promotion` what
    is to become of a candidate that passed."""
    decision = GateDecision(
        candidate_id=candidate.model_id,
        champion_id=champion.model_id if champion else None,
        candidate_evaluation_id=candidate.id,
        champion_evaluation_id=champion.id if champion else None,
        holdout_id=candidate.holdout_id,
        passed=passes(verdicts),
        policy=policy.model_dump(mode="json") | {"version": policy.version, "promotion": promotion},
        rules=[verdict.model_dump(mode="json") for verdict in verdicts],
        origin=origin,
    )
    session.add(decision)
    session.flush()
    return decision


def explain(decision: GateDecision) -> str:
    """One line for people: the verdict, and the rules that found for it or that keep it out."""
    verdicts = [Verdict.model_validate(rule) for rule in decision.rules]
    shown = [
        verdict
        for verdict in verdicts
        if (verdict.outcome is Outcome.PASSED if decision.passed else verdict.blocks)
    ]
    said = "passes" if decision.passed else "is rejected"
    rules = "; ".join(str(verdict) for verdict in shown) or "no rule of the policy found for it"
    return f"{decision.candidate_id} {said} — {rules}"


def why_again(session: Session, decision: GateDecision) -> str | None:
    """Why a candidate whose last decision this is should be judged once more, or None.

    Not so what ever was champion, and what people refused or kept for themselves at any time.
    """
    candidate, champion = decision.candidate_id, current_champion(session)
    ever = select(Promotion.id).where(Promotion.model_id == candidate).limit(1)
    by_hand = (
        select(GateDecision.id)
        .where(
            GateDecision.candidate_id == candidate,
            GateDecision.policy["promotion"].astext == "manual",
        )
        .limit(1)
    )
    if session.scalar(ever) is not None or session.scalar(by_hand) is not None:
        return None
    if _last_refusal(session, candidate) is not None:
        return None
    if decision.champion_id != (champion.id if champion else None):
        return f"{candidate} was compared with another champion than the present one"
    if decision.passed:
        return f"{candidate} passed the gate, and was neither promoted nor refused"
    return None
