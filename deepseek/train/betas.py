"""Adam's betas that move with the run: quick to forget while everything changes, slow when it has settled (F29).

β₁ rises linearly from 0.85 to 0.95 over the warm-up, β₂ is ``min(1 − t^−0.8, 0.95)`` after Adafactor (arXiv
1804.04235): 0 in the first step, so that the second moment needs no bias correction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class HasGroups(Protocol):
    """Anything with torch-style parameter groups, each with its ``base_lr``."""

    param_groups: list[dict[str, Any]]


@dataclass(frozen=True)
class DynamicBetas:
    """``betas(step)``, step 0 first; ``apply`` sets those of every group whose optimizer lets them move."""

    warmup_steps: int
    first: float = 0.85
    last: float = 0.95
    highest: float = 0.95  # of β₂
    decay: float = 0.8

    def betas(self, step: int) -> tuple[float, float]:
        done = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return self.first + done * (self.last - self.first), min(
            1 - (step + 1.0) ** -self.decay, self.highest
        )

    def apply(self, optimizer: HasGroups, step: int) -> None:
        for group in optimizer.param_groups:
            if group.get("moving_betas"):
                group["beta1"], group["beta2"] = self.betas(step)
