"""Fused attention over a sliding window, over pooled blocks, and their blend: forward and backward, deterministic.

One idea keeps the kernels few: in both branches every query sees an *interval* of keys, every key is seen by an
interval of queries, and both ends of the interval only grow along the row. So the window, the pooled slots, documents
and plain causality are the same loop with other bounds: tiles outside the interval are skipped, tiles inside it need no
mask, and only tiles at its ends pay for one.

Forward (one program a query tile and head): pooled slots, starting from the sink; then the window; then the blend
``g·G + (1 − g)·L``. Kept for backward: the blend, ``G``, and per branch ``lse − log2(weight of the branch)``, so that
``exp2(score − kept)`` is the probability times the branch's weight and backward never touches the gate again. ``L`` is
not kept: its product with the output gradient follows from those of the blend and ``G``.

Backward: query tiles (gradients of queries, gate and sink), then key tiles and slot tiles in one launch. Slots are few
and their queries many, so a slot tile's queries are split among programs whose fp32 partial sums are added in a fixed
order: no atomics.

Shape letters: B rows, H query heads, K key/value heads, T positions, D head size, J pooled slots, S splits.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: RET505 - an `else` is what makes Triton compile only one of two returns

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tiles:
    """Sizes of one kernel's tiles: ``own`` rows a program keeps, ``step`` rows it reads at a time."""

    own: int
    step: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """Tiles of the three kernels.

    Attributes:
        programs: how many slot programs to aim for when splitting their queries.
        tma: whether loops read through Hopper's copy engine, which spares registers; else through pointers.
    """

    forward: Tiles
    queries: Tiles
    keys: Tiles
    programs: int = 528
    tma: bool = False


#: By padded head size, for 16-bit inputs on SM90 (more shared memory than SM80, which takes one stage less).
TUNING = {
    64: Tuning(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)),
    128: Tuning(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2)),
}
#: fp32 takes twice the shared memory and four times the tensor-core time.
WIDE_TUNING = Tuning(Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))

_forced: Tuning | None = None


@contextmanager
def forced_tuning(tuning: Tuning) -> Iterator[None]:
    """Use ``tuning`` inside a ``with`` block, for tests and for finding better tables."""
    global _forced
    before, _forced = _forced, tuning
    try:
        yield
    finally:
        _forced = before


def tuning_for(q: Tensor) -> Tuning:
    """The tiles for queries ``[B, H, T, D]`` of this dtype on this device."""
    if _forced is not None:
        return _forced
    if q.dtype == torch.float32:
        return WIDE_TUNING
    made = TUNING[64 if q.shape[-1] <= 64 else 128]
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) >= (9, 0):
        return made
    less = [replace(x, stages=max(1, x.stages - 1)) for x in (made.forward, made.queries, made.keys)]
    return Tuning(less[0], less[1], less[2], made.programs)


# --- loops over tiles -----------------------------------------------------------------------------------------------


@triton.jit
def _at(x, b, h, x_b, x_h, x_t, TMA: tl.constexpr):
    """Row b and head h of ``x``: a descriptor and where to look, or a pointer; and the stride of positions."""
    if TMA:
        return x, b.to(tl.int32), h, x_t
    else:
        return x + b * x_b + h * x_h, 0, 0, x_t


