"""The gate: may this candidate become champion? Rules as data, each with its verdict."""

from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import Session

from gun_detection.database.models import Evaluation, GateDecision
from gun_detection.errors import ReleaseError
from gun_detection.settings import Settings


class Rule(BaseModel):
    """One rule as it was judged; the value passes from `limit` on."""

    model_config = ConfigDict(frozen=True)

    name: str
    value: float | None
    limit: float
    passed: bool

    def __str__(self) -> str:
        value = "nothing measured" if self.value is None else f"{self.value:.3f}"
        return f"{self.name}: {value}, needs {self.limit:.3f}: {'pass' if self.passed else 'FAIL'}"


class Policy(BaseModel):
    """The limits that a candidate has to keep."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_ap50: float
    max_ap50_drop: float

    @classmethod
    def from_settings(cls, settings: Settings, min_ap50: float | None = None) -> "Policy":
        floor = settings.gate_min_ap50 if min_ap50 is None else min_ap50
        return cls(min_ap50=floor, max_ap50_drop=settings.gate_max_ap50_drop)


def judge(candidate: Evaluation, champion: Evaluation | None, policy: Policy) -> list[Rule]:
    """The rules for a candidate; the last one only where there is a champion.

    Raises `ReleaseError` when the two were not measured on the same data by the same code.
    """
    value = candidate.metrics["ap50"]
    rules = [_rule("AP50 floor", value, policy.min_ap50)]
    if champion is None:
        return rules
    for name in ("dataset_id", "holdout_id", "split", "evaluator_version"):
        if getattr(candidate, name) != getattr(champion, name):
            raise ReleaseError(
                f"{candidate.model_id} and {champion.model_id} were evaluated with another {name}: "
                "evaluate both on the same holdout"
            )
    limit = (champion.metrics["ap50"] or 0.0) - policy.max_ap50_drop
    return [*rules, _rule("AP50 of the champion", value, limit)]


def decide(
    session: Session, candidate: Evaluation, champion: Evaluation | None, policy: Policy
) -> GateDecision:
    """Judge and record the decision."""
    rules = judge(candidate, champion, policy)
    decision = GateDecision(
        candidate_id=candidate.model_id,
        champion_id=champion.model_id if champion else None,
        holdout_id=candidate.holdout_id,
        passed=all(rule.passed for rule in rules),
        rules=[rule.model_dump() for rule in rules],
    )
    session.add(decision)
    session.flush()
    return decision


def explain(decision: GateDecision) -> str:
    """One line for people: the verdict and each rule."""
    rules = "; ".join(str(Rule.model_validate(rule)) for rule in decision.rules)
    return f"{decision.candidate_id} {'passes' if decision.passed else 'is rejected'} — {rules}"


def _rule(name: str, value: float | None, limit: float) -> Rule:
    return Rule(name=name, value=value, limit=limit, passed=value is not None and value >= limit)
