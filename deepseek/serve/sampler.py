"""From logits to a token: greedy, temperature, top-k, top-p, with a seed of its own.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.serve.distribution import COLDEST, Filters, draw_all, draw_best, probabilities
from deepseek.serve.sampling_config import Grammar, SamplingConfig

__all__ = ["Grammar", "Sampler", "SamplingConfig"]


class Sampler:
    """Draws tokens for one request; equal seeds and logits draw equal tokens on every device."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self._random = torch.Generator("cpu")
        if config.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(config.seed)

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """The next token of each row: ``[B, V]`` → int64 ``[B]``."""
        c = self.config
        if c.temperature < COLDEST or c.top_k == 1:
            return logits_BV.argmax(-1)
        scores_BV, filters = logits_BV.float(), self._filters(logits_BV)
        uniform_B = torch.rand(len(logits_BV), dtype=torch.float64, generator=self._random).to(
            logits_BV.device
        )
        if c.top_k == 0 and c.top_p == 1:
            return draw_all(scores_BV, filters, uniform_B)
        return draw_best(scores_BV, filters, uniform_B, logits_BV.shape[-1])[0]

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """What tokens are drawn from: temperature, top-k, top-p, min-p; fp32 ``[B, V]``, rows sum to one."""
        return probabilities(logits_BV.float(), self._filters(logits_BV))

    def _filters(self, logits_BV: Tensor) -> Filters:
        c, (rows, size), device = self.config, logits_BV.shape, logits_BV.device
        return Filters(
            torch.full((rows,), c.temperature, device=device),
            torch.full((rows,), min(c.top_k, size) or size, device=device),
            torch.full((rows,), c.top_p if c.top_p < 1 else 2.0, dtype=torch.float64, device=device),
            torch.full((rows,), c.min_p, device=device) if c.min_p else None,
        )
