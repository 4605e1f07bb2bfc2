"""What a rule said of a candidate, as stored and as shown, without the detector's packages."""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    # It keeps nobody out, and nobody becomes champion by it without a person.
    OPEN = "a person decides"
    INSUFFICIENT = "insufficient data"
    NOT_APPLICABLE = "not applicable"


class Verdict(BaseModel):
    """What one rule said. `value` passes from `limit` on, upwards or (`at_most`) downwards;
    with an interval, it is that of `value`. `blocks`: this alone keeps the candidate out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rule: str
    value: float | None
    interval: tuple[float, float] | None
    limit: float
    at_most: bool
    outcome: Outcome
    blocks: bool
    note: str

    @property
    def needs(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.limit:.3f}"

    @property
    def span(self) -> str:
        """The interval, or nothing."""
        return f"{self.interval[0]:.3f} to {self.interval[1]:.3f}" if self.interval else ""

    def __str__(self) -> str:
        value = "nothing measured" if self.value is None else f"{self.value:.3f}"
        parts = [f"{self.rule}: {value}"]
        if self.span:
            parts.append(f"[{self.span}]")
        text = f"{' '.join(parts)} ({self.needs}) "
        text += self.outcome.upper() if self.blocks else self.outcome
        return f"{text}, {self.note}" if self.note else text


def leaves_open(rules: Iterable[Mapping[str, Any]]) -> bool:
    """Whether stored verdicts leave something for a person to decide."""
    return any(rule["outcome"] == Outcome.OPEN for rule in rules)
