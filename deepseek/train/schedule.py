"""Learning-rate schedules: linear warm-up, then cosine, or stable and a final decay (WSD, arXiv 2404.06395)."""

from __future__ import annotations

import math
from typing import Literal

from deepseek.config import configclass
from deepseek.errors import ConfigError
from deepseek.train.betas import DynamicBetas, HasGroups


@configclass
class ScheduleConfig:
    """How the learning rate moves; the peak is the optimizer's ``lr``."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = 0.02  # share of the steps, linear from 0
    decay: float = 0.2  # wsd only: share of the steps of the final linear decay
    floor: float = 0.1  # last learning rate as a share of the peak

    def check(self) -> None:
        for name in ("warmup", "decay", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"schedule.{name}={getattr(self, name)} must lie in [0, 1]")
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            raise ConfigError(
                f"schedule.warmup={self.warmup} and decay={self.decay} overlap: their sum exceeds 1"
            )


class Schedule:
    """``factor(step)`` of the peak learning rate for ``steps`` steps, step 0 first."""

    def __init__(self, config: ScheduleConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self.warmup_steps = math.ceil(config.warmup * steps)

    def factor(self, step: int) -> float:
        """The share of the peak learning rate that step ``step`` (from 0) uses."""
        c = self.config
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if c.kind == "constant":
            return 1.0
        start = self.warmup_steps if c.kind == "cosine" else round((1 - c.decay) * self.steps)
        done = min(max(0.0, (step - start) / max(1, self.steps - start)), 1.0)
        shape = (1 + math.cos(math.pi * done)) / 2 if c.kind == "cosine" else 1 - done
        return c.floor + (1 - c.floor) * shape

    def apply(self, optimizer: HasGroups, step: int) -> float:
        """Set every group's ``lr`` for ``step``, and the betas of those that move; returns the first group's ``lr``."""
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.factor(step)
        DynamicBetas(self.warmup_steps).apply(optimizer, step)
        return float(optimizer.param_groups[0]["lr"])
