"""A decoding step's attention in one kernel: rotate, write to the cache, attend, put the splits together.

For steps in which every sequence has one row, in full and window layers. A program has the query heads of one
key/value head of one sequence, or a split of its keys. Its own key and value, which no page has yet, begin the softmax
of the first split, which also writes them; the others read only what older steps wrote. Whoever of a row's splits ends
last puts their parts together, in order: the same bits every time, and no second kernel to wait for.

Shape letters: N rows of the step, P pages, T positions of a page, H query heads, K key/value heads, G = H/K, D head
size.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek.ops.paged_rows import StepRows
from deepseek.ops.triton import chain, processors
from deepseek.ops.triton.chain import begin, wait
from deepseek.ops.triton.paged_attention import padded, share_out, tuning_for
from deepseek.ops.triton.paged_kernels import LOG2E, attend_decode, store_part

TOGETHER = 16  #: splits that are read at a time when they are put together


@triton.jit
def _turned(x, at, other, cos, sin, mask):
    """Rows of heads, rotated: ``other`` is where a number's partner lies, ``sin`` has its sign."""
    a = tl.load(x + at, mask=mask, other=0.0)
    b = tl.load(x + other, mask=mask, other=0.0).to(tl.float32)
    return (a.to(tl.float32) * cos + b * sin).to(a.dtype)


@triton.jit(
    do_not_specialize=["table_s", "width", "window", "least"],
    do_not_specialize_on_alignment=["lengths", "table", "slot", "arrived"],
)
def decode_row_kernel(
    q, k_new, v_new, cos, sin, slot, k, v, out, parts, lses, arrived, lengths, table,
    q_n, q_h, k_n, k_h, v_n, v_h, rope_n, table_s, width, window, least, sm_scale,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, ROTATE: tl.constexpr, SPLIT: tl.constexpr, SP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TOGETHER: tl.constexpr, PRECISION: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Row s is the only one of sequence s. ``arrived [S, K]`` is zero before and after; SP: splits, padded."""
    begin(CHAIN)
    pid, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, h = (pid // K).to(tl.int64), pid % K
    scale = sm_scale * LOG2E
    g, d = tl.arange(0, BM), tl.arange(0, DP)
    real, inside, head = g < G, d < D, h * G + g
    mask = real[:, None] & inside[None, :]
    table += row * table_s
    q_at, k_at, v_at = (
        q + row * q_n + head[:, None] * q_h,
        k_new + row * k_n + h * k_h,
        v_new + row * v_n + h * v_h,
    )
    wait(CHAIN)
    length = tl.load(lengths + row)
    lo, hi = 0, length - 1
    if WINDOW:
        lo = tl.maximum(length - window, 0)
    used = tl.maximum(1, tl.minimum(splits, tl.cdiv(hi - lo, least)))
    if split < used:
        if ROTATE:  # half-split: a number's partner is half a head away
            early = d < D // 2
            partner = tl.where(early, d + D // 2, d - D // 2)
            e = row * rope_n + tl.where(early, d, partner)
            c = tl.load(cos + e, mask=inside, other=0.0)
            w = tl.load(sin + e, mask=inside, other=0.0)
            w = tl.where(early, -w, w)
            x = _turned(q_at, d[None, :], partner[None, :], c[None, :], w[None, :], mask)
            key = _turned(k_at, d, partner, c, w, inside)
        else:
            x = tl.load(q_at + d[None, :], mask=mask, other=0.0)
            key = tl.load(k_at + d, mask=inside, other=0.0)
        key = key.to(k.dtype.element_ty)
        value = tl.load(v_at + d, mask=inside, other=0.0).to(v.dtype.element_ty)
        if split == 0:
            to = (tl.load(slot + row) * K + h) * D + d
            tl.store(k + to, key, mask=inside)
            tl.store(v + to, value, mask=inside)
        own = tl.sum(x.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
        acc = tl.where(split == 0, value.to(tl.float32)[None, :], 0.0) + tl.zeros((BM, DP), tl.float32)
        top = tl.where(split == 0, own, float("-inf"))
        total = tl.where(split == 0, 1.0, 0.0) + tl.zeros((BM,), tl.float32)
        acc, top, total = attend_decode(
            acc, top, total, x, k, v, table, width, h, K, lo, hi, 0, scale, split, splits, least,
            BM, BN, PAGE, D, DP, SPLIT, PRECISION,
        )  # fmt: skip
        if SPLIT:
            store_part(parts, lses, (row * H + head) * splits + split, acc, top, total, real, D, DP)
            tl.debug_barrier()
            if tl.atomic_add(arrived + pid, 1) == used - 1:
                tl.store(arrived + pid, 0)
                _together(parts, lses, out, row, h, used, splits, H, G, GP, D, DP, SP, TOGETHER)
        else:
            y = acc / tl.where(total == 0, 1.0, total)[:, None]
            tl.store(out + (row * H + head[:, None]) * D + d[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _together(
    parts, lses, out, row, h, used, splits,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """The first ``used`` splits' parts in one result; what others wrote is read past the L1 cache."""
    g, d, j = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, SP)
    head = h * G + g
    at = (row * H + head) * splits
    there = (j < used)[:, None] & (g < G)[None, :]
    lse = tl.load(lses + at[None, :] + j[:, None], mask=there, other=float("-inf"), cache_modifier=".cg")
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lse - top[None, :]), 0)
    total = tl.where(total == 0, 1.0, total)
    y = tl.zeros((GP, DP), tl.float32)
    for first in range(0, used, TOGETHER):
        i = first + tl.arange(0, TOGETHER)
        part = at[None, :] + i[:, None]
        some = (i < used)[:, None] & (g < G)[None, :]
        log = tl.load(lses + part, mask=some, other=float("-inf"), cache_modifier=".cg")
        weight = tl.exp2(log - top[None, :]) / total[None, :]
        seen = (some & (log > float("-inf")))[:, :, None] & (d < D)[None, None, :]
        x = tl.load(
            parts + part[:, :, None] * D + d[None, None, :], mask=seen, other=0.0, cache_modifier=".cg"
        )
        y += tl.sum(x * weight[:, :, None], 0)
    mask = (g < G)[:, None] & (d < D)[None, :]
    tl.store(out + (row * H + head[:, None]) * D + d[None, :], y.to(out.dtype.element_ty), mask=mask)


