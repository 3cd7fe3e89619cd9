"""Attention over a paged cache, and what fills it: the kernels.

One kernel attends for every kind of rows. A program has a tile of BM rows of one key/value head: the G query heads of
the group (padded to GP) of BM / GP neighbouring positions of one sequence, so that a key is read once for all of them.
A decoding sequence is a tile with one position in it. In both branches every row sees an interval of keys and both ends
of the interval only grow along the tile, so that tiles of keys between the ends need no mask. Keys are read where they
lie: a tile of BN neighbouring slots looks up its pages in the sequence's table.

With SPLIT, the keys are shared among programs (flash-decoding) whose fp32 parts a second small kernel adds in order: no
atomics, the same bits every time. The hybrid layers' branches are two passes of one program, each with its own
softmax, and are blended by the gate at the end of whichever kernel comes last.

``append_kernel`` rotates, writes and pools: one program for a row and a key/value head. A block's keys that this step
brought are read from the step's rows, older ones from their pages, so that no program waits for another.

Shape letters: N rows of the step, S sequences, H query heads, K key/value heads, G = H/K, D head size.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: RET505 - an `else` is what makes Triton compile only one of two returns

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _offsets(table, slot, seen, h, K, SLOTS: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr):
    """Where in pages ``[·, SLOTS, K, D]`` head ``h`` of each ``slot`` of a sequence lies."""
    if MASK:
        number = tl.load(table + slot // SLOTS, mask=seen, other=0).to(tl.int64)
    else:
        number = tl.load(table + slot // SLOTS).to(tl.int64)
    return ((number * SLOTS + slot % SLOTS) * K + h) * D


@triton.jit
def _load_rows(x, at, seen, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr):
    d = tl.arange(0, DP)
    if MASK:
        return tl.load(x + at[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
    elif D < DP:
        return tl.load(x + at[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(x + at[:, None] + d[None, :])


@triton.jit
def _softmax(
    acc, top, total, q, k, v, table, h, K, lo, hi, limit, first, end, before, scale,
    BN: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys ``lo … hi − 1`` (lo a multiple of BN); row i sees ``first[i] <= n < end[i]``, n < limit.

    Key n lies in slot ``n + before``.
    """
    for start in range(lo, hi, BN):
        n = start + tl.arange(0, BN)
        seen = n < limit
        at = _offsets(table, n + before, seen, h, K, SLOTS, D, MASK)
        s = tl.dot(q, tl.trans(_load_rows(k, at, seen, D, DP, MASK)), input_precision=PRECISION)
        if MASK:
            sees = (n[None, :] >= first[:, None]) & (n[None, :] < end[:, None]) & seen[None, :]
            s = tl.where(sees, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1) * scale)
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASK else higher
        p = tl.exp2(s * scale - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        x = _load_rows(v, at, seen, D, DP, MASK)
        acc = tl.dot(p.to(x.dtype), x, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    return acc, top, total


@triton.jit
def _interval(
    acc, top, total, q, k, v, table, h, K, lo, hi, full_lo, full_hi, first, end, before, scale, split, splits, least,
    BN: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys ``lo … hi − 1`` of a tile, of which ``full_lo … full_hi − 1`` every row sees; only this split's share.

    The share follows from what the sequence has, not from what a captured launch was made for.
    """
    lo = lo // BN * BN
    if SPLIT:
        share = tl.maximum(least, tl.cdiv(tl.cdiv(hi - lo, BN), splits) * BN)
        lo += split * share
        hi = tl.minimum(hi, lo + share)
    a = tl.maximum(lo, (full_lo + BN - 1) // BN * BN)
    z = tl.maximum(a, tl.minimum(full_hi, hi) // BN * BN)
    acc, top, total = _softmax(
        acc, top, total, q, k, v, table, h, K, lo, tl.minimum(a, hi), hi, first, end, before, scale,
        BN, SLOTS, D, DP, True, PRECISION,
    )  # fmt: skip
    acc, top, total = _softmax(
        acc, top, total, q, k, v, table, h, K, a, tl.minimum(z, hi), hi, first, end, before, scale,
        BN, SLOTS, D, DP, False, PRECISION,
    )  # fmt: skip
    return _softmax(
        acc, top, total, q, k, v, table, h, K, z, hi, hi, first, end, before, scale,
        BN, SLOTS, D, DP, True, PRECISION,
    )  # fmt: skip


@triton.jit
def _blocks(position, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """How many pooled blocks are complete at ``position``."""
    return tl.where(position >= BLOCK - 1, (position - (BLOCK - 1)) // STRIDE + 1, 0)


@triton.jit
def attend_kernel(
    q, q_rope, k, v, pool_k, pool_v, sink, gate, out, parts, lses,
    tiles, ends, lengths, table, pool_table, q_n, q_h, qr_n, qr_h, g_n, g_h, table_s, pool_table_s,
    N, first_row, window, least, sm_scale,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, POOLED: tl.constexpr,
    TILES: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    if TILES:
        s, row0 = tl.load(tiles + 2 * pid), tl.load(tiles + 2 * pid + 1)
    else:
        s, row0 = pid, 0
    n0, length = tl.load(ends + s), tl.load(lengths + s)
    count = tl.load(ends + s + 1) - n0
    scale = sm_scale * LOG2E
    m, d = tl.arange(0, BM), tl.arange(0, DP)
    r, g = row0 + m // GP, m % GP
    real = (r < count) & (g < G)
    head = h * G + g
    row = (n0 + r).to(tl.int64)
    early = length - count + row0  # positions of the tile's first and last row, and of each
    late = tl.minimum(early + BM // GP, length) - 1
    position = length - count + r
    mask = real[:, None] & (d < D)[None, :]
    part = ((row - first_row) * H + head) * splits + split

    y = tl.zeros((BM, DP), tl.float32)
    if POOLED:
        x = tl.load(q + row[:, None] * q_n + head[:, None] * q_h + d[None, :], mask=mask, other=0.0)
        sink_k = tl.load(sink + h * D + d, mask=d < D, other=0.0).to(tl.float32)
        sink_v = tl.load(sink + (K + h) * D + d, mask=d < D, other=0.0).to(tl.float32)
        top = tl.sum(x.to(tl.float32) * sink_k[None, :], 1) * scale
        if SPLIT:  # the sink belongs to the first split
            top = tl.where(split == 0, top, float("-inf"))
            total = tl.where(split == 0, 1.0, 0.0) + tl.zeros((BM,), tl.float32)
            acc = tl.where(split == 0, sink_v[None, :], 0.0) + tl.zeros((BM, DP), tl.float32)
        else:
            total = tl.full((BM,), 1.0, tl.float32)
            acc = sink_v[None, :] + tl.zeros((BM, DP), tl.float32)
        end = _blocks(position, BLOCK, STRIDE)
        acc, top, total = _interval(
            acc, top, total, x, pool_k, pool_v, pool_table + s.to(tl.int64) * pool_table_s, h, K,
            0, _blocks(late, BLOCK, STRIDE), 0, _blocks(early, BLOCK, STRIDE), tl.zeros_like(end), end,
            (BLOCK - 1) // STRIDE, scale, split, splits, least, BN, PAGE // STRIDE, D, DP, SPLIT, PRECISION,
        )  # fmt: skip
        if SPLIT:
            other = part + N * H * splits
            safe = tl.where(total > 0, total, 1.0)
            tl.store(lses + other, tl.where(total > 0, top + tl.log2(safe), float("-inf")), mask=real)
            tl.store(parts + other[:, None] * D + d[None, :], acc / safe[:, None], mask=mask)
        else:
            share_of_pool = tl.load(gate + row * g_n + head * g_h, mask=real, other=0.0).to(tl.float32)
            y = acc * (share_of_pool / total)[:, None]

    x = tl.load(q_rope + row[:, None] * qr_n + head[:, None] * qr_h + d[None, :], mask=mask, other=0.0)
    first, lo, full_lo = tl.zeros_like(position), 0, 0
    if WINDOW:
        first = tl.maximum(position - window + 1, 0)
        lo = tl.maximum(early - window + 1, 0)
        full_lo = tl.maximum(late - window + 1, 0)
    acc, top, total = _interval(
        tl.zeros((BM, DP), tl.float32), tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32),
        x, k, v, table + s.to(tl.int64) * table_s, h, K, lo, late + 1, full_lo, early + 1, first, position + 1, 0,
        scale, split, splits, least, BN, PAGE, D, DP, SPLIT, PRECISION,
    )  # fmt: skip
    safe = tl.where(total > 0, total, 1.0)
    if SPLIT:
        tl.store(lses + part, tl.where(total > 0, top + tl.log2(safe), float("-inf")), mask=real)
        tl.store(parts + part[:, None] * D + d[None, :], acc / safe[:, None], mask=mask)
    else:
        if POOLED:
            y += acc * ((1.0 - share_of_pool) / safe)[:, None]
        else:
            y = acc / safe[:, None]
        at = out + (row[:, None] * H + head[:, None]) * D + d[None, :]
        tl.store(at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _combine(parts, lses, at, splits, SP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    i, d = tl.arange(0, SP), tl.arange(0, DP)
    lse = tl.load(lses + at + i, mask=i < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    x = tl.load(
        parts + (at + i)[:, None] * D + d[None, :], mask=(i < splits)[:, None] & (d < D)[None, :], other=0.0
    )
    total = tl.sum(weight, 0)
    return tl.sum(x * weight[:, None], 0) / tl.where(total > 0, total, 1.0)


@triton.jit
def combine_kernel(
    parts, lses, gate, out, N, first_row, splits, g_n, g_h,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """The splits of one row and head put together, and the branches blended."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, at = i + first_row, (i * H + h) * splits
    y = _combine(parts, lses, at, splits, SP, D, DP)
    if POOLED:
        share = tl.load(gate + n * g_n + h * g_h).to(tl.float32)
        y = y * (1.0 - share) + share * _combine(parts, lses, at + N * H * splits, splits, SP, D, DP)
    d = tl.arange(0, DP)
    tl.store(out + (n * H + h) * D + d, y.to(out.dtype.element_ty), mask=d < D)


# --- filling the cache ----------------------------------------------------------------------------------------------


@triton.jit
def _turned(x, cos, sin, D: tl.constexpr, DP: tl.constexpr):
    """The D values at ``x`` rotated (fp32): half-split, so each half reads the other."""
    d = tl.arange(0, DP)
    low = d < D // 2
    own = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)
    other = tl.load(x + tl.where(low, d + D // 2, d - D // 2), mask=d < D, other=0.0).to(tl.float32)
    half = tl.where(low, d, d - D // 2)
    c = tl.load(cos + half, mask=d < D, other=0.0)
    s = tl.load(sin + half, mask=d < D, other=0.0)
    return own * c + tl.where(low, -other, other) * s


@triton.jit
def append_kernel(
    q, k, v, cos, sin, q_out, k_pages, v_pages, raw_pages, pool_k, pool_v, pooling, slot, position, sequence,
    lengths, ends, table, pool_table, q_n, q_h, k_n, k_h, v_n, v_h, table_s, pool_table_s,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, ROTATE: tl.constexpr, WRITE: tl.constexpr, POOL: tl.constexpr,
    LEARNED: tl.constexpr,
):  # fmt: skip
    """Rotate a row's queries and key, write key and value, and pool the block that the row completes."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DP)
    inside = d < D
    if WRITE:
        to = (tl.load(slot + n) * K + h) * D + d
        key = k + n * k_n + h * k_h
        if ROTATE:
            cos += n * (D // 2)
            sin += n * (D // 2)
            x = _turned(key, cos, sin, D, DP)
            tl.store(k_pages + to, x.to(k_pages.dtype.element_ty), mask=inside)
            for g in range(G):
                x = _turned(q + n * q_n + (h * G + g) * q_h, cos, sin, D, DP)
                tl.store(q_out + (n * H + h * G + g) * D + d, x.to(q_out.dtype.element_ty), mask=inside)
        else:
            tl.store(k_pages + to, tl.load(key + d, mask=inside, other=0.0), mask=inside)
        tl.store(v_pages + to, tl.load(v + n * v_n + h * v_h + d, mask=inside, other=0.0), mask=inside)
        if POOL:
            tl.store(raw_pages + to, tl.load(key + d, mask=inside, other=0.0), mask=inside)
    if POOL:
        t = tl.load(position + n)
        s = tl.load(sequence + n)
        if (s >= 0) & (t >= BLOCK - 1) & ((t - (BLOCK - 1)) % STRIDE == 0):
            start = tl.load(lengths + s) - (tl.load(ends + s + 1) - tl.load(ends + s))
            sum_k, sum_v = tl.zeros((DP,), tl.float32), tl.zeros((DP,), tl.float32)
            for i in range(BLOCK):
                at = t - (BLOCK - 1) + i
                number = tl.load(table + s.to(tl.int64) * table_s + at // PAGE).to(tl.int64)
                old = ((number * PAGE + at % PAGE) * K + h) * D + d
                if WRITE:
                    new, here = n - (t - at), inside & (at + 0 * d >= start)
                    x = tl.load(k + new * k_n + h * k_h + d, mask=here, other=0.0).to(tl.float32)
                    y = tl.load(v + new * v_n + h * v_h + d, mask=here, other=0.0).to(tl.float32)
                    x += tl.load(raw_pages + old, mask=inside & (at + 0 * d < start), other=0.0).to(
                        tl.float32
                    )
                    y += tl.load(v_pages + old, mask=inside & (at + 0 * d < start), other=0.0).to(tl.float32)
                else:
                    x = tl.load(raw_pages + old, mask=inside, other=0.0).to(tl.float32)
                    y = tl.load(v_pages + old, mask=inside, other=0.0).to(tl.float32)
                if LEARNED:
                    x *= tl.load(pooling + h * BLOCK + i)
                    y *= tl.load(pooling + (K + h) * BLOCK + i)
                sum_k += x
                sum_v += y
            if not LEARNED:
                sum_k *= 1.0 / BLOCK
                sum_v *= 1.0 / BLOCK
            number = tl.load(pool_table + s.to(tl.int64) * pool_table_s + t // PAGE).to(tl.int64)
            to = ((number * (PAGE // STRIDE) + (t % PAGE) // STRIDE) * K + h) * D + d
            tl.store(pool_k + to, sum_k.to(pool_k.dtype.element_ty), mask=inside)
            tl.store(pool_v + to, sum_v.to(pool_v.dtype.element_ty), mask=inside)
