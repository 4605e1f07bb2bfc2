"""What people see of gate decisions and of the registry, made from the database alone.

Nothing here needs the detector's packages: the Airflow API server shows these pages.
"""

import re
from functools import cache
from typing import Any

from jinja2 import Environment
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from gun_detection import pages
from gun_detection.database.models import Approval, Evaluation, GateDecision, Promotion
from gun_detection.errors import NotFoundError
from gun_detection.release.verdict import Outcome, Verdict, leaves_open
from gun_detection.settings import Settings

_SHOWN = 200
_COLOURS = {"champion": "good", "passed": "wait", "rejected": "bad"}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+!|~])")


@cache
def environment() -> Environment:
    """The templates of pages, with what they all use."""
    made = pages.environment("gun_detection.release")
    made.filters |= {"markdown": markdown_text, "plain": plain_text, "verdict": verdict_text}
    return made


def plain_text(value: object) -> str:
    """A value of a recipe, as people write it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(plain_text(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def verdict_text(decision: GateDecision) -> str:
    """What became of a candidate at the gate."""
    if not decision.passed:
        return "rejected"
    return "passed, a person decides" if leaves_open(decision.rules) else "passed"


def markdown_text(value: object) -> str:
    """Text from outside, so that Markdown shows it as it is."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(value).split()))


def decision_page(session: Session, decision_id: int) -> str:
    """The page of a gate decision; raises `NotFoundError`."""
    decision = session.get(GateDecision, decision_id)
    if decision is None:
        raise NotFoundError(f"there is no gate decision {decision_id}")
    evaluations = {
        "candidate": decision.candidate_evaluation_id,
        "champion": decision.champion_evaluation_id,
    }
    reports = []
    for name, number in evaluations.items():
        row = session.get(Evaluation, number) if number is not None else None
        if row is not None:
            reports.append((name, row.report_key))
    return (
        environment()
        .get_template("decision.html")
        .render(
            decision=decision,
            policy=decision.policy or {"name": "unknown", "version": "unknown"},
            rules=[_cells(rule) for rule in decision.rules],
            asks=leaves_open(decision.rules),
            reports=reports,
            approval=_approval(session, decision),
            promotions=session.scalars(
                select(Promotion)
                .where(Promotion.gate_decision_id == decision.id)
                .order_by(Promotion.id)
            ).all(),
        )
    )


def verdict_page(session: Session, origin: str) -> str:
    """The page of the last gate decision that this run asked for; says so where there is none."""
    found = session.scalar(
        select(GateDecision.id)
        .where(GateDecision.origin == origin)
        .order_by(GateDecision.id.desc())
        .limit(1)
    )
    if found is not None:
        return decision_page(session, found)
    return environment().get_template("nothing.html").render()


def models_page(session: Session) -> str:
    """Champion, who was champion when, and every version with its state."""

    def rows(statement: str) -> list[Any]:
        return list(session.execute(text(statement), {"limit": _SHOWN + 1}).all())

    history = rows("SELECT * FROM champion_history ORDER BY promotion_id DESC LIMIT :limit")
    models = rows("SELECT * FROM model_states ORDER BY created_at DESC, model_id LIMIT :limit")
    return (
        environment()
        .get_template("models.html")
        .render(
            champion=history[0] if history else None,
            history=history[:_SHOWN],
            models=models[:_SHOWN],
            more=len(models) > _SHOWN,
            colours=dict.fromkeys(("candidate", "previous champion"), "") | _COLOURS,
        )
    )


def approval_text(
    session: Session, decision: GateDecision, settings: Settings, caution: str | None = None
) -> str:
    """What a person who approves reads in the Airflow UI, as Markdown: numbers and links."""
    url = settings.public_url.rstrip("/") + pages.BASE
    against = decision.champion_id or "no champion"
    lines = [
        f"**{markdown_text(decision.candidate_id)}** passes the gate against "
        f"**{markdown_text(against)}**. Approve to let it score every upload from the next run on.",
        *([] if caution is None else ["", f"**Look closely**: {markdown_text(caution)}."]),
        "",
        "| rule | value | interval | needs | outcome |",
        "| --- | --- | --- | --- | --- |",
    ]
    for rule in decision.rules:
        row = _cells(rule)
        cells = [row[name] for name in ("rule", "value", "interval", "needs", "outcome")]
        lines.append("| " + " | ".join(markdown_text(cell) for cell in cells) + " |")
    links = [f"[Decision]({url}/decisions/{decision.id})"]
    number = decision.candidate_evaluation_id
    evaluation = None if number is None else session.get(Evaluation, number)
    if evaluation is not None:
        links.append(f"[Report with pictures]({url}/reports/{evaluation.report_key})")
    links.append(f"[Model card]({url}/cards/{decision.candidate_id})")
    return "\n".join([*lines, "", " · ".join(links)])


def _approval(session: Session, decision: GateDecision) -> Approval | None:
    return session.scalar(select(Approval).where(Approval.gate_decision_id == decision.id))


def _cells(rule: dict[str, Any]) -> dict[str, str]:
    """A stored verdict as the cells of a table."""
    verdict = Verdict.model_validate(rule)
    colours = {Outcome.PASSED: "good", Outcome.OPEN: "wait"}
    return {
        "rule": verdict.rule,
        "value": "–" if verdict.value is None else f"{verdict.value:.3f}",
        "interval": verdict.span,
        "needs": verdict.needs,
        "outcome": verdict.outcome,
        "note": verdict.note,
        "colour": "bad" if verdict.blocks else colours.get(verdict.outcome, "dim"),
    }
