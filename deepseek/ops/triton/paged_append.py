"""Filling a paged cache: one kernel that rotates, writes and pools, a program for a row and a key/value head.

A block's keys that this step brought are read from the step's rows, older ones from their pages, so that no program
waits for another. All reads of a part are made before anything is computed from them.

Shape letters: N rows of the step, S sequences, H query heads, K key/value heads, G = H/K, D head size.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: SIM102 - an `if` of its own is what makes Triton compile only what is needed

from __future__ import annotations

import triton
import triton.language as tl

from deepseek.ops.triton.chain import begin, wait


@triton.jit
def _halves(x, at, seen, D: tl.constexpr):
    """``x[at]`` and what lies D/2 beyond, in fp32."""
    a = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    return a, tl.load(x + at + D // 2, mask=seen, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["table_s", "pool_table_s"])
def append_kernel(
    q, k, v, cos, sin, q_out, k_pages, v_pages, raw_pages, pool_k, pool_v, pooling, slot, position, sequence,
    lengths, ends, table, pool_table, q_n, q_h, k_n, k_h, v_n, v_h, rope_n, table_s, pool_table_s,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, ROTATE: tl.constexpr, WRITE: tl.constexpr, POOL: tl.constexpr,
    LEARNED: tl.constexpr, GP: tl.constexpr, BP: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Rotate a row's queries and key, write key and value, and pool the block that the row completes.

    GP, BP: G and BLOCK padded to powers of two.
    """
    begin(CHAIN)
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DP)
    inside = d < D
    wait(CHAIN)
    if POOL:
        t, s = tl.load(position + n), tl.load(sequence + n)
    if WRITE:
        to = (tl.load(slot + n) * K + h) * D
        key = tl.load(k + n * k_n + h * k_h + d, mask=inside, other=0.0)
        value = tl.load(v + n * v_n + h * v_h + d, mask=inside, other=0.0)
        if ROTATE:  # half-split: each half needs the other
            e, g = tl.arange(0, DP // 2), tl.arange(0, GP)
            half = e < D // 2
            c = tl.load(cos + n * rope_n + e, mask=half, other=0.0)
            w = tl.load(sin + n * rope_n + e, mask=half, other=0.0)
            head, some = h * G + g[:, None], (g < G)[:, None] & half[None, :]
            a, b = _halves(k, n * k_n + h * k_h + e, half, D)
            qa, qb = _halves(q, n * q_n + head * q_h + e[None, :], some, D)
            tl.store(k_pages + to + e, (a * c - b * w).to(k_pages.dtype.element_ty), mask=half)
            tl.store(k_pages + to + D // 2 + e, (b * c + a * w).to(k_pages.dtype.element_ty), mask=half)
            qc, qw, into = c[None, :], w[None, :], q_out + (n * H + head) * D + e[None, :]
            tl.store(into, (qa * qc - qb * qw).to(q_out.dtype.element_ty), mask=some)
            tl.store(into + D // 2, (qb * qc + qa * qw).to(q_out.dtype.element_ty), mask=some)
        else:
            tl.store(k_pages + to + d, key, mask=inside)
        tl.store(v_pages + to + d, value, mask=inside)
        if POOL:
            tl.store(raw_pages + to + d, key, mask=inside)
    if POOL:
        if (s >= 0) & (t >= BLOCK - 1) & ((t - (BLOCK - 1)) % STRIDE == 0):
            i = tl.arange(0, BP)
            at = t - (BLOCK - 1) + i
            covered = i < BLOCK
            number = tl.load(table + s.to(tl.int64) * table_s + at // PAGE, mask=covered, other=0).to(
                tl.int64
            )
            page = tl.load(pool_table + s.to(tl.int64) * pool_table_s + t // PAGE).to(tl.int64)
            into_pool = ((page * (PAGE // STRIDE) + (t % PAGE) // STRIDE) * K + h) * D + d
            start = t + 1  # of the positions that this step brought
            if WRITE:
                start = tl.load(lengths + s) - (tl.load(ends + s + 1) - tl.load(ends + s))
            old = ((number * PAGE + at % PAGE) * K + h) * D
            new = n - (t - at)
            x = _block(raw_pages, old, k, new * k_n + h * k_h, at, start, covered, D, DP, WRITE)
            y = _block(v_pages, old, v, new * v_n + h * v_h, at, start, covered, D, DP, WRITE)
            if LEARNED:
                x *= tl.load(pooling + h * BLOCK + i, mask=covered, other=0.0)[:, None]
                y *= tl.load(pooling + (K + h) * BLOCK + i, mask=covered, other=0.0)[:, None]
            x, y = tl.sum(x, 0), tl.sum(y, 0)
            if not LEARNED:
                x, y = x * (1.0 / BLOCK), y * (1.0 / BLOCK)
            tl.store(pool_k + into_pool, x.to(pool_k.dtype.element_ty), mask=inside)
            tl.store(pool_v + into_pool, y.to(pool_v.dtype.element_ty), mask=inside)


@triton.jit
def _block(
    pages, old, rows, new, at, start, covered, D: tl.constexpr, DP: tl.constexpr, WRITE: tl.constexpr
):  # fmt: skip
    """The block's values at positions ``at``, fp32: from ``start`` on the step's own rows, pages before."""
    d = tl.arange(0, DP)
    inside = (d < D)[None, :]
    x = tl.load(
        pages + old[:, None] + d[None, :], mask=(covered & (at < start))[:, None] & inside, other=0.0
    ).to(tl.float32)
    if WRITE:
        x += tl.load(
            rows + new[:, None] + d[None, :], mask=(covered & (at >= start))[:, None] & inside, other=0.0
        ).to(tl.float32)
    return x
