"""Attention of one serving step over a paged cache: decodes, prefill chunks and speculation in one call (F50).

A page holds ``page`` positions of one sequence, pages lie anywhere, and a sequence's *table* says where
(PagedAttention, arXiv 2309.06180). Two groups of pages: **global** (all positions of a full layer; the pooled blocks of
a hybrid one) and **window** (what a window still reaches; older pages are given back and their entries are 0, the
trash page).

In plain torch the rows of a step are cut into *parts* that have about as many rows and as many pages; a part gathers
its pages once and is one batched attention. Which parts, which pages and which masks is decided once a step from
numbers that the host has (``StepRows``), and shared by all layers. A part never repeats keys for the query heads of a
group: the group is folded into the query's rows. On a GPU, fused kernels (``deepseek.ops.triton.paged_attention``) read
the pages where they lie.

A pooled block j of a hybrid layer covers positions ``j·stride … j·stride + block − 1`` and lies in slot
``j + (block − 1) // stride``, slots counted like ``position // stride``: in the page of the position that completes it.
So what a page holds depends only on the tokens up to its end, which makes a cached prefix right for every layer.

Pages must hold finite numbers (new ones zeros): what is masked is multiplied by zero.

Shape letters: N rows of the step, S sequences, P pages, T positions of a page, J slots of a page, H query heads, K
key/value heads, G = H/K, D head size, R rows of each sequence of a part, L gathered keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops.attention import pick_backend
from deepseek.ops.hybrid_attention import pooled_length
from deepseek.registry import get_op, register_op

SHORT = 16  #: sequences with at most so many rows are attended together, padded to the longest of them


@dataclass(frozen=True)
class StepRows:
    """Which rows of a step belong to which sequence; made once a step and shared by all layers.

    Rows of a sequence are neighbours, in order of position. Rows beyond the last sequence's are padding: they are
    written to the trash page and what comes out for them is zero or meaningless.

    Attributes:
        position_N: int64, position of each row in its sequence.
        ends_S: int32 ``[S+1]``, first row of each sequence, and the end of the last.
        length_S: int32, positions in the cache after this step.
        global_SP, window_SP: int32 page tables, entry i for positions ``i·page …``; 0, the trash page, for none.
        global_slot_N, window_slot_N: int64 ``page number · page + offset``, where each row's key and value go.
        page: positions of a page, a multiple of a hybrid layer's stride.
        rows, lengths: the same on the host: rows of each sequence, and ``length_S`` (kernels take an upper bound too).
        decodes: the first so many sequences have exactly one row each.
        exact: compute each row in one fixed order, so that its result is the same to the last bit whatever other rows,
            chunks, pages and threads there are (``deepseek.ops.paged_exact``).
    """

    position_N: Tensor
    ends_S: Tensor
    length_S: Tensor
    global_SP: Tensor
    window_SP: Tensor
    global_slot_N: Tensor
    window_slot_N: Tensor
    page: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    decodes: int
    exact: bool = False
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make()`` returns, made by the first layer that asks for ``key`` in this step."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def starts(self) -> tuple[int, ...]:
        """The position of each sequence's first row."""
        return tuple(length - rows for length, rows in zip(self.lengths, self.rows))


def backend_for(q_NHD: Tensor, rows: StepRows) -> str:
    """Which implementation takes this step: ``exact``, ``triton`` or ``gathered``."""
    if rows.exact:
        return "exact"
    fits = pick_backend(q_NHD.device, q_NHD.shape[-1], q_NHD.dtype) == "triton"
    return "triton" if fits else "gathered"


# --- writing --------------------------------------------------------------------------------------------------------


def write_pages(k_PTKD: Tensor, v_PTKD: Tensor, k_NKD: Tensor, v_NKD: Tensor, slot_N: Tensor) -> None:
    """Put keys and values of this step's rows ``[N, K, D]`` in their slots; rows of padding go to the trash page."""
    for pages, x in ((k_PTKD, k_NKD), (v_PTKD, v_NKD)):
        pages.flatten(0, 1).index_copy_(0, slot_N, x.to(pages.dtype))


