"""Paged attention in plain torch: gather the pages of some rows, then one batched attention over them.

The rows of a step are cut into *parts*: decodes together, other short sequences together (padded to the longest),
longer chunks alone and in pieces. Which rows, which slots and which masks is decided once a step from numbers that the
host has, and shared by all layers. A part gathers no more than ``BUDGET`` bytes, so that what was gathered is still in
the processor's cache when it is attended to (measured: up to 6 times faster than all sequences at once), and as
sequences are taken in order of length little of it is padding. Keys are never repeated for the query heads of a group:
the group is folded into the query's rows, or keys are read with stride 0. 16-bit keys are widened after gathering: on a
CPU without 16-bit matrix units that is as fast as attention in 16 bits, and closer to the exact result.

Shape letters: N rows of the step, S sequences, R rows of each sequence of a part, L gathered keys, T positions of a
page, J slots of a page, H query heads, K key/value heads, G = H/K, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops.hybrid_attention import pooled_length
from deepseek.ops.paged_rows import Pooled, StepRows, gather, key_slots
from deepseek.registry import register_op

SHORT = 16  #: sequences with at most so many rows are attended together
PIECE = 256  #: rows of a longer one that are attended at a time
BUDGET = 4 << 20  #: bytes of keys and values that decodes gather at a time


@register_op("paged_attention", "gathered")
def paged_attention(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, table_SP: Tensor, rows: StepRows, window: int | None = None
) -> Tensor:
    """``deepseek.ops.paged_attention.paged_attention``."""
    return _positions(q_NHD, k_PTKD, v_PTKD, table_SP, rows, window).to(q_NHD.dtype)


def _positions(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, table_SP: Tensor, rows: StepRows, window: int | None
) -> Tensor:
    q = _wide(q_NHD)
    sizes = Sizes(q.shape[1], q.shape[2], k_PTKD.shape[2], q.dtype)
    parts = rows.once(("parts", window, sizes), lambda: _position_parts(rows, table_SP, window, sizes))
    return _over(parts, q, lambda part, q: part.attend(q, *part.keys(k_PTKD, v_PTKD, q.dtype)))


@register_op("paged_hybrid_attention", "gathered")
def paged_hybrid_attention(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, pooled: Pooled, rows: StepRows, window: int
) -> Tensor:
    """``deepseek.ops.paged_attention.paged_hybrid_attention``."""
    local = _positions(q_NHD, k_PTKD, v_PTKD, rows.window_SP, rows, window)
    q = _wide(pooled.q_NHD)
    sizes, shape = Sizes(q.shape[1], q.shape[2], k_PTKD.shape[2], q.dtype), (pooled.block, pooled.stride)
    parts = rows.once(("pooled", *shape, sizes), lambda: _pooled_parts(rows, *shape, sizes))
    first = pooled.sink.to(q.dtype)[:, None, :, None]

    def attend(part: Part, q: Tensor) -> Tensor:
        keys = part.keys(pooled.k_PJKD, pooled.v_PJKD, q.dtype)
        k, v = (torch.cat((one.expand(len(x), -1, -1, -1), x), 2) for one, x in zip(first, keys))
        return part.attend(q, k, v)

    whole = _over(parts, q, attend)
    return torch.lerp(local, whole, pooled.gate_NH[..., None].to(local.dtype)).to(q_NHD.dtype)


def _wide(q_NHD: Tensor) -> Tensor:
    return q_NHD.float() if q_NHD.is_cpu and q_NHD.element_size() < 4 else q_NHD


# --- parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Of the attention: query and key heads, head size, and in which dtype it is computed."""

    heads: int
    head_dim: int
    kv_heads: int
    dtype: torch.dtype

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def fit(self, keys: int) -> int:
        """How many sequences with so many keys a part may gather."""
        return max(1, BUDGET // (2 * keys * self.kv_heads * self.head_dim * self.dtype.itemsize))


@dataclass(frozen=True)
class Part:
    """Rows that are attended together.

    Attributes:
        at: the rows: a slice of S·R of them, or int64 ``[S·R]`` (padding repeats a sequence's last row).
        slot: for ``gather``. mask: 0 and −inf, ``[1, 1, R, L]`` of one sequence, ``[S, 1, R·G, L]`` of more; ``None``:
            all is seen.
    """

    at: slice | Tensor
    sequences: int
    slot: Tensor
    mask: Tensor | None

    def keys(self, k: Tensor, v: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """``[S, K, L, D]`` of each."""
        K, D = k.shape[2:]
        return [
            gather(x, self.slot, name, dtype).view(self.sequences, K, -1, D)
            for name, x in (("k", k), ("v", v))
        ]

    def attend(self, q_NHD: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[S·R, H, D]``."""
        S, (N, H, D), K = self.sequences, q_NHD.shape, k.shape[1]
        q = q_NHD.reshape(S, N // S, K, H // K, D)
        if S == 1 and N > 1:  # key heads become rows of a batch, and the heads of a group read the same keys
            k, v = (x[0, :, None].expand(-1, H // K, -1, -1) for x in (k, v))
            y = F.scaled_dot_product_attention(q[0].permute(1, 2, 0, 3), k, v, attn_mask=self.mask)
            return y.permute(2, 0, 1, 3).reshape(N, H, D)
        y = F.scaled_dot_product_attention(q.transpose(1, 2).reshape(S, K, -1, D), k, v, attn_mask=self.mask)
        return y.view(S, K, N // S, H // K, D).transpose(1, 2).reshape(N, H, D)


def _over(parts: list[Part], q_NHD: Tensor, attend: Callable[[Part, Tensor], Tensor]) -> Tensor:
    """``attend`` for every part, put together."""
    if len(parts) == 1 and parts[0].at == slice(0, len(q_NHD)):
        return attend(parts[0], q_NHD)
    y_NHD = torch.zeros_like(q_NHD)
    for part in parts:
        if isinstance(part.at, slice):
            y_NHD[part.at] = attend(part, q_NHD[part.at])
        else:
            y_NHD.index_copy_(0, part.at, attend(part, q_NHD.index_select(0, part.at)))
    return y_NHD


@dataclass(frozen=True)
class _Piece:
    """Sequences of one part (a slice, or int64), ``count`` rows of each, and how many positions they have."""

    at: slice | Tensor
    sequence: slice | Tensor
    count: int
    longest: int
    shortest: int


def _pieces(rows: StepRows, keys: Callable[[int], int], sizes: Sizes, most: int) -> list[_Piece]:
    """The step's rows in pieces; ``keys(length)``: how many keys a sequence gathers; ``most``: rows of a piece."""
    first = [0]
    for count in rows.rows:
        first.append(first[-1] + count)
    pieces = []
    short = [s for s, count in enumerate(rows.rows) if s >= rows.decodes and count <= SHORT]
    for members in (list(range(rows.decodes)), short):
        for some in _alike(members, rows.lengths, keys, sizes):
            pieces.append(_together(some, rows, first))
    for s, count in enumerate(rows.rows):
        if count > SHORT:
            for lo in range(0, count, most):
                hi = min(lo + most, count)
                at, longest = slice(first[s] + lo, first[s] + hi), rows.lengths[s] - count + hi
                pieces.append(_Piece(at, slice(s, s + 1), hi - lo, longest, longest))
    return pieces


def _alike(
    members: list[int], lengths: tuple[int, ...], keys: Callable[[int], int], sizes: Sizes
) -> list[list[int]]:
    """``members`` cut so that a part's keys fit in the budget; if it must be cut, in order of length."""
    if not members:
        return []
    need = {s: keys(lengths[s]) for s in members}
    longest, total = max(need.values()), sum(need.values())
    if len(members) <= sizes.fit(longest) and len(members) * longest <= 1.5 * total + 1024:
        return [members]
    ordered, cut = sorted(members, key=lambda s: (-lengths[s], s)), []
    while ordered:
        longest = need[ordered[0]]
        near = sum(2 * need[s] >= longest or longest <= 256 for s in ordered)
        size = min(near, sizes.fit(longest))
        cut.append(sorted(ordered[:size]))
        ordered = ordered[size:]
    return cut


def _together(some: list[int], rows: StepRows, first: list[int]) -> _Piece:
    R, lengths = max(rows.rows[s] for s in some), [rows.lengths[s] for s in some]
    at: slice | Tensor = slice(first[some[0]], first[some[-1] + 1])
    sequence: slice | Tensor = slice(some[0], some[-1] + 1)
    if any(b != a + 1 for a, b in pairwise(some)) or any(rows.rows[s] != R for s in some):
        index, device = (
            [first[s] + min(r, rows.rows[s] - 1) for s in some for r in range(R)],
            rows.position_N.device,
        )
        at, sequence = torch.tensor(index, device=device), torch.tensor(some, device=device)
    return _Piece(at, sequence, R, max(lengths), min(lengths))


def _mask(seen_SRL: Tensor, sizes: Sizes) -> Tensor:
    S, R, L = seen_SRL.shape
    mask = torch.zeros(S, 1, R, L, dtype=sizes.dtype, device=seen_SRL.device)
    mask.masked_fill_(~seen_SRL[:, None], float("-inf"))
    return mask.repeat_interleave(sizes.group, 2) if S > 1 and R > 1 else mask


def _position_parts(rows: StepRows, table_SP: Tensor, window: int | None, sizes: Sizes) -> list[Part]:
    """Parts over pages of positions; with a window only over the positions that some row of the part sees."""

    def keys(length: int) -> int:
        return length if window is None else min(length, window + SHORT)

    parts = []
    most = PIECE if window is None else min(max(window, 128), PIECE)
    for piece in _pieces(rows, keys, sizes, most):
        table, device, mask, end_S = table_SP[piece.sequence], table_SP.device, None, None
        position_SR = rows.position_N[piece.at].view(len(table), -1)
        if window is None or piece.longest <= window:
            place_SL = torch.arange(piece.longest, device=device).expand(len(table), -1)
            alike = piece.shortest == piece.longest
        else:
            reach = torch.arange(window + piece.count - 1, device=device)
            place_SL = (position_SR[:, :1] - window + 1).clamp(min=0) + reach
            alike = piece.shortest >= window
        if piece.count > 1 or not alike:
            seen, end_S = place_SL[:, None] <= position_SR[..., None], position_SR[:, -1:] + 1
            if window is not None:
                seen &= place_SL[:, None] > position_SR[..., None] - window
            mask = _mask(seen, sizes)
        slot = key_slots(table, place_SL, end_S, rows.page, sizes.kv_heads)
        parts.append(Part(piece.at, len(table), slot, mask))
    return parts


def _pooled_parts(rows: StepRows, block: int, stride: int, sizes: Sizes) -> list[Part]:
    """Parts over slots of pooled blocks; the sink comes first in the mask."""
    parts, before = [], (block - 1) // stride  # slots that no block completes in

    def keys(length: int) -> int:
        return length // stride + 1

    for piece in _pieces(rows, keys, sizes, PIECE):
        table, device, mask, end_S = rows.global_SP[piece.sequence], rows.global_SP.device, None, None
        blocks = pooled_length(piece.longest, block, stride)
        block_L = torch.arange(blocks, device=device)
        place_SL = (block_L + before).expand(len(table), -1)
        if piece.count > 1 or pooled_length(piece.shortest, block, stride) < blocks:
            position_SR = rows.position_N[piece.at].view(len(table), -1)
            seen = block_L * stride + block - 1 <= position_SR[..., None]
            mask = _mask(F.pad(seen, (1, 0), value=True), sizes)
            end_S = (position_SR[:, -1:] + 1) // stride  # a slot for every stride, complete or not
        slot = key_slots(table, place_SL, end_S, rows.page // stride, sizes.kv_heads)
        parts.append(Part(piece.at, len(table), slot, mask))
    return parts
