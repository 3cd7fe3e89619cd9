"""How a step's rows are drawn, as far as their requests' options say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek.serve.distribution import CANDIDATES, WIDER, Filters
from deepseek.serve.sampling_config import SamplingConfig
from deepseek.serve.sampling_state import SamplingState
from deepseek.serve.transfer import put


class Group(NamedTuple):
    """Rows that are drawn in one way; ``at``: the same on the device, ``None`` for all rows."""

    rows: list[int]
    at: Tensor | None
    filters: Filters
    sorts: bool  #: else one running sum
    enough: int  #: candidates that its ``top_k`` asks for
    totals: bool


class Ways:
    """How a step's rows are drawn, as far as their requests' options say: the same step after step.

    Attributes:
        top: log-probabilities asked for at a place; asked: which rows want any.
        looks: how many candidates are looked at first, and then.
        again: a row may need a second look.
        likeliest: every row wants its likeliest token, and nothing else.
    """

    def __init__(self, states: list[SamplingState], vocabulary: int, device: torch.device) -> None:
        self.states, configs = states, [state.config for state in states]
        self.looks = [CANDIDATES, WIDER, vocabulary][device.type != "cpu" :]
        self.plain = all(state.plain for state in states)
        self.greedy = [i for i, state in enumerate(states) if state.greedy]
        sorting = [c.top_k > 0 or c.top_p < 1 for c in configs]
        self.groups = []
        for sorts in (False, True):
            rows = [i for i, state in enumerate(states) if not state.greedy and sorting[i] == sorts]
            if rows:
                at = None if len(rows) == len(states) else put(rows, device)
                ks = [configs[i].top_k for i in rows]
                enough = max((k + CANDIDATES for k in ks if k), default=0)
                filters = _filters([configs[i] for i in rows], vocabulary, device)
                self.groups.append(Group(rows, at, filters, sorts, enough, not all(ks)))
        asked = [i for i, c in enumerate(configs) if c.logprobs is not None]
        self.asked: Tensor | slice | None = None
        if asked:
            self.asked = slice(None) if len(asked) == len(states) else put(asked, device)
        self.top = max((c.logprobs or 0 for c in configs), default=0)
        self.again = self.top > 0 or any(group.sorts for group in self.groups)
        self.likeliest = self.plain and not self.groups and not asked


def _filters(configs: Sequence[SamplingConfig], vocabulary: int, device: torch.device) -> Filters:
    """Some rows' options as tensors, in one transfer."""
    table = [
        (
            c.temperature,
            c.top_k if 0 < c.top_k < vocabulary else vocabulary,
            c.top_p if c.top_p < 1 else 2.0,
            c.min_p,
        )
        for c in configs
    ]
    heat, k, p, least = put(np.array(table, np.float64).T.copy(), device).unbind()
    return Filters(heat.float(), k.long(), p, least.float() if any(c.min_p for c in configs) else None)
