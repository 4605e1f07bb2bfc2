"""The gate: may this candidate become champion? Judged by a policy, recorded with its reasons."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from gun_detection.database.models import Evaluation, GateDecision, ModelVersion
from gun_detection.datasets.manifest import load_manifest
from gun_detection.errors import ReleaseError
from gun_detection.release.policy import Policy
from gun_detection.release.rules import Case
from gun_detection.release.verdict import Outcome, Verdict
from gun_detection.settings import Settings
from gun_detection.storage import Storage


def require_same_data(candidate: Evaluation, champion: Evaluation) -> None:
    """Raise `ReleaseError` unless both were measured on the same data by the same code."""
    for name in ("dataset_id", "holdout_id", "split", "evaluator_version"):
        if getattr(candidate, name) != getattr(champion, name):
            raise ReleaseError(
                f"{candidate.model_id} and {champion.model_id} were evaluated with another {name}: "
                "evaluate both on the same holdout"
            )


def holdout_kept(
    champion: ModelVersion, dataset_id: str, settings: Settings, storage: Storage
) -> float:
    """The share of the holdout of the champion's own data that is in that of another data set.

    1.0 where it is the same data, or where nobody knows what the champion learned from.
    """
    if champion.dataset_id is None or champion.dataset_id == dataset_id:
        return 1.0
    bucket = settings.data_bucket
    own, new = (
        {entry.sha256 for entry in load_manifest(storage, bucket, one).split("holdout")}
        for one in (champion.dataset_id, dataset_id)
    )
    return len(own & new) / len(own) if own else 1.0


def judge(case: Case, policy: Policy) -> list[Verdict]:
    """What each rule of the policy says, in its order."""
    return [rule.judge(case) for rule in policy.rules]


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
) -> GateDecision:
    """Store the decision with all that it rests on; `origin` is who asked for it."""
    decision = GateDecision(
        candidate_id=candidate.model_id,
        champion_id=champion.model_id if champion else None,
        candidate_evaluation_id=candidate.id,
        champion_evaluation_id=champion.id if champion else None,
        holdout_id=candidate.holdout_id,
        passed=passes(verdicts),
        policy=policy.model_dump(mode="json") | {"version": policy.version},
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
