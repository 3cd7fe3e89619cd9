"""Attention over a paged cache: the kernels.

A program has a tile of BM rows of one key/value head: the G query heads of the group (padded to GP) of BM / GP
neighbouring positions of one sequence, so that a key is read once for all of them. Keys are read where they lie: a tile
of BN neighbouring slots looks up its pages in the sequence's table, one tile ahead, so that copies of keys and values
wait for no other read and many are under way at once. Programs of a tile's heads are neighbours: so are their keys.

``decode_kernel`` is for sequences with one new row, whose heads all see the same keys. ``attend_kernel`` is for chunks
and speculation: every row sees an interval of keys and both ends of the interval only grow along the tile, so that
without a window only the last tiles of keys need a mask.

With SPLIT, the keys are shared among programs (flash-decoding) whose fp32 parts ``combine_kernel`` adds in order: no
atomics, the same bits every time. Each of a hybrid layer's branches has a softmax of its own; the gate blends them in
whichever kernel comes last. A decode's branches are splits too: neither waits for the other.

Shape letters: N rows of the step, S sequences, H query heads, K key/value heads, G = H/K, D head size.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: RET505, SIM102 - an `else`, an `if` of its own are what make Triton compile only what is needed

from __future__ import annotations

import triton
import triton.language as tl

from deepseek.ops.triton.chain import begin, wait

LOG2E = tl.constexpr(1.4426950408889634)
#: What differs from step to step and from graph to graph: one kernel for all of it.
_ANY = {
    "do_not_specialize": [
        "table_s", "pool_table_s", "width", "pool_width", "first_row", "window", "least", "pools", "splits",
    ],
    "do_not_specialize_on_alignment": ["lengths", "table", "pool_table"],
}  # fmt: skip


@triton.jit
def _number(table, width, slot, SLOTS: tl.constexpr):
    """In which page each ``slot`` of a sequence lies, whether it has got there or not; 0 beyond the table."""
    return tl.load(table + slot // SLOTS, mask=slot < width * SLOTS, other=0)


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
    acc, top, total, q, k, v, table, width, h, K, lo, hi, first, end, before, scale,
    BN: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys ``lo … hi − 1``, of which row i sees those with ``first[i] <= n < end[i]``.

    Without MASK every row sees them all, and they are whole tiles. Key n lies in slot ``n + before``.
    """
    i = tl.arange(0, BN)
    number = _number(table, width, lo + before + i, SLOTS)
    for start in range(lo, hi, BN):
        n = start + i
        at = ((number.to(tl.int64) * SLOTS + (n + before) % SLOTS) * K + h) * D
        number = _number(table, width, n + before + BN, SLOTS)
        seen = n < hi
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
    acc, top, total, q, k, v, table, width, h, K, lo, hi, full, first, end, before, scale, split, splits, least,
    BN: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLIT: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys ``lo … hi − 1`` of a tile, in tiles that begin at multiples of BN; only this split's share.

    Without a window every row sees those before ``full``; with one a mask for all of them costs less than more loops.
    """
    lo = lo // BN * BN
    if SPLIT:
        share = tl.maximum(least, tl.cdiv(tl.cdiv(hi - lo, BN), splits) * BN)
        lo += split * share
        hi = tl.minimum(hi, lo + share)
    if not WINDOW:
        z = tl.maximum(lo, tl.minimum(full, hi) // BN * BN)
        acc, top, total = _softmax(
            acc, top, total, q, k, v, table, width, h, K, lo, z, first, end, before, scale,
            BN, SLOTS, D, DP, False, PRECISION,
        )  # fmt: skip
        lo = z
    return _softmax(
        acc, top, total, q, k, v, table, width, h, K, lo, hi, first, end, before, scale,
        BN, SLOTS, D, DP, True, PRECISION,
    )  # fmt: skip


@triton.jit
def _blocks(position, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """How many pooled blocks are complete at ``position``."""
    return tl.where(position >= BLOCK - 1, (position - (BLOCK - 1)) // STRIDE + 1, 0)


@triton.jit
def _store_part(parts, lses, part, acc, top, total, real, D: tl.constexpr, DP: tl.constexpr):
    """A split's softmax: its result, if it has seen anything, and the logarithm (base 2) of its sum."""
    d = tl.arange(0, DP)
    safe = tl.where(total == 0, 1.0, total)  # NaN stays NaN
    tl.store(lses + part, tl.where(total == 0, float("-inf"), top + tl.log2(safe)), mask=real)
    mask = (real & (total != 0))[:, None] & (d < D)[None, :]
    tl.store(parts + part[:, None] * D + d[None, :], acc / safe[:, None], mask=mask)