def takes(rows: StepRows) -> bool:
    """Whether a step is one of decodes alone, none of them in exact mode."""
    return not rows.exact and rows.decodes == len(rows.rows) == len(rows.position_N)


def decode(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    pages: tuple[Tensor, Tensor],
    rows: StepRows,
    slot_N: Tensor,
    table_SP: Tensor,
    window: int | None = None,
) -> Tensor:
    """``deepseek.ops.paged_attention.append_and_attend`` for steps that it ``takes``."""
    k, v = pages
    (N, H, D), K = q_NHD.shape, k.shape[2]
    q, k_new, v_new = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_NHD, k_NKD, v_NKD))
    cos, sin = (x.squeeze(1) if x.dim() == 3 else x for x in rope) if rope is not None else (q, q)
    if rope is not None:
        assert cos.shape == sin.shape == (N, D // 2), f"rotations of {N} rows, half a head of {D}"
        assert cos.stride() == sin.stride(), "cosines and sines lie alike"
        assert cos.stride(1) == 1, "a row's cosines lie side by side"
    tuning, group = tuning_for(q, "F" if window is None else "L"), triton.next_power_of_2(H // K)
    if processors(q.device) <= N * K and tuning.many:
        tuning = tuning.many
    tiles = replace(tuning.short, rows=max(tuning.short.rows, group))
    longest = max(rows.lengths) if window is None else min(max(rows.lengths), window)
    _, splits, least = share_out(tuning, tiles.keys, N * K, longest, 0, q.device)
    out = q.new_empty(N, H, D)
    parts = lses = arrived = out
    if splits > 1:
        parts = q.new_empty(N, H, splits, D, dtype=torch.float32)
        lses = q.new_empty(N, H, splits, dtype=torch.float32)
        arrived = rows.once("arrived", lambda: torch.zeros(N * K, dtype=torch.int32, device=q.device))
    decode_row_kernel[(N * K, splits)](
        q, k_new, v_new, cos, sin, slot_N, k, v, out, parts, lses, arrived, rows.length_S, table_SP,
        *q.stride()[:2], *k_new.stride()[:2], *v_new.stride()[:2], cos.stride(0), *table_SP.stride()[:1],
        table_SP.shape[1], window or 0, least, D**-0.5,
        H=H, K=K, G=H // K, GP=group, D=D, DP=padded(D), PAGE=rows.page, WINDOW=window is not None,
        ROTATE=rope is not None, SPLIT=splits > 1, SP=triton.next_power_of_2(splits), BM=tiles.rows, BN=tiles.keys,
        TOGETHER=min(TOGETHER, triton.next_power_of_2(splits)),
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=tiles.warps, num_stages=tiles.stages, **chain.options(q.device),
    )  # fmt: skip
    return out
