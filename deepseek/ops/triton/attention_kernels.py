"""Fused attention over a sliding window, over pooled blocks, and their blend: the kernels.

One idea keeps the kernels few: in both branches every query sees an *interval* of keys, every key is seen by an
interval of queries, and both ends of the interval only grow along the row. So the window, the pooled slots, documents
and plain causality are the same loop with other bounds: tiles outside the interval are skipped, tiles inside it need no
mask, and only tiles at its ends pay for one.

Forward (one program a query tile and head): pooled slots, starting from the sink; then the window; then the blend
``g·G + (1 − g)·L``. Kept for backward: the blend; per row the *lesser* of ``G`` and ``L``, the branch that has at most
half of the weight; and per branch ``lse − log2(weight of the branch)``, so that ``exp2(score − kept)`` is the
probability times the branch's weight. The other branch is not kept: its product with the output gradient follows from
those of the blend and the lesser one, and is divided by its weight, which is at least a half. (With ``G`` kept in every
row the gate's gradient, in bf16, was 5–7% off where gates come near 1: it was divided by ``1 − g``.)

Backward: query tiles (gradients of queries, gate and sink), then key tiles and slot tiles in one launch. Slots are few
and their queries many, so a slot tile's queries are split among programs whose fp32 partial sums are added in a fixed
order: no atomics.

Shape letters: B rows, H query heads, K key/value heads, T positions, D head size, J pooled slots, S splits.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: RET505 - an `else` is what makes Triton compile only one of two returns

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


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
def forward_kernel(
    q, q_rope, k_rope, v, k_pool, v_pool, sink, gate, out, lesser, lse, doc_start, slots,
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
        mostly = (weight > 0.5)[:, None]
        local = y.to(out.dtype.element_ty)
        _store(lesser + b * o_b + h * o_h, m0, o_t, T, tl.where(mostly, local, pooled), BM, D, DP)
        y = tl.where(mostly, local.to(tl.float32), y)
        y = weight[:, None] * pooled.to(tl.float32) + (1.0 - weight)[:, None] * y
        kept -= tl.log2(tl.maximum(1.0 - weight, 1e-30))
    _store(out + b * o_b + h * o_h, m0, o_t, T, y, BM, D, DP)
    tl.store(lse + head + i, kept, mask=i < T)


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def queries_kernel(
    q, q_rope, k_rope, v, k_pool, v_pool, sink, gate, out, lesser, lse, doc_start, slots,
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
        y = _load(_at(lesser, b, h, o_b, o_h, o_t, False), m0, T, BM, D, DP, not EVEN, False)
        lesser_delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
        mostly = weight > 0.5
        share = tl.where(mostly, 1.0 - weight, weight)
        greater_delta = (local_delta - share * lesser_delta) / (1.0 - share)
        pooled_delta = tl.where(mostly, greater_delta, lesser_delta)
        local_delta = tl.where(mostly, lesser_delta, greater_delta)
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
def keys_kernel(
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
def add_kernel(parts_k, parts_v, dk, dv, size, S, N: tl.constexpr):
    """Sum of S partial gradients ``[rows, S, size]`` of keys and of values, in order."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    k, v = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32)
    for split in range(S):
        part = (row * S + split) * size + at
        k += tl.load(parts_k + part, mask=at < size, other=0.0)
        v += tl.load(parts_v + part, mask=at < size, other=0.0)
    tl.store(dk + row * size + at, k.to(dk.dtype.element_ty), mask=at < size)
    tl.store(dv + row * size + at, v.to(dv.dtype.element_ty), mask=at < size)
