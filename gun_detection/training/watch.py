"""Notices a training that goes wrong without a NaN: its loss and gradients rise and stay up."""

from dataclasses import asdict, dataclass
from typing import Any

# Averages over some fifty steps; what single batches do is noise.
_DECAY = 0.98
_LOSS_RISE = 2.0
_NORM_RISE = 3.0


@dataclass
class Watch:
    """Smoothed loss and gradient norm, and the lowest that they have been since the warm-up.

    A training has diverged when the loss stands at twice and the norm at three times its lowest.
    The loss alone also rises where harder pictures come, the norm alone where little is left to
    learn.
    """

    steps: int = 0
    loss: float = 0.0
    norm: float = 0.0
    lowest_loss: float = float("inf")
    lowest_norm: float = float("inf")

    def see(self, loss: float, norm: float, *, warm: bool) -> None:
        """Take in a step; `warm` once the warm-up is over."""
        self.steps += 1
        # The start is not weighed more than the rest: a running mean until there are enough.
        decay = min(_DECAY, 1 - 1 / self.steps)
        self.loss = decay * self.loss + (1 - decay) * loss
        self.norm = decay * self.norm + (1 - decay) * norm
        if warm and self.steps >= 1 / (1 - _DECAY):
            self.lowest_loss = min(self.lowest_loss, self.loss)
            self.lowest_norm = min(self.lowest_norm, self.norm)

    @property
    def diverged(self) -> bool:
        return (
            self.loss > _LOSS_RISE * self.lowest_loss and self.norm > _NORM_RISE * self.lowest_norm
        )

    @property
    def calm(self) -> bool:
        """Whether the state is worth going back to."""
        return not self.loss > 0.5 * (1 + _LOSS_RISE) * self.lowest_loss

    def to_json(self) -> dict[str, Any]:
        return {k: None if v == float("inf") else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Watch":
        infinite = {name: float("inf") for name, value in content.items() if value is None}
        return cls(**(content | infinite))
