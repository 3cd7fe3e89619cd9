"""Sequences in a paged cache, stepped in any composition: what the tests of paged attention share.

Pages are handed out in random order and window pages are given back as a scheduler would.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.nn.attention import Attention, AttentionConfig, Context, FullAttention, WindowAttention
from deepseek.nn.cache import LayerCache
from deepseek.nn.hybrid import HybridAttention
from deepseek.nn.rope import rope_table, rotate
from deepseek.ops.paged_attention import (
    Pooled,
    StepRows,
    paged_attention,
    paged_hybrid_attention,
    pool_pages,
    write_pages,
)

KINDS: dict[str, Callable[..., Attention]] = {"F": FullAttention, "L": WindowAttention, "H": HybridAttention}


@dataclass
class Case:
    """An attention layer and projected rows of sequences: ``x [T, C]``, ``q [T, H, D]``, ``k, v [T, K, D]``."""

    kind: str
    layer: Attention
    x: list[Tensor]
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]

    @property
    def config(self) -> AttentionConfig:
        return self.layer.config

    def to(self, device: str, dtype: torch.dtype) -> Case:
        moved = [[x.to(device, dtype) for x in some] for some in (self.x, self.q, self.k, self.v)]
        return Case(self.kind, self.layer.to(device, dtype), *moved)

    def _mixed(self, sequence: int, lo: int, hi: int, context: Context, cache: LayerCache | None) -> Tensor:
        """``[T, H, D]`` of the model's own module for these positions."""
        x, *heads = (some[sequence][None, lo:hi] for some in (self.x, self.q, self.k, self.v))
        q, k, v = (y.transpose(1, 2) for y in heads)
        if self.layer.rotates:
            q, k = rotate(q, context.rope), rotate(k, context.rope)
        return self.layer.mix(q, k, v, x, context, cache)[0][0].transpose(0, 1)

    @torch.no_grad()
    def whole(self, sequence: int) -> Tensor:
        """``[T, H, D]`` of the model's own module over the whole sequence."""
        x = self.x[sequence]
        context = Context(self.config, len(x), x.device, kinds=self.kind, dtype=x.dtype)
        return self._mixed(sequence, 0, len(x), context, None)

    @torch.no_grad()
    def decoded(self, sequence: int, prompt: int) -> Tensor:
        """The same by the model's own cache: a prompt, then a position at a time."""
        x, cache, parts = self.x[sequence], self.layer.new_cache(), []
        for lo, hi in [(0, prompt), *((t, t + 1) for t in range(prompt, len(x)))]:
            context = Context(self.config, hi - lo, x.device, start=lo, kinds=self.kind, dtype=x.dtype)
            parts.append(self._mixed(sequence, lo, hi, context, cache))
        return torch.cat(parts)


def make_case(kind: str, config: AttentionConfig, lengths: list[int], seed: int = 0) -> Case:
    random = torch.Generator().manual_seed(seed)
    layer = KINDS[kind](24, config)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.5, generator=random)

    def rows(*shape: int) -> list[Tensor]:
        return [torch.randn(n, *shape, generator=random) for n in lengths]

    heads = [rows(n, config.head_dim) for n in (config.heads, config.kv_heads, config.kv_heads)]
    return Case(kind, layer, rows(24), *heads)