@triton.jit
def _load(
    at,
    start,
    limit,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CHECK: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows ``start … start + N − 1`` as ``[N, DP]``; zeros beyond ``limit`` (if CHECK) and beyond D."""
    x, b, h, stride = at
    if TMA:
        return x.load([b, h, start, 0]).reshape(N, DP)
    else:
        n, d = tl.arange(0, N), tl.arange(0, DP)
        x = x + start.to(tl.int64) * stride + n[:, None] * stride + d[None, :]
        if CHECK and D < DP:
            return tl.load(x, mask=(start + n < limit)[:, None] & (d < D)[None, :], other=0.0)
        elif CHECK:
            return tl.load(x, mask=(start + n < limit)[:, None], other=0.0)
        elif D < DP:
            return tl.load(x, mask=(d < D)[None, :], other=0.0)
        else:
            return tl.load(x)


@triton.jit
def _store(pointer, start, stride, limit, x, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    n, d = tl.arange(0, N), tl.arange(0, DP)
    at = pointer + start.to(tl.int64) * stride + n[:, None] * stride + d[None, :]
    tl.store(at, x.to(pointer.dtype.element_ty), mask=(start + n < limit)[:, None] & (d < D)[None, :])


@triton.jit
def _row(pointer, start, limit, other, N: tl.constexpr):
    n = start + tl.arange(0, N)
    return tl.load(pointer + n, mask=n < limit, other=other)


@triton.jit
def _softmax(
    acc, top, total, q, k_at, v_at, lo, hi, limit, first, end, scale,
    BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr, CHECK: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys ``lo … hi − 1``; row i sees ``first[i] <= n < end[i]``."""
    for start in range(lo, hi, BN):
        start = tl.multiple_of(start, BN)
        k = _load(k_at, start, limit, BN, D, DP, CHECK, TMA)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASK:
            n = start + tl.arange(0, BN)
            s = tl.where((n[None, :] >= first[:, None]) & (n[None, :] < end[:, None]), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        v = _load(v_at, start, limit, BN, D, DP, CHECK, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    return acc, top, total


@triton.jit
def _to_queries(
    dq, q, do, lse, delta, k_at, v_at, lo, hi, limit, first, end, scale,
    BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr, CHECK: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what keys ``lo … hi − 1`` give to the gradient of ``q``."""
    for start in range(lo, hi, BN):
        start = tl.multiple_of(start, BN)
        k = _load(k_at, start, limit, BN, D, DP, CHECK, TMA)
        v = _load(v_at, start, limit, BN, D, DP, CHECK, TMA)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None]
        if MASK:
            n = start + tl.arange(0, BN)
            s = tl.where((n[None, :] >= first[:, None]) & (n[None, :] < end[:, None]), s, float("-inf"))
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = tl.exp2(s) * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _to_keys(
    dk, dv, k, v, q_at, do_at, lse_at, delta_at, lo, hi, limit, first, end, scale,
    BM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr, CHECK: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what queries ``lo … hi − 1`` give to the gradients of ``k`` and ``v``.

    Row n is seen by ``first[n] <= i < end[n]``. Queries beyond ``limit`` read a gradient of zero, so they give nothing.
    """
    for start in range(lo, hi, BM):
        start = tl.multiple_of(start, BM)
        q = _load(q_at, start, limit, BM, D, DP, CHECK, TMA)
        do = _load(do_at, start, limit, BM, D, DP, CHECK, TMA)
        i = start + tl.arange(0, BM)
        if CHECK:
            lse, delta = (
                tl.load(lse_at + i, mask=i < limit, other=0.0),
                tl.load(delta_at + i, mask=i < limit, other=0.0),
            )
        else:
            lse, delta = tl.load(lse_at + i), tl.load(delta_at + i)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :]
        if MASK:
            s = tl.where((i[None, :] >= first[:, None]) & (i[None, :] < end[:, None]), s, float("-inf"))
        p = tl.exp2(s)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


# --- who sees whom --------------------------------------------------------------------------------------------------


@triton.jit
def _window_keys(i, doc_start, T, window, DOCS: tl.constexpr):
    """The keys ``[first, end)`` that query ``i`` (int or tensor, clamped to the row) sees in its window."""
    i = tl.minimum(i, T - 1)
    first = tl.maximum(i - window + 1, 0)
    if DOCS:
        first = tl.maximum(first, tl.load(doc_start + i))
    return first, i + 1


@triton.jit
def _window_queries(n, doc_end, T, window, DOCS: tl.constexpr):
    """The queries ``[n, end)`` that see key ``n`` in their window."""
    n = tl.minimum(n, T - 1)
    end = tl.minimum(n + window, T)
    if DOCS:
        end = tl.minimum(end, tl.load(doc_end + n))
    return n, end


@triton.jit
def _pooled_slots(i, slots, T, rows, BLOCK: tl.constexpr, STRIDE: tl.constexpr, DOCS: tl.constexpr):
    """The slots ``[first, end)`` that query ``i`` sees; ``slots``: this row's firsts; ends lie ``rows·T`` later."""
    i = tl.minimum(i, T - 1)
    if DOCS:
        first, end = tl.load(slots + i), tl.load(slots + rows * T + i)
    else:
        first, end = i * 0, tl.where(i >= BLOCK - 1, (i - (BLOCK - 1)) // STRIDE + 1, 0)
    return first, end


@triton.jit
def _pooled_queries(j, seen, T, J, rows, BLOCK: tl.constexpr, STRIDE: tl.constexpr, DOCS: tl.constexpr):
    """The queries ``[first, end)`` that see slot ``j``; ``seen``: this row's firsts; ends lie ``rows·J`` later."""
    j = tl.minimum(j, J - 1)
    if DOCS:
        first, end = tl.load(seen + j), tl.load(seen + rows * J + j)
    else:
        first, end = j * STRIDE + (BLOCK - 1), j * 0 + T
    return first, end


@triton.jit
def _inner(lo_full, hi_full, STEP: tl.constexpr):
    """The whole tiles ``[a, b)`` in which every pair is visible; ``a <= b``."""
    a = tl.cdiv(tl.maximum(lo_full, 0), STEP) * STEP
    return a, tl.maximum(a, hi_full // STEP * STEP)


# --- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    q, q_rope, k_rope, v, k_pool, v_pool, sink, gate, out, whole, lse, doc_start, slots,
    q_b, q_h, q_t, qr_b, qr_h, qr_t, kr_b, kr_h, kr_t, v_b, v_h, v_t, kp_b, kp_h, kp_j, vp_b, vp_h, vp_j,
    g_b, g_h, g_t, o_b, o_h, o_t,
    B, H, T, J, window, sm_scale,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    POOLED: tl.constexpr, WIDE: tl.constexpr, DOCS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Late tiles see the most slots: they go first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    kv = h // GROUP
    m0 = tile * BM
    last = tl.minimum(m0 + BM, T) - 1
    i = m0 + tl.arange(0, BM)
    scale = sm_scale * LOG2E
    doc_start += b * T
    slots += b * T
    kv_sink = sink + kv * D
    head = (b * H + h) * T

    if POOLED:
        x = _load(_at(q, b, h, q_b, q_h, q_t, False), m0, T, BM, D, DP, not EVEN, False)
        d = tl.arange(0, DP)
        sink_k = tl.load(kv_sink + d, mask=d < D, other=0.0).to(tl.float32)
        sink_v = tl.load(kv_sink + (H // GROUP) * D + d, mask=d < D, other=0.0).to(tl.float32)
        top = tl.sum(x.to(tl.float32) * sink_k[None, :], 1) * scale
        total = tl.full((BM,), 1.0, tl.float32)
        acc = tl.zeros((BM, DP), tl.float32) + sink_v[None, :]
        first, end = _pooled_slots(i, slots, T, B, BLOCK, STRIDE, DOCS)
        lo, full_hi = _pooled_slots(m0, slots, T, B, BLOCK, STRIDE, DOCS)
        full_lo, hi = _pooled_slots(last, slots, T, B, BLOCK, STRIDE, DOCS)
        a, z = _inner(full_lo, full_hi, BN)
        k_at = _at(k_pool, b, kv, kp_b, kp_h, kp_j, TMA)
        v_at = _at(v_pool, b, kv, vp_b, vp_h, vp_j, TMA)
        if DOCS:
            acc, top, total = _softmax(
                acc, top, total, x, k_at, v_at, lo // BN * BN, tl.minimum(a, hi), J, first, end, scale,
                BN, D, DP, True, True, TMA, PRECISION,
            )  # fmt: skip
        acc, top, total = _softmax(
            acc, top, total, x, k_at, v_at, a, z, J, first, end, scale, BN, D, DP, False, False, TMA, PRECISION,
        )  # fmt: skip
        acc, top, total = _softmax(
            acc, top, total, x, k_at, v_at, z, hi, J, first, end, scale, BN, D, DP, True, True, TMA, PRECISION,
        )  # fmt: skip
        weight = tl.load(gate + b * g_b + h * g_h + i * g_t, mask=i < T, other=0.5).to(tl.float32)
        # Rounded as it is kept, so that backward finds exactly this share in the blend.
        pooled = (acc / total[:, None]).to(out.dtype.element_ty)
        _store(whole + b * o_b + h * o_h, m0, o_t, T, pooled, BM, D, DP)
        tl.store(lse + head + i, top + tl.log2(total) - tl.log2(tl.maximum(weight, 1e-30)), mask=i < T)
        lse += B * H * T

    x = _load(_at(q_rope, b, h, qr_b, qr_h, qr_t, False), m0, T, BM, D, DP, not EVEN, False)
    top = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DP), tl.float32)
    first, end = _window_keys(i, doc_start, T, window, DOCS)
    lo, full_hi = _window_keys(m0, doc_start, T, window, DOCS)
    full_lo, hi = _window_keys(last, doc_start, T, window, DOCS)
    k_at, v_at = _at(k_rope, b, kv, kr_b, kr_h, kr_t, TMA), _at(v, b, kv, v_b, v_h, v_t, TMA)
    a, z = _inner(full_lo, full_hi, BN)
    if WIDE:
        acc, top, total = _softmax(
            acc, top, total, x, k_at, v_at, lo // BN * BN, tl.minimum(a, hi), T, first, end,
            scale, BN, D, DP, True, not EVEN, TMA, PRECISION,
        )  # fmt: skip
        acc, top, total = _softmax(
            acc, top, total, x, k_at, v_at, a, z, T, first, end, scale, BN, D, DP, False, False, TMA, PRECISION,
        )  # fmt: skip
        acc, top, total = _softmax(
            acc, top, total, x, k_at, v_at, z, hi, T, first, end, scale,
            BN, D, DP, True, not EVEN, TMA, PRECISION,
        )  # fmt: skip
    else:
        acc, top, total = _softmax(
            acc, top, total, x, k_at, v_at, lo // BN * BN, hi, T, first, end, scale,
            BN, D, DP, True, not EVEN, TMA, PRECISION,
        )  # fmt: skip
    y = acc / total[:, None]
    kept = top + tl.log2(total)
    if POOLED:
        y = weight[:, None] * pooled.to(tl.float32) + (1.0 - weight)[:, None] * y
        kept -= tl.log2(tl.maximum(1.0 - weight, 1e-30))
    _store(out + b * o_b + h * o_h, m0, o_t, T, y, BM, D, DP)
    tl.store(lse + head + i, kept, mask=i < T)


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _queries_kernel(
    q, q_rope, k_rope, v, k_pool, v_pool, sink, gate, out, whole, lse, doc_start, slots,
    do, delta, dq, dq_rope, dgate, dsink,
    q_b, q_h, q_t, qr_b, qr_h, qr_t, kr_b, kr_h, kr_t, v_b, v_h, v_t, kp_b, kp_h, kp_j, vp_b, vp_h, vp_j,
    g_b, g_h, g_t, o_b, o_h, o_t, do_b, do_h, do_t,
    B, H, T, J, window, sm_scale,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    POOLED: tl.constexpr, WIDE: tl.constexpr, DOCS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    kv = h // GROUP
    m0 = tile * BM
    last = tl.minimum(m0 + BM, T) - 1
    i = m0 + tl.arange(0, BM)
    scale = sm_scale * LOG2E
    doc_start += b * T
    slots += b * T
    kv_sink = sink + kv * D
    head = (b * H + h) * T
    at = b * o_b + h * o_h

    dy = _load(_at(do, b, h, do_b, do_h, do_t, False), m0, T, BM, D, DP, not EVEN, False)
    y = _load(_at(out, b, h, o_b, o_h, o_t, False), m0, T, BM, D, DP, not EVEN, False)
    local_delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    if POOLED:
        weight = tl.load(gate + b * g_b + h * g_h + i * g_t, mask=i < T, other=0.5).to(tl.float32)
        y = _load(_at(whole, b, h, o_b, o_h, o_t, False), m0, T, BM, D, DP, not EVEN, False)
        pooled_delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
        local_delta = (local_delta - weight * pooled_delta) / tl.maximum(1.0 - weight, 1e-6)
        tl.store(dgate + head + i, pooled_delta - local_delta, mask=i < T)
        tl.store(delta + head + i, pooled_delta, mask=i < T)
        delta += B * H * T

        x = _load(_at(q, b, h, q_b, q_h, q_t, False), m0, T, BM, D, DP, not EVEN, False)
        kept = _row(lse + head, m0, T, float("inf"), BM)
        lse += B * H * T
        d = tl.arange(0, DP)
        sink_k = tl.load(kv_sink + d, mask=d < D, other=0.0).to(tl.float32)
        sink_v = tl.load(kv_sink + (H // GROUP) * D + d, mask=d < D, other=0.0).to(tl.float32)
        p = tl.exp2(tl.sum(x.to(tl.float32) * sink_k[None, :], 1) * scale - kept)
        ds = p * (tl.sum(dy.to(tl.float32) * sink_v[None, :], 1) - pooled_delta)
        acc = ds[:, None] * sink_k[None, :]
        partial = dsink + ((b * H + h) * tl.num_programs(1) + tile) * D + d
        tl.store(partial, tl.sum(ds[:, None] * x.to(tl.float32), 0) * sm_scale, mask=d < D)
        partial += B * H * tl.num_programs(1) * D
        tl.store(partial, tl.sum(p[:, None] * dy.to(tl.float32), 0), mask=d < D)

        first, end = _pooled_slots(i, slots, T, B, BLOCK, STRIDE, DOCS)
        lo, full_hi = _pooled_slots(m0, slots, T, B, BLOCK, STRIDE, DOCS)
        full_lo, hi = _pooled_slots(last, slots, T, B, BLOCK, STRIDE, DOCS)
        a, z = _inner(full_lo, full_hi, BN)
        k_at = _at(k_pool, b, kv, kp_b, kp_h, kp_j, TMA)
        v_at = _at(v_pool, b, kv, vp_b, vp_h, vp_j, TMA)
        if DOCS:
            acc = _to_queries(
                acc, x, dy, kept, pooled_delta, k_at, v_at, lo // BN * BN, tl.minimum(a, hi), J, first, end,
                scale, BN, D, DP, True, True, TMA, PRECISION,
            )  # fmt: skip
        acc = _to_queries(
            acc, x, dy, kept, pooled_delta, k_at, v_at, a, z, J, first, end, scale,
            BN, D, DP, False, False, TMA, PRECISION,
        )  # fmt: skip
        acc = _to_queries(
            acc, x, dy, kept, pooled_delta, k_at, v_at, z, hi, J, first, end, scale,
            BN, D, DP, True, True, TMA, PRECISION,
        )  # fmt: skip
        _store(dq + at, m0, o_t, T, acc * sm_scale, BM, D, DP)

    tl.store(delta + head + i, local_delta, mask=i < T)
    x = _load(_at(q_rope, b, h, qr_b, qr_h, qr_t, False), m0, T, BM, D, DP, not EVEN, False)
    kept = _row(lse + head, m0, T, float("inf"), BM)
    acc = tl.zeros((BM, DP), tl.float32)
    first, end = _window_keys(i, doc_start, T, window, DOCS)
    lo, full_hi = _window_keys(m0, doc_start, T, window, DOCS)
    full_lo, hi = _window_keys(last, doc_start, T, window, DOCS)
    k_at, v_at = _at(k_rope, b, kv, kr_b, kr_h, kr_t, TMA), _at(v, b, kv, v_b, v_h, v_t, TMA)
    a, z = _inner(full_lo, full_hi, BN)
    if WIDE:
        acc = _to_queries(
            acc, x, dy, kept, local_delta, k_at, v_at, lo // BN * BN, tl.minimum(a, hi), T, first, end,
            scale, BN, D, DP, True, not EVEN, TMA, PRECISION,
        )  # fmt: skip
        acc = _to_queries(
            acc, x, dy, kept, local_delta, k_at, v_at, a, z, T, first, end, scale,
            BN, D, DP, False, False, TMA, PRECISION,
        )  # fmt: skip
        acc = _to_queries(
            acc, x, dy, kept, local_delta, k_at, v_at, z, hi, T, first, end, scale,
            BN, D, DP, True, not EVEN, TMA, PRECISION,
        )  # fmt: skip
    else:
        acc = _to_queries(
            acc, x, dy, kept, local_delta, k_at, v_at, lo // BN * BN, hi, T, first, end, scale,
            BN, D, DP, True, not EVEN, TMA, PRECISION,
        )  # fmt: skip
    _store(dq_rope + at, m0, o_t, T, acc * sm_scale, BM, D, DP)


@triton.jit
def _keys_kernel(
    q, q_rope, k_rope, v, k_pool, v_pool, lse, doc_end, seen, do, delta, dk_rope, dv, dk_pool, dv_pool,
    q_b, q_h, q_t, qr_b, qr_h, qr_t, kr_b, kr_h, kr_t, v_b, v_h, v_t, kp_b, kp_h, kp_j, vp_b, vp_h, vp_j,
    do_b, do_h, do_t, dk_b, dk_h, dk_t,
    B, H, T, J, S, slot_programs, window, sm_scale,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    POOLED: tl.constexpr, WIDE: tl.constexpr, DOCS: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    scale = sm_scale * LOG2E
    heads = H // GROUP
    dk = tl.zeros((BN, DP), tl.float32)
    dv_ = tl.zeros((BN, DP), tl.float32)
    if POOLED and pid < slot_programs:
        # Early slots are seen by the most queries: they go first.
        split = pid % S
        kv = pid // S % heads
        b = (pid // (S * heads) % B).to(tl.int64)
        j0 = pid // (S * heads * B) * BN
        last = tl.minimum(j0 + BN, J) - 1
        seen += b * J
        first, end = _pooled_queries(j0 + tl.arange(0, BN), seen, T, J, B, BLOCK, STRIDE, DOCS)
        lo, full_hi = _pooled_queries(j0, seen, T, J, B, BLOCK, STRIDE, DOCS)
        full_lo, hi = _pooled_queries(last, seen, T, J, B, BLOCK, STRIDE, DOCS)
        lo = lo // BM * BM
        share = tl.cdiv(tl.maximum(tl.cdiv(hi - lo, BM), 0), S) * BM
        lo += split * share
        hi = tl.minimum(lo + share, hi)
        a, z = _inner(full_lo, full_hi, BM)
        a, z = tl.maximum(a, lo), tl.minimum(z, hi // BM * BM)
        z = tl.maximum(a, z)
        k = _load(_at(k_pool, b, kv, kp_b, kp_h, kp_j, False), j0, J, BN, D, DP, True, False)
        v_ = _load(_at(v_pool, b, kv, vp_b, vp_h, vp_j, False), j0, J, BN, D, DP, True, False)
        for h in range(kv * GROUP, kv * GROUP + GROUP):
            q_at, do_at = _at(q, b, h, q_b, q_h, q_t, TMA), _at(do, b, h, do_b, do_h, do_t, TMA)
            head = (b * H + h) * T
            dk, dv_ = _to_keys(
                dk, dv_, k, v_, q_at, do_at, lse + head, delta + head, lo, tl.minimum(a, hi), T, first, end,
                scale, BM, D, DP, True, not EVEN, TMA, PRECISION,
            )  # fmt: skip
            dk, dv_ = _to_keys(
                dk, dv_, k, v_, q_at, do_at, lse + head, delta + head, a, z, T, first, end, scale,
                BM, D, DP, False, False, TMA, PRECISION,
            )  # fmt: skip
            if DOCS or not EVEN:
                dk, dv_ = _to_keys(
                    dk, dv_, k, v_, q_at, do_at, lse + head, delta + head, z, hi, T, first, end, scale,
                    BM, D, DP, True, not EVEN, TMA, PRECISION,
                )  # fmt: skip
        part = ((b * heads + kv) * S + split) * J * D
        _store(dk_pool + part, j0, D, J, dk * sm_scale, BN, D, DP)
        _store(dv_pool + part, j0, D, J, dv_, BN, D, DP)
    else:
        pid -= slot_programs
        kv = pid % heads
        b = (pid // heads % B).to(tl.int64)
        n0 = pid // (heads * B) * BN
        last = tl.minimum(n0 + BN, T) - 1
        doc_end += b * T
        if POOLED:
            lse += B * H * T
            delta += B * H * T
        first, end = _window_queries(n0 + tl.arange(0, BN), doc_end, T, window, DOCS)
        lo, full_hi = _window_queries(n0, doc_end, T, window, DOCS)
        full_lo, hi = _window_queries(last, doc_end, T, window, DOCS)
        lo = lo // BM * BM
        a, z = _inner(full_lo, full_hi, BM)
        k = _load(_at(k_rope, b, kv, kr_b, kr_h, kr_t, False), n0, T, BN, D, DP, not EVEN, False)
        v_ = _load(_at(v, b, kv, v_b, v_h, v_t, False), n0, T, BN, D, DP, not EVEN, False)
        for h in range(kv * GROUP, kv * GROUP + GROUP):
            q_at, do_at = _at(q_rope, b, h, qr_b, qr_h, qr_t, TMA), _at(do, b, h, do_b, do_h, do_t, TMA)
            head = (b * H + h) * T
            if WIDE:
                dk, dv_ = _to_keys(
                    dk, dv_, k, v_, q_at, do_at, lse + head, delta + head, lo, tl.minimum(a, hi), T, first,
                    end, scale, BM, D, DP, True, not EVEN, TMA, PRECISION,
                )  # fmt: skip
                dk, dv_ = _to_keys(
                    dk, dv_, k, v_, q_at, do_at, lse + head, delta + head, a, z, T, first, end, scale,
                    BM, D, DP, False, False, TMA, PRECISION,
                )  # fmt: skip
                dk, dv_ = _to_keys(
                    dk, dv_, k, v_, q_at, do_at, lse + head, delta + head, z, hi, T, first, end, scale,
                    BM, D, DP, True, not EVEN, TMA, PRECISION,
                )  # fmt: skip
            else:
                dk, dv_ = _to_keys(
                    dk, dv_, k, v_, q_at, do_at, lse + head, delta + head, lo, hi, T, first, end, scale,
                    BM, D, DP, True, not EVEN, TMA, PRECISION,
                )  # fmt: skip
        at = b * dk_b + kv * dk_h
        _store(dk_rope + at, n0, dk_t, T, dk * sm_scale, BN, D, DP)
        _store(dv + at, n0, dk_t, T, dv_, BN, D, DP)


@triton.jit
def _add_kernel(parts_k, parts_v, dk, dv, size, S, N: tl.constexpr):
    """Sum of S partial gradients ``[rows, S, size]`` of keys and of values, in order."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    k, v = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32)
    for split in range(S):
        part = (row * S + split) * size + at
        k += tl.load(parts_k + part, mask=at < size, other=0.0)
        v += tl.load(parts_v + part, mask=at < size, other=0.0)
    tl.store(dk + row * size + at, k.to(dk.dtype.element_ty), mask=at < size)
    tl.store(dv + row * size + at, v.to(dv.dtype.element_ty), mask=at < size)


# --- pooling --------------------------------------------------------------------------------------------------------


@triton.jit
def _pool_kernel(
    k, v, k_pool, v_pool, starts, k_b, k_h, k_t, v_b, v_h, v_t, K, T, J,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOCS: tl.constexpr, NJ: tl.constexpr,
):  # fmt: skip
    """Means of BLOCK positions of keys and of values, NJ slots a program."""
    b, h = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    j, d = tl.program_id(1) * NJ + tl.arange(0, NJ), tl.arange(0, DP)
    if DOCS:
        start = tl.load(starts + b * J + j, mask=j < J, other=0).to(tl.int32)
        start = tl.minimum(start, T - BLOCK)  # an unused slot, which nobody sees
    else:
        start = j * STRIDE
    mask = (j < J)[:, None] & (d < D)[None, :]
    k_at = k + b * k_b + h * k_h + start[:, None].to(tl.int64) * k_t + d[None, :]
    v_at = v + b * v_b + h * v_h + start[:, None].to(tl.int64) * v_t + d[None, :]
    sum_k, sum_v = tl.zeros((NJ, DP), tl.float32), tl.zeros((NJ, DP), tl.float32)
    for _ in range(BLOCK):
        sum_k += tl.load(k_at, mask=mask, other=0.0).to(tl.float32)
        sum_v += tl.load(v_at, mask=mask, other=0.0).to(tl.float32)
        k_at += k_t
        v_at += v_t
    at = (b * K + h) * J * D + j[:, None] * D + d[None, :]
    tl.store(k_pool + at, (sum_k * (1.0 / BLOCK)).to(k_pool.dtype.element_ty), mask=mask)
    tl.store(v_pool + at, (sum_v * (1.0 / BLOCK)).to(v_pool.dtype.element_ty), mask=mask)


@triton.jit
def _unpool_kernel(
    dk_pool, dv_pool, dk, dv, slots, dkp_b, dkp_h, dkp_j, dvp_b, dvp_h, dvp_j, dk_b, dk_h, dk_t, B, K, T, J,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOCS: tl.constexpr, NT: tl.constexpr,
):  # fmt: skip
    """Gradients of NT positions: a position is in the slots that complete from it to BLOCK − 1 positions later."""
    b, h = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    t, d = tl.program_id(1) * NT + tl.arange(0, NT), tl.arange(0, DP)
    last = tl.minimum(t + (BLOCK - 1), T - 1)
    if DOCS:
        ends = slots + (B + b) * T
        first = tl.load(ends + t - 1, mask=(t > 0) & (t < T), other=0)
        end = tl.load(ends + last, mask=t < T, other=0)
    else:
        first = tl.where(t >= BLOCK, (t - BLOCK) // STRIDE + 1, 0)
        end = tl.where(last >= BLOCK - 1, (last - (BLOCK - 1)) // STRIDE + 1, 0)
    k_at = dk_pool + b * dkp_b + h * dkp_h + d[None, :]
    v_at = dv_pool + b * dvp_b + h * dvp_h + d[None, :]
    sum_k, sum_v = tl.zeros((NT, DP), tl.float32), tl.zeros((NT, DP), tl.float32)
    for ahead in range((BLOCK + STRIDE - 1) // STRIDE):
        j = first + ahead
        mask = ((j < end) & (t < T))[:, None] & (d < D)[None, :]
        sum_k += tl.load(k_at + j[:, None].to(tl.int64) * dkp_j, mask=mask, other=0.0).to(tl.float32)
        sum_v += tl.load(v_at + j[:, None].to(tl.int64) * dvp_j, mask=mask, other=0.0).to(tl.float32)
    at = b * dk_b + h * dk_h + t[:, None].to(tl.int64) * dk_t + d[None, :]
    mask = (t < T)[:, None] & (d < D)[None, :]
    tl.store(dk + at, (sum_k * (1.0 / BLOCK)).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + at, (sum_v * (1.0 / BLOCK)).to(dv.dtype.element_ty), mask=mask)


# --- launches -------------------------------------------------------------------------------------------------------


def _strides(*tensors: Tensor) -> list[int]:
    return [s for x in tensors for s in x.stride()[:3]]


def _descriptors(rows: int, DP: int, *tensors: Tensor) -> list[TensorDescriptor] | None:
    """Descriptors of ``[B, H, T, D]`` tensors read ``rows`` positions at a time; ``None`` if memory is misaligned."""
    made = []
    for x in tensors:
        if not x.numel():
            x = tensors[0]  # no pooled slot: never read
        strides = [s if n > 1 else x.shape[-1] for n, s in zip(x.shape, x.stride())]
        if x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in strides[:-1]):
            return None
        made.append(TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], [1, 1, rows, DP]))
    return made


def _rows_of(x: Tensor) -> Tensor:
    """``x`` with neighbouring features neighbouring in memory, as the kernels read it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _new(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty ``[B, H, T, D]`` laid out as ``[B, T, H, D]``, where the projections before and after want it."""
    B, H, T, D = like.shape
    return like.new_empty(B, T, H, D, dtype=dtype or like.dtype).transpose(1, 2)


def _padded(head_dim: int) -> int:
    return 64 if head_dim <= 64 else 128


def _common(
    q: Tensor, k: Tensor, window: int, block: int, stride: int, tiles: Tiles, docs: bool
) -> dict[str, object]:
    T, D = q.shape[2:]
    biggest = max(tiles.own, tiles.step)
    return {
        "GROUP": q.shape[1] // k.shape[1], "BLOCK": block, "STRIDE": stride, "D": D, "DP": _padded(D),
        "WIDE": window >= 4 * biggest, "DOCS": docs, "EVEN": T % biggest == 0,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip


def _read(tuning: Tuning, tiles: Tiles, *tensors: Tensor) -> tuple[bool, list[Any]]:
    """Whether loops read through descriptors, and what they read: descriptors or the tensors themselves."""
    made = _descriptors(tiles.step, _padded(tensors[0].shape[-1]), *tensors) if tuning.tma else None
    return made is not None, made or list(tensors)


def _window_or_row(window: int, q: Tensor) -> int:
    return min(window, q.shape[2])


@torch.library.custom_op("deepseek::hybrid_attention", mutates_args=())
def hybrid_forward(
    q: Tensor,
    q_rope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    sink: Tensor,
    gate: Tensor,
    doc_start: Tensor | None,
    doc_end: Tensor | None,
    slots: Tensor | None,
    seen: Tensor | None,
    window: int,
    block: int,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blend, global branch (both ``[B, H, T, D]``), and what ``[2, B, H, T]`` backward needs of the softmaxes.

    Args:
        q, q_rope: ``[B, H, T, D]``; k_rope, v: ``[B, K, T, D]``; k_pool, v_pool: ``[B, K, J, D]``; sink: ``[2, K, D]``;
            gate: ``[B, H, T]``.
        doc_start, doc_end: int32 ``[B, T]``, the bounds of each position's document; None: one document a row.
        slots: int32 ``[2, B, T]``, the slots ``[first, end)`` each query sees; seen: int32 ``[2, B, J]``, the queries
            ``[first, end)`` that see each slot. Given exactly when ``doc_start`` is.
    """
    q, q_rope, k_rope, v, k_pool, v_pool = (_rows_of(x) for x in (q, q_rope, k_rope, v, k_pool, v_pool))
    B, H, T, D = q.shape
    tuning, sink = tuning_for(q), sink.contiguous()
    tiles, (tma, loops) = tuning.forward, _read(tuning, tuning.forward, k_rope, v, k_pool, v_pool)
    out, whole = _new(q), _new(q)
    lse = q.new_empty(2, B, H, T, dtype=torch.float32)
    docs = doc_start is not None
    _forward_kernel[(B * H, triton.cdiv(T, tiles.own))](
        q, q_rope, *loops, sink, gate, out, whole, lse,
        doc_start if docs else lse, slots if docs else lse,
        *_strides(q, q_rope, k_rope, v, k_pool, v_pool, gate, out),
        B, H, T, k_pool.shape[2], _window_or_row(window, q), D**-0.5,
        POOLED=True, BM=tiles.own, BN=tiles.step, TMA=tma, **_common(q, k_rope, window, block, stride, tiles, docs),
    )  # fmt: skip
    return out, whole, lse


@hybrid_forward.register_fake
def _(
    q, q_rope, k_rope, v, k_pool, v_pool, sink, gate, doc_start, doc_end, slots, seen, window, block, stride
):
    B, H, T, _ = q.shape
    return _new(q), _new(q), q.new_empty(2, B, H, T, dtype=torch.float32)


@torch.library.custom_op("deepseek::hybrid_attention_backward", mutates_args=())
def hybrid_backward(
    do: Tensor,
    q: Tensor,
    q_rope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    sink: Tensor,
    gate: Tensor,
    out: Tensor,
    whole: Tensor,
    lse: Tensor,
    doc_start: Tensor | None,
    doc_end: Tensor | None,
    slots: Tensor | None,
    seen: Tensor | None,
    window: int,
    block: int,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, q_rope, k_rope, v, k_pool, v_pool, sink, gate."""
    do, q, q_rope, k_rope, v, k_pool, v_pool = (
        _rows_of(x) for x in (do, q, q_rope, k_rope, v, k_pool, v_pool)
    )
    B, H, T, D = q.shape
    K, J = k_pool.shape[1:3]
    tuning, sink, docs = tuning_for(q), sink.contiguous(), doc_start is not None
    limit = _window_or_row(window, q)
    dq, dq_rope, dk_rope, dv = _new(q), _new(q), _new(v), _new(v)
    delta = torch.empty_like(lse)
    dgate = q.new_empty(B, H, T, dtype=torch.float32)
    tiles, (tma, loops) = tuning.queries, _read(tuning, tuning.queries, k_rope, v, k_pool, v_pool)
    query_tiles = triton.cdiv(T, tiles.own)
    dsink = q.new_empty(2, B, K, (H // K) * query_tiles, D, dtype=torch.float32)
    strides = _strides(q, q_rope, k_rope, v, k_pool, v_pool)
    _queries_kernel[(B * H, query_tiles)](
        q, q_rope, *loops, sink, gate, out, whole, lse,
        doc_start if docs else lse, slots if docs else lse, do, delta, dq, dq_rope, dgate, dsink,
        *strides, *_strides(gate, out, do), B, H, T, J, limit, D**-0.5,
        POOLED=True, BM=tiles.own, BN=tiles.step, TMA=tma, **_common(q, k_rope, window, block, stride, tiles, docs),
    )  # fmt: skip
    tiles, (tma, (q_loop, qr_loop, do_loop)) = tuning.keys, _read(tuning, tuning.keys, q, q_rope, do)
    whole_programs = triton.cdiv(J, tiles.own) * B * K
    most = max(1, triton.cdiv(T, 4 * tiles.step))  # less than four query tiles are not worth a partial sum
    splits = min(most, max(1, triton.cdiv(tuning.programs, max(whole_programs, 1))))
    dk_pool, dv_pool = (x.new_empty(B, K, J, D) for x in (k_pool, v_pool))
    parts_k, parts_v = dk_pool, dv_pool
    if splits > 1:
        parts_k, parts_v = (q.new_empty(B, K, splits, J, D, dtype=torch.float32) for _ in range(2))
    _keys_kernel[(whole_programs * splits + triton.cdiv(T, tiles.own) * B * K,)](
        q_loop, qr_loop, k_rope, v, k_pool, v_pool, lse,
        doc_end if docs else lse, seen if docs else lse, do_loop, delta, dk_rope, dv, parts_k, parts_v,
        *strides, *_strides(do, dk_rope), B, H, T, J, splits, whole_programs * splits, limit, D**-0.5,
        POOLED=True, BN=tiles.own, BM=tiles.step, TMA=tma, **_common(q, k_rope, window, block, stride, tiles, docs),
    )  # fmt: skip
    if splits > 1 and J:
        _add_kernel[(B * K, triton.cdiv(J * D, 1024))](
            parts_k, parts_v, dk_pool, dv_pool, J * D, splits, N=1024
        )
    return dq, dq_rope, dk_rope, dv, dk_pool, dv_pool, dsink.sum((1, 3)).to(sink.dtype), dgate


@hybrid_backward.register_fake
def _(do, q, q_rope, k_rope, v, k_pool, v_pool, sink, gate, out, whole, lse, doc_start, doc_end, slots, seen, window,
      block, stride):  # fmt: skip
    B, H, T, _ = q.shape
    dk, dv = (x.new_empty(x.shape) for x in (k_pool, v_pool))
    return (
        _new(q), _new(q), _new(v), _new(v), dk, dv, sink.new_empty(sink.shape),
        q.new_empty(B, H, T, dtype=torch.float32),
    )  # fmt: skip


def _save(ctx, inputs, output):
    *tensors, window, block, stride = inputs
    ctx.save_for_backward(*tensors[:8], *output, *tensors[8:])
    ctx.sizes = window, block, stride
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, *_):
    if do is None:
        return (None,) * 15
    return (*hybrid_backward(do, *ctx.saved_tensors, *ctx.sizes), *(None,) * 7)


hybrid_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("deepseek::window_attention", mutates_args=())
def window_forward(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, doc_end: Tensor | None, window: int
) -> tuple[Tensor, Tensor]:
    """Attention ``[B, H, T, D]`` over the last ``window`` positions, and log-sums ``[1, B, H, T]`` for backward."""
    q, k, v = (_rows_of(x) for x in (q, k, v))
    B, H, T, D = q.shape
    tuning, docs = tuning_for(q), doc_start is not None
    tiles, (tma, (k_loop, v_loop)) = tuning.forward, _read(tuning, tuning.forward, k, v)
    out, lse = _new(q), q.new_empty(1, B, H, T, dtype=torch.float32)
    start = doc_start if docs else lse
    _forward_kernel[(B * H, triton.cdiv(T, tiles.own))](
        q, q, k_loop, v_loop, k_loop, v_loop, lse, lse, out, out, lse, start, start,
        *_strides(q, q, k, v, k, v, lse[0], out), B, H, T, 0, _window_or_row(window, q), D**-0.5,
        POOLED=False, BM=tiles.own, BN=tiles.step, TMA=tma, **_common(q, k, window, 1, 1, tiles, docs),
    )  # fmt: skip
    return out, lse


@window_forward.register_fake
def _(q, k, v, doc_start, doc_end, window):
    B, H, T, _ = q.shape
    return _new(q), q.new_empty(1, B, H, T, dtype=torch.float32)


@torch.library.custom_op("deepseek::window_attention_backward", mutates_args=())
def window_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    doc_start: Tensor | None,
    doc_end: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""
    do, q, k, v = (_rows_of(x) for x in (do, q, k, v))
    B, H, T, D = q.shape
    tuning, docs, limit = tuning_for(q), doc_start is not None, _window_or_row(window, q)
    dq, dk, dv, delta = _new(q), _new(k), _new(v), torch.empty_like(lse)
    strides = _strides(q, q, k, v, k, v)
    tiles, (tma, (k_loop, v_loop)) = tuning.queries, _read(tuning, tuning.queries, k, v)
    start = doc_start if docs else lse
    _queries_kernel[(B * H, triton.cdiv(T, tiles.own))](
        q, q, k_loop, v_loop, k_loop, v_loop, lse, lse, out, out, lse, start, start, do, delta, dq, dq, lse, lse,
        *strides, *_strides(lse[0], out, do), B, H, T, 0, limit, D**-0.5,
        POOLED=False, BM=tiles.own, BN=tiles.step, TMA=tma, **_common(q, k, window, 1, 1, tiles, docs),
    )  # fmt: skip
    tiles, (tma, (q_loop, do_loop)) = tuning.keys, _read(tuning, tuning.keys, q, do)
    end = doc_end if docs else lse
    _keys_kernel[(triton.cdiv(T, tiles.own) * B * k.shape[1],)](
        q_loop, q_loop, k, v, k, v, lse, end, end, do_loop, delta, dk, dv, lse, lse,
        *strides, *_strides(do, dk), B, H, T, 0, 1, 0, limit, D**-0.5,
        POOLED=False, BN=tiles.own, BM=tiles.step, TMA=tma, **_common(q, k, window, 1, 1, tiles, docs),
    )  # fmt: skip
    return dq, dk, dv


@window_backward.register_fake
def _(do, q, k, v, out, lse, doc_start, doc_end, window):
    return _new(q), _new(k), _new(v)


def _save_window(ctx, inputs, output):
    q, k, v, doc_start, doc_end, window = inputs
    ctx.save_for_backward(q, k, v, *output, doc_start, doc_end)
    ctx.window = window
    ctx.set_materialize_grads(False)


def _differentiate_window(ctx, do, *_):
    if do is None:
        return (None,) * 6
    return (*window_backward(do, *ctx.saved_tensors, ctx.window), None, None, None)


window_forward.register_autograd(_differentiate_window, setup_context=_save_window)


@torch.library.custom_op("deepseek::pool_means", mutates_args=())
def pool_forward(
    k: Tensor, v: Tensor, starts: Tensor | None, slots: Tensor | None, block: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Means ``[B, K, J, D]`` over blocks of ``k, v [B, K, T, D]``; ``starts``, ``slots``: ``PooledSpans``."""
    k, v = _rows_of(k), _rows_of(v)
    B, K, T, D = k.shape
    J = max(0, (T - block) // stride + 1)
    k_pool, v_pool = (x.new_empty(B, K, J, D) for x in (k, v))
    if J:
        _pool_kernel[(B * K, triton.cdiv(J, 8))](
            k, v, k_pool, v_pool, k if starts is None else starts, *_strides(k, v), K, T, J,
            BLOCK=block, STRIDE=stride, D=D, DP=triton.next_power_of_2(D), DOCS=starts is not None, NJ=8, num_warps=4,
        )  # fmt: skip
    return k_pool, v_pool


@pool_forward.register_fake
def _(k, v, starts, slots, block, stride):
    B, K, T, D = k.shape
    J = max(0, (T - block) // stride + 1)
    return k.new_empty(B, K, J, D), v.new_empty(B, K, J, D)


@torch.library.custom_op("deepseek::pool_means_backward", mutates_args=())
def pool_backward(
    dk_pool: Tensor, dv_pool: Tensor, slots: Tensor | None, length: int, block: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Gradients ``[B, K, T, D]`` of keys and values from those of their means."""
    dk_pool, dv_pool = _rows_of(dk_pool), _rows_of(dv_pool)
    B, K, J, D = dk_pool.shape
    dk, dv = (x.new_empty(B, length, K, D).transpose(1, 2) for x in (dk_pool, dv_pool))
    _unpool_kernel[(B * K, triton.cdiv(length, 16))](
        dk_pool, dv_pool, dk, dv, dk if slots is None else slots, *_strides(dk_pool, dv_pool, dk), B, K, length, J,
        BLOCK=block, STRIDE=stride, D=D, DP=triton.next_power_of_2(D), DOCS=slots is not None, NT=16, num_warps=4,
    )  # fmt: skip
    return dk, dv


@pool_backward.register_fake
def _(dk_pool, dv_pool, slots, length, block, stride):
    B, K, _, D = dk_pool.shape
    return tuple(x.new_empty(B, length, K, D).transpose(1, 2) for x in (dk_pool, dv_pool))


def _save_pool(ctx, inputs, output):
    k, _, _, slots, block, stride = inputs
    ctx.save_for_backward(slots)
    ctx.sizes = k.shape[2], block, stride


def _differentiate_pool(ctx, dk_pool, dv_pool):
    return (*pool_backward(dk_pool, dv_pool, *ctx.saved_tensors, *ctx.sizes), None, None, None, None)


pool_forward.register_autograd(_differentiate_pool, setup_context=_save_pool)