def pool_pages(
    raw_k_PTKD: Tensor,
    v_PTKD: Tensor,
    pool_k_PJKD: Tensor,
    pool_v_PJKD: Tensor,
    rows: StepRows,
    block: int,
    stride: int,
    pooling: Tensor | None = None,
) -> None:
    """Pool the blocks that this step's rows completed, from window pages into their slots of global pages.

    Call it after ``write_pages`` of unrotated keys and of values, while every row's last ``block`` positions are held.

    Args:
        raw_k_PTKD, v_PTKD: window pages. pool_k_PJKD, pool_v_PJKD: global pages with ``page // stride`` slots each.
        pooling: ``[2, K, block]``, the share of each place in a block's key and value; ``None``: equal shares.
    """
    from_JB, to_J = rows.once(("pool", block, stride), lambda: _completed(rows, block, stride))
    if not len(to_J):
        return
    shares = (None, None) if pooling is None else pooling.to(raw_k_PTKD.dtype).unbind()
    for pages, pool, share_KB in ((raw_k_PTKD, pool_k_PJKD, shares[0]), (v_PTKD, pool_v_PJKD, shares[1])):
        taken = pages.flatten(0, 1).index_select(0, from_JB).unflatten(0, (-1, block))
        if share_KB is None:
            made = taken.mean(1)
        else:  # products and sums of one block only, so that it is the same beside any others
            made = (taken * share_KB.T[None, :, :, None]).sum(1)
        pool.flatten(0, 1).index_copy_(0, to_J, made.to(pool.dtype))