class Pages:
    """The caches of one layer, and the tables of its sequences.

    Args:
        spare: pages beyond what is needed, so that numbers are scattered. All pages but the trash page start as NaN.
    """

    def __init__(self, case: Case, page: int, seed: int = 0, spare: int = 7) -> None:
        c, self.case, self.page = case.config, case, page
        self.lengths = [0] * len(case.x)
        self.most = max(-(-len(x) // page) for x in case.x)
        self.random = random.Random(seed)
        count = self.most * len(case.x) + spare
        self.free = {group: self.random.sample(range(1, count), count - 1) for group in ("global", "window")}
        self.tables = {group: [[0] * self.most for _ in case.x] for group in ("global", "window")}
        self.keep = max(c.window, c.block) if case.kind == "H" else c.window
        like = case.x[0]

        def cache(slots: int) -> Tensor:
            pages = like.new_full((count, slots, c.kv_heads, c.head_dim), float("nan"))
            pages[0] = 0
            return pages

        self.k, self.v, self.raw = cache(page), cache(page), cache(page)
        if case.kind == "H":
            self.pool_k, self.pool_v = cache(page // c.stride), cache(page // c.stride)

    def rows(self, step: list[tuple[int, int]], exact: bool = False, padding: int = 0) -> StepRows:
        """The next ``count`` positions of each ``(sequence, count)``; single rows first, as a scheduler orders them."""
        step = sorted(step, key=lambda item: item[1] > 1)
        slots: dict[str, list[int]] = {"global": [], "window": []}
        position: list[int] = []
        for s, count in step:
            start, end = self.lengths[s], self.lengths[s] + count
            for group, slot in slots.items():
                table = self.tables[group][s]
                for i in range(start // self.page, (end - 1) // self.page + 1):
                    table[i] = table[i] or self.free[group].pop()
                slot += [table[t // self.page] * self.page + t % self.page for t in range(start, end)]
            position += range(start, end)
            self.lengths[s] = end
        counts = [count for _, count in step]
        lengths = [self.lengths[s] for s, _ in step]
        device = self.k.device
        ints = [torch.tensor([self.tables[g][s] for s, _ in step]).int().to(device) for g in slots]
        return StepRows(
            position_N=torch.tensor(position + [0] * padding, device=device),
            ends_S=torch.tensor([0, *counts]).cumsum(0).int().to(device),
            length_S=torch.tensor(lengths).int().to(device),
            global_SP=ints[0], window_SP=ints[1],
            global_slot_N=torch.tensor(slots["global"] + [0] * padding, device=device),
            window_slot_N=torch.tensor(slots["window"] + [0] * padding, device=device),
            page=self.page, rows=tuple(counts), lengths=tuple(lengths), decodes=counts.count(1), exact=exact,
        )  # fmt: skip

    def inputs(self, rows: StepRows, step: list[tuple[int, int]]) -> list[Tensor]:
        """q, k, v of the step's rows, padded to ``rows.position_N``."""
        step = sorted(step, key=lambda item: item[1] > 1)
        taken = []
        for some in (self.case.q, self.case.k, self.case.v):
            one = torch.cat([some[s][end - n : end] for (s, n), end in zip(step, rows.lengths)])
            padding = one.new_zeros(len(rows.position_N) - len(one), *one.shape[1:])
            taken.append(torch.cat((one, padding)))
        return taken

    def gates(self, rows: StepRows, step: list[tuple[int, int]]) -> Tensor:
        """``[N, H]``, from each whole sequence: the product that makes them is not what is tested."""
        assert isinstance(self.case.layer, HybridAttention)
        step = sorted(step, key=lambda item: item[1] > 1)
        whole = [self.case.layer.gates(self.case.x[s][None])[0].T for s, _ in step]
        one = torch.cat([g[end - n : end] for g, (_, n), end in zip(whole, step, rows.lengths)])
        return torch.cat((one, one.new_zeros(len(rows.position_N) - len(one), one.shape[1])))

    @torch.no_grad()
    def step(
        self,
        step: list[tuple[int, int]],
        exact: bool = False,
        padding: int = 0,
        attend: Callable[..., Tensor] | None = None,
    ) -> dict[int, Tensor]:
        """Write, pool and attend; ``[count, H, D]`` of each sequence."""
        rows = self.rows(step, exact, padding)
        q, k, v = self.inputs(rows, step)
        c, layer = self.case.config, self.case.layer
        table = rope_table(rows.position_N, c.head_dim, c.rope_theta)
        q_rope, k_rope = (rotate(y.transpose(0, 1)[None], table)[0].transpose(0, 1) for y in (q, k))
        if isinstance(layer, HybridAttention):
            write_pages(self.k, self.v, k_rope, v, rows.window_slot_N)
            self.raw.flatten(0, 1).index_copy_(0, rows.window_slot_N, k)
            pool_pages(self.raw, self.v, self.pool_k, self.pool_v, rows, c.block, c.stride, layer.pooling())
            gate = self.gates(rows, step)
            pooled = Pooled(q, gate, self.pool_k, self.pool_v, layer.sink, c.block, c.stride)
            y = paged_hybrid_attention(q_rope, self.k, self.v, pooled, rows, c.window)
        elif self.case.kind == "L":
            write_pages(self.k, self.v, k_rope, v, rows.window_slot_N)
            y = paged_attention(q_rope, self.k, self.v, rows.window_SP, rows, c.window)
        else:
            if not c.full_rope:
                q_rope, k_rope = q, k
            write_pages(self.k, self.v, k_rope, v, rows.global_slot_N)
            y = paged_attention(q_rope, self.k, self.v, rows.global_SP, rows)
        self._give_back()
        sequences = [s for s, _ in sorted(step, key=lambda item: item[1] > 1)]
        return dict(zip(sequences, y[: sum(rows.rows)].split(list(rows.rows))))

    def _give_back(self) -> None:
        for s, length in enumerate(self.lengths):
            for i in range(max(0, length + 1 - self.keep) // self.page):
                if number := self.tables["window"][s][i]:
                    self.free["window"].insert(0, number)
                    self.tables["window"][s][i] = 0

    def run(self, seed: int, most: int = 40, exact: bool = False, padding: int = 0) -> list[Tensor]:
        """Everything, in steps drawn at random: chunks, decodes, a few rows; ``[T, H, D]`` of each sequence."""
        draw, parts = random.Random(seed), [[] for _ in self.case.x]  # type: list[list[Tensor]]
        while left := [s for s, x in enumerate(self.case.x) if self.lengths[s] < len(x)]:
            step = []
            for s in draw.sample(left, draw.randint(1, len(left))):
                room = len(self.case.x[s]) - self.lengths[s]
                step.append((s, min(room, draw.choice([1, 1, draw.randint(1, 6), draw.randint(1, most)]))))
            for s, y in self.step(step, exact, padding).items():
                parts[s].append(y)
        return [torch.cat(p) for p in parts]