@triton.jit(**_ANY)
def attend_kernel(
    q, q_rope, k, v, pool_k, pool_v, sink, gate, out, parts, lses,
    tiles, lengths, table, pool_table, q_n, q_h, qr_n, qr_h, g_n, g_h, table_s, pool_table_s, width, pool_width,
    first_row, window, least, sm_scale,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, POOLED: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Rows of any number. ``tiles``: sequence, the first of its rows in the step, their count, the tile's first."""
    begin(CHAIN)
    pid, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    h, tile = pid % K, tiles + pid // K * 4
    wait(CHAIN)
    s, n0, count, row0 = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    length = tl.load(lengths + s)
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
    part = ((row - first_row) * H + head) * (splits * 2 if POOLED else splits) + split

    y = tl.zeros((BM, DP), tl.float32)
    if POOLED:
        x = tl.load(q + row[:, None] * q_n + head[:, None] * q_h + d[None, :], mask=mask, other=0.0)
        acc, top, total = _sink(x, sink, h, K, split == 0, scale, BM, D, DP)
        end = _blocks(position, BLOCK, STRIDE)
        acc, top, total = _interval(
            acc, top, total, x, pool_k, pool_v, pool_table + s.to(tl.int64) * pool_table_s, pool_width, h, K,
            0, _blocks(late, BLOCK, STRIDE), _blocks(early, BLOCK, STRIDE), tl.zeros_like(end), end,
            (BLOCK - 1) // STRIDE, scale, split, splits, least, BN, PAGE // STRIDE, D, DP, SPLIT, False, PRECISION,
        )  # fmt: skip
        if SPLIT:
            _store_part(parts, lses, part, acc, top, total, real, D, DP)
            part += splits
        else:
            share_of_pool = tl.load(gate + row * g_n + head * g_h, mask=real, other=0.0).to(tl.float32)
            y = acc * (share_of_pool / total)[:, None]

    x = tl.load(q_rope + row[:, None] * qr_n + head[:, None] * qr_h + d[None, :], mask=mask, other=0.0)
    first, lo = tl.zeros_like(position), 0
    if WINDOW:
        first = tl.maximum(position - window + 1, 0)
        lo = tl.maximum(early - window + 1, 0)
    acc, top, total = _interval(
        tl.zeros((BM, DP), tl.float32), tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32),
        x, k, v, table + s.to(tl.int64) * table_s, width, h, K, lo, late + 1, early + 1, first, position + 1, 0,
        scale, split, splits, least, BN, PAGE, D, DP, SPLIT, WINDOW, PRECISION,
    )  # fmt: skip
    if SPLIT:
        _store_part(parts, lses, part, acc, top, total, real, D, DP)
    else:
        safe = tl.where(total == 0, 1.0, total)
        if POOLED:
            y += acc * ((1.0 - share_of_pool) / safe)[:, None]
        else:
            y = acc / safe[:, None]
        at = out + (row[:, None] * H + head[:, None]) * D + d[None, :]
        tl.store(at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sink(q, sink, h, K, here, scale, BM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """What a softmax begins with: the sink, which belongs to the first split (``here``), or nothing."""
    d = tl.arange(0, DP)
    key = tl.load(sink + h * D + d, mask=d < D, other=0.0).to(tl.float32)
    value = tl.load(sink + (K + h) * D + d, mask=d < D, other=0.0).to(tl.float32)
    acc = tl.where(here, value[None, :], 0.0) + tl.zeros((BM, DP), tl.float32)
    top = tl.where(here, tl.sum(q.to(tl.float32) * key[None, :], 1) * scale, float("-inf"))
    return acc, top, tl.where(here, 1.0, 0.0) + tl.zeros((BM,), tl.float32)


@triton.jit
def _decode(
    acc, top, total, q, k, v, table, width, h, K, lo, hi, before, scale, split, splits, least,
    BM: tl.constexpr, BN: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys ``lo … hi − 1``, all of which every row sees. Key n lies in slot ``n + before``.

    Splits take tiles in turn: where the first one lies depends on ``lo`` alone, so that its pages are looked up (the
    table has ``width``) while ``hi`` is still on its way. As many splits work as what there is asks for, not what a
    graph is for. The sum is kept by column until the end, which leaves one reduction over threads a tile.
    """
    i, d, step = tl.arange(0, BN), tl.arange(0, DP), BN
    if SPLIT:
        used = tl.maximum(1, tl.minimum(splits, tl.cdiv(hi - lo, least)))
        lo, step = lo + split * BN, used * BN
        hi = tl.where(split < used, hi, lo)
    number = _number(table, width, lo + before + i, SLOTS)
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(lo, hi, step):
        n = start + i
        at = ((number.to(tl.int64) * SLOTS + (n + before) % SLOTS) * K + h) * D
        number = _number(table, width, n + before + step, SLOTS)
        mask = (n < hi)[:, None] & (d < D)[None, :]
        key = tl.load(k + at[:, None] + d[None, :], mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        s = tl.where((n < hi)[None, :], s * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        sums = sums * shrink[:, None] + p
        total *= shrink
        value = tl.load(v + at[:, None] + d[None, :], mask=mask, other=0.0)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    return acc, top, total + tl.sum(sums, 1)


@triton.jit(**_ANY)
def decode_kernel(
    q, q_rope, k, v, pool_k, pool_v, sink, gate, out, parts, lses, lengths, table, pool_table,
    q_n, q_h, qr_n, qr_h, g_n, g_h, table_s, pool_table_s, width, pool_width, window, least, pools, sm_scale,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, POOLED: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Row s is the only one of sequence s. With SPLIT the first ``pools`` programs are of the pooled blocks."""
    begin(CHAIN)
    pid, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    s, h = pid // K, pid % K
    scale = sm_scale * LOG2E
    g, d = tl.arange(0, BM), tl.arange(0, DP)
    row, head, real = s.to(tl.int64), h * G + g, g < G
    mask = real[:, None] & (d < D)[None, :]
    own = row * q_n + head[:, None] * q_h + d[None, :]
    turned = row * qr_n + head[:, None] * qr_h + d[None, :]
    part = (row * H + head) * splits + split
    table += row * table_s
    pool_table += row * pool_table_s
    wait(CHAIN)
    length = tl.load(lengths + s)
    y = tl.zeros((BM, DP), tl.float32)
    share_of_pool = tl.zeros((BM,), tl.float32)
    if POOLED:
        if split < pools:
            x = tl.load(q + own, mask=mask, other=0.0)
            acc, top, total = _sink(x, sink, h, K, split == 0, scale, BM, D, DP)
            acc, top, total = _decode(
                acc, top, total, x, pool_k, pool_v, pool_table, pool_width, h, K,
                0, _blocks(length - 1, BLOCK, STRIDE), (BLOCK - 1) // STRIDE, scale, split, pools, least,
                BM, BN, PAGE // STRIDE, D, DP, SPLIT, PRECISION,
            )  # fmt: skip
            if SPLIT:
                _store_part(parts, lses, part, acc, top, total, real, D, DP)
            else:
                share_of_pool = tl.load(gate + row * g_n + head * g_h, mask=real, other=0.0).to(tl.float32)
                y = acc * (share_of_pool / total)[:, None]
    if not SPLIT or split >= pools:
        x = tl.load(q_rope + turned, mask=mask, other=0.0)
        lo = 0
        if WINDOW:
            lo = tl.maximum(length - window, 0)
        acc, top, total = _decode(
            tl.zeros((BM, DP), tl.float32), tl.full((BM,), float("-inf"), tl.float32),
            tl.zeros((BM,), tl.float32), x, k, v, table, width, h, K,
            lo, length, 0, scale, split - pools, splits - pools, least, BM, BN, PAGE, D, DP, SPLIT, PRECISION,
        )  # fmt: skip
        if SPLIT:
            _store_part(parts, lses, part, acc, top, total, real, D, DP)
        else:
            y += acc * ((1.0 - share_of_pool) / tl.where(total == 0, 1.0, total))[:, None]
            tl.store(out + (row * H + head[:, None]) * D + d[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit(**_ANY)
def combine_kernel(
    parts, lses, gate, out, first_row, splits, pools, g_n, g_h,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, POOLED: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """The splits of one row and head put together, the first ``pools`` of them and the others blended."""
    begin(CHAIN)
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, at = i + first_row, (i * H + h) * splits
    j, d = tl.arange(0, SP), tl.arange(0, DP)
    wait(CHAIN)
    lse = tl.load(lses + at + j, mask=j < splits, other=float("-inf"))
    if SP > 32:  # many, as a rule of a graph for longer sequences: only those that saw something
        mask = lse > float("-inf")
    else:  # all at once, not waiting for the sums
        mask = j < splits
    x = tl.load(parts + (at + j)[:, None] * D + d[None, :], mask=mask[:, None] & (d < D)[None, :], other=0.0)
    if POOLED:
        share = tl.load(gate + n * g_n + h * g_h).to(tl.float32)
        weight = _weights(lse, j < pools) * share + _weights(lse, j >= pools) * (1.0 - share)
    else:
        weight = _weights(lse, j >= 0)
    y = tl.sum(tl.where(weight[:, None] > 0, x, 0.0) * weight[:, None], 0)
    tl.store(out + (n * H + h) * D + d, y.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _weights(lse, some):
    """The shares of ``some`` splits in the softmax over all of those."""
    lse = tl.where(some, lse, float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    return weight / tl.where(total == 0, 1.0, total)