def _completed(rows: StepRows, block: int, stride: int) -> tuple[Tensor, Tensor]:
    """Slots ``[J·block]`` of the window pages that the completed blocks cover, and the slots ``[J]`` they go to."""
    sequence, first = [], []
    for s, (start, length) in enumerate(zip(rows.starts, rows.lengths)):
        before, after = (pooled_length(n, block, stride) for n in (start, length))
        sequence += [s] * (after - before)
        first += [j * stride for j in range(before, after)]
    device = rows.position_N.device
    s_J = torch.tensor(sequence, dtype=torch.int64, device=device)
    first_J = torch.tensor(first, dtype=torch.int64, device=device)
    place_JB = first_J[:, None] + torch.arange(block, device=device)
    from_JB = rows.window_SP[s_J[:, None], place_JB // rows.page].long() * rows.page + place_JB % rows.page
    slot, per_page = (first_J + block - 1) // stride, rows.page // stride
    to_J = rows.global_SP[s_J, slot // per_page].long() * per_page + slot % per_page
    return from_JB.flatten(), to_J


# --- reading --------------------------------------------------------------------------------------------------------


def paged_attention(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, table_SP: Tensor, rows: StepRows, window: int | None = None
) -> Tensor:
    """Causal attention of every row over its sequence's pages, after ``write_pages``.

    Args:
        q_NHD: rotated queries. k_PTKD, v_PTKD: pages of rotated keys and of values.
        table_SP: ``rows.global_SP``, or ``rows.window_SP`` with a window.
        window: a row sees the last ``window`` positions, itself included; ``None``: all.

    Returns:
        ``[N, H, D]``.
    """
    return get_op("paged_attention", backend_for(q_NHD, rows))(q_NHD, k_PTKD, v_PTKD, table_SP, rows, window)


def paged_hybrid_attention(
    q_NHD: Tensor,
    q_rope_NHD: Tensor,
    k_PTKD: Tensor,
    v_PTKD: Tensor,
    pool_k_PJKD: Tensor,
    pool_v_PJKD: Tensor,
    sink: Tensor,
    gate_NH: Tensor,
    rows: StepRows,
    window: int,
    block: int,
    stride: int,
) -> Tensor:
    """``gate · attention over pooled blocks + (1 − gate) · attention over the window``, after ``pool_pages``.

    Args:
        q_NHD, q_rope_NHD: queries, unrotated for the pooled blocks and rotated for the window.
        k_PTKD, v_PTKD: window pages of rotated keys and of values.
        pool_k_PJKD, pool_v_PJKD: global pages of pooled blocks.
        sink: ``[2, K, D]``, the key and the value that are always seen beside the blocks.
        gate_NH: in (0, 1).

    Returns:
        ``[N, H, D]``, equal to ``deepseek.nn.hybrid.HybridAttention`` over the whole sequence.
    """
    return get_op("paged_hybrid_attention", backend_for(q_NHD, rows))(
        q_NHD,
        q_rope_NHD,
        k_PTKD,
        v_PTKD,
        pool_k_PJKD,
        pool_v_PJKD,
        sink,
        gate_NH,
        rows,
        window,
        block,
        stride,
    )


@register_op("paged_attention", "gathered")
def paged_attention_gathered(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, table_SP: Tensor, rows: StepRows, window: int | None = None
) -> Tensor:
    """``paged_attention`` in plain torch: gather, then attend."""
    parts: list[Part] = rows.once(
        ("parts", window, q_NHD.dtype), lambda: _position_parts(rows, table_SP, window, q_NHD.dtype)
    )
    return _over(parts, q_NHD, lambda part, q: part.attend(q, *part.gather(k_PTKD, v_PTKD)))


@register_op("paged_hybrid_attention", "gathered")
def paged_hybrid_attention_gathered(
    q_NHD: Tensor,
    q_rope_NHD: Tensor,
    k_PTKD: Tensor,
    v_PTKD: Tensor,
    pool_k_PJKD: Tensor,
    pool_v_PJKD: Tensor,
    sink: Tensor,
    gate_NH: Tensor,
    rows: StepRows,
    window: int,
    block: int,
    stride: int,
) -> Tensor:
    """``paged_hybrid_attention`` in plain torch."""
    local = paged_attention_gathered(q_rope_NHD, k_PTKD, v_PTKD, rows.window_SP, rows, window)
    parts: list[Part] = rows.once(
        ("pooled parts", block, stride, q_NHD.dtype), lambda: _pooled_parts(rows, block, stride, q_NHD.dtype)
    )
    first = sink.to(pool_k_PJKD.dtype)[:, None, None]

    def attend(part: Part, q: Tensor) -> Tensor:
        pooled = part.gather(pool_k_PJKD, pool_v_PJKD)
        k, v = (torch.cat((one.expand(len(x), -1, -1, -1), x), 1) for one, x in zip(first, pooled))
        return part.attend(q, k, v)

    whole = _over(parts, q_NHD, attend)
    return torch.lerp(local, whole, gate_NH[..., None].to(local.dtype))


# --- parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Rows that are attended together.

    Attributes:
        at: the rows: a slice of S·R of them, or int64 ``[S·R]`` (padding repeats a row).
        sequences: S.
        pages_SP: int32 ``[S·n]``, the pages to gather.
        mask: ``[S, 1, R, L]`` of 0 and −inf in the query's dtype, or ``None``: causal, from position 0.
    """

    at: slice | Tensor
    sequences: int
    pages_SP: Tensor
    mask: Tensor | None

    def gather(self, *pages_PTKD: Tensor) -> list[Tensor]:
        """``[S, L, K, D]`` of each."""
        return [x.index_select(0, self.pages_SP).view(self.sequences, -1, *x.shape[2:]) for x in pages_PTKD]

    def attend(self, q_NHD: Tensor, k_SLKD: Tensor, v_SLKD: Tensor) -> Tensor:
        """``[S·R, H, D]``."""
        S, (N, H, D), K = self.sequences, q_NHD.shape, k_SLKD.shape[2]
        k, v = k_SLKD.transpose(1, 2), v_SLKD.transpose(1, 2)
        q = q_NHD.view(S, N // S, K, H // K, D)
        if S == 1 and N > 1:  # key heads as rows of a batch, the group as heads that read the same keys
            k, v = (x[0, :, None].expand(-1, H // K, -1, -1) for x in (k, v))
            y = F.scaled_dot_product_attention(
                q[0].permute(1, 2, 0, 3), k, v, attn_mask=self.mask, is_causal=self.mask is None
            )
            return y.permute(2, 0, 1, 3).reshape(N, H, D)
        assert self.mask is not None
        q, mask = q.transpose(1, 2).reshape(S, K, -1, D), self.mask
        if N > S:
            mask = mask.repeat_interleave(H // K, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.view(S, K, N // S, H // K, D).transpose(1, 2).reshape(N, H, D)


def _over(parts: list[Part], q_NHD: Tensor, attend: Callable[[Part, Tensor], Tensor]) -> Tensor:
    """``attend`` for every part, put together."""
    if len(parts) == 1 and isinstance(parts[0].at, slice) and parts[0].at == slice(0, len(q_NHD)):
        return attend(parts[0], q_NHD)
    y_NHD = torch.zeros_like(q_NHD)
    for part in parts:
        y_NHD[part.at] = attend(part, q_NHD[part.at])
    return y_NHD


@dataclass(frozen=True)
class _Group:
    """Sequences of one part: their rows and how many each has (after padding)."""

    at: slice | Tensor
    sequence: Tensor | slice
    rows: int
    longest: int
    start: int  # of a sequence that is alone


def _groups(rows: StepRows) -> list[_Group]:
    """Decodes together, other short ones together, longer ones alone; what differs much in length is kept apart."""
    first, groups = [0], []
    for count in rows.rows:
        first.append(first[-1] + count)
    device = rows.position_N.device
    short = [s for s, count in enumerate(rows.rows) if s >= rows.decodes and count <= SHORT]
    for members in (list(range(rows.decodes)), short):
        for some in _alike(members, rows.lengths):
            at: slice | Tensor
            sequence: slice | Tensor
            R, longest = max(rows.rows[s] for s in some), max(rows.lengths[s] for s in some)
            together = all(b == a + 1 for a, b in pairwise(some))
            if together and all(rows.rows[s] == R for s in some):
                at, sequence = slice(first[some[0]], first[some[-1] + 1]), slice(some[0], some[-1] + 1)
            else:
                index = [first[s] + min(r, rows.rows[s] - 1) for s in some for r in range(R)]
                at, sequence = torch.tensor(index, device=device), torch.tensor(some, device=device)
            groups.append(_Group(at, sequence, R, longest, rows.starts[some[0]]))
    for s, count in enumerate(rows.rows):
        if count > SHORT:
            alone = slice(first[s], first[s + 1]), slice(s, s + 1)
            groups.append(_Group(*alone, count, rows.lengths[s], rows.starts[s]))
    return groups


def _alike(members: list[int], lengths: tuple[int, ...]) -> list[list[int]]:
    """``members`` in groups, so that padding to a group's longest is never more than about the lengths themselves."""
    if not members:
        return []
    longest = max(lengths[s] for s in members)
    if len(members) * longest <= 1.5 * sum(lengths[s] for s in members) + 256:
        return [members]
    near = [s for s in members if 2 * lengths[s] > longest]
    return [near, *_alike([s for s in members if 2 * lengths[s] <= longest], lengths)]


def _as_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _position_parts(rows: StepRows, table_SP: Tensor, window: int | None, dtype: torch.dtype) -> list[Part]:
    """Parts over pages of positions."""
    parts = []
    for group in rows.once("groups", lambda: _groups(rows)):
        table, page = table_SP[group.sequence], rows.page
        if window is None or group.longest <= window:
            pages = table[:, : -(-group.longest // page)]
            mask = None
            if len(table) > 1 or group.rows == 1 or group.start:
                position = rows.position_N[group.at].view(len(table), 1, -1, 1)
                mask = _as_mask(torch.arange(pages.shape[1] * page, device=table.device) <= position, dtype)
            parts.append(Part(group.at, len(table), pages.flatten(), mask))
        elif len(table) > 1 or group.rows == 1:
            parts.append(_window_part(rows, group.at, table, group.rows, window, dtype))
        else:  # a long chunk in pieces about as long as the window, so that the work stays O(rows · window)
            assert isinstance(group.at, slice)
            piece = max(window, 128)
            for start in range(group.at.start, group.at.stop, piece):
                at = slice(start, min(start + piece, group.at.stop))
                parts.append(_window_part(rows, at, table, at.stop - at.start, window, dtype))
    return parts


def _window_part(
    rows: StepRows, at: slice | Tensor, table_SP: Tensor, count: int, window: int, dtype: torch.dtype
) -> Part:
    """Only the pages that the windows of ``count`` rows of each sequence touch."""
    S, page, device = len(table_SP), rows.page, table_SP.device
    position = rows.position_N[at].view(S, 1, -1, 1)
    first_S = (position[:, 0, 0, 0] - window + 1).clamp_(min=0) // page
    touched = min((window + count - 3) // page + 2, table_SP.shape[1])
    index = first_S[:, None] + torch.arange(touched, device=device)
    place = (index[:, :, None] * page + torch.arange(page, device=device)).view(S, 1, 1, -1)
    mask = _as_mask((place <= position) & (place > position - window), dtype)
    pages = table_SP.gather(1, index.clamp_(max=table_SP.shape[1] - 1))
    return Part(at, S, pages.flatten(), mask)


def _pooled_parts(rows: StepRows, block: int, stride: int, dtype: torch.dtype) -> list[Part]:
    """Parts over pages of pooled blocks; the sink comes first in the mask."""
    parts = []
    for group in rows.once("groups", lambda: _groups(rows)):
        table, per_page = rows.global_SP[group.sequence], rows.page // stride
        pages = table[:, : -(-group.longest // rows.page)]
        last = torch.arange(pages.shape[1] * per_page, device=table.device) - (block - 1) // stride
        position = rows.position_N[group.at].view(len(table), 1, -1, 1)
        seen = (last >= 0) & (last * stride + block - 1 <= position)
        parts.append(
            Part(group.at, len(table), pages.flatten(), _as_mask(F.pad(seen, (1, 0), value=True), dtype))
        )
    return parts
