"""Triton kernels of the expert layer in a serving step: static shapes, no wait for the host, no atomics.

Few rows (``few``): three kernels. Router logits; then one program for every assignment and tile of inner features,
which finds its expert itself (a softmax and top-k over E numbers costs less than a launch), streams that expert's gate
and up rows and leaves ``gate · silu(a) · b``; then one program for every row and tile of outputs, which goes through
the row's K experts in order. Rows that share an expert find its weights in the L2 cache.

More rows (``grouped``): assignments are sorted by expert and cut into blocks of ``BLOCK`` rows of one expert, so that a
block reads a tile of weights once for all its rows, on the matrix units. The number of blocks is bounded from outside;
programs beyond those in use leave at once. One tile shape serves every number of rows, and the K parts of a row are
added in its own order, so a row's bits do not depend on the other rows.

Weights lie with their inputs together: ``gate_up [E, 2F, C]``, ``down [E, C, F]``.

Shape letters: N rows, E experts, K experts per row, A = N·K assignments, C hidden size, F expert size, B blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek.ops.triton.experts import router
from deepseek.ops.triton.linear import gemv

BLOCK = 16  #: rows of one expert that share a read of its weights: the least the matrix units take


# --- few rows -------------------------------------------------------------------------------------------------------


@triton.jit
def _choice(
    logits, bias, n, k, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr
):  # fmt: skip
    """The k-th expert of row n and its gate."""
    e = tl.arange(0, EP)
    scores = tl.load(logits + n * E + e, mask=e < E, other=float("-inf"))
    scores = tl.exp(scores - tl.max(scores, 0))
    p = scores / tl.sum(scores, 0)
    left = tl.where(e < E, p + tl.load(bias + e, mask=e < E, other=0.0), float("-inf"))
    expert = 0
    gate = 0.0
    total = 0.0
    for i in tl.static_range(K):
        best = tl.minimum(tl.argmax(left, 0).to(tl.int32), E - 1)  # of NaN, argmax may say any column
        mine = tl.sum(tl.where(e == best, p, 0.0), 0)
        expert = tl.where(i == k, best, expert)
        gate = tl.where(i == k, mine, gate)
        total += mine
        left = tl.where(e == best, float("-inf"), left)
    if NORMALISE:
        gate = gate / total
    return expert, gate


@triton.jit
def _few_gate_up_kernel(
    x, logits, bias, scale, weight, expert, gate, inner, hidden, size, eps,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr, NORM: tl.constexpr,
    BF: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    a = tl.program_id(0)
    n = a // K
    mine, g = _choice(logits, bias, n, a % K, E, EP, K, NORMALISE)
    if tl.program_id(1) == 0:
        tl.store(expert + a, mine)
        tl.store(gate + a, g)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    row = weight + (mine.to(tl.int64) * 2 * size + f[:, None]) * hidden
    gates = tl.zeros((BF, BC), dtype=tl.float32)
    ups = tl.zeros((BF, BC), dtype=tl.float32)
    squares = tl.zeros((BC,), dtype=tl.float32)
    for start in range(0, hidden, BC):
        c = start + tl.arange(0, BC)
        there = (f < size)[:, None] & (c < hidden)[None, :]
        v = tl.load(x + n * hidden + c, mask=c < hidden, other=0.0).to(tl.float32)
        if NORM:
            squares += v * v
            v *= tl.load(scale + c, mask=c < hidden, other=0.0).to(tl.float32)
        v = v[None, :]
        gates += v * tl.load(row + c[None, :], mask=there, other=0.0).to(tl.float32)
        ups += v * tl.load(row + size * hidden + c[None, :], mask=there, other=0.0).to(tl.float32)
    up = tl.sum(ups, 1)
    h = tl.sum(gates, 1)
    if NORM:
        shrink = 1 / tl.sqrt(tl.sum(squares, 0) / hidden + eps)
        up *= shrink
        h *= shrink
    tl.store(inner + a * size + f, (g * up * h / (1 + tl.exp(-h))).to(inner.dtype.element_ty), mask=f < size)


@triton.jit
def _few_down_kernel(
    inner, expert, weight, residual, out, hidden, size,
    K: tl.constexpr, RESIDUAL: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros((BC, BF), dtype=tl.float32)
    for k in tl.static_range(K):
        mine = tl.load(expert + n * K + k).to(tl.int64)
        row = weight + (mine * hidden + c[:, None]) * size
        for start in range(0, size, BF):
            f = start + tl.arange(0, BF)
            v = tl.load(inner + (n * K + k) * size + f, mask=f < size, other=0.0).to(tl.float32)
            w = tl.load(row + f[None, :], mask=(c < hidden)[:, None] & (f < size)[None, :], other=0.0)
            total += v[None, :] * w.to(tl.float32)
    y = tl.sum(total, 1)
    if RESIDUAL:
        y += tl.load(residual + n * hidden + c, mask=c < hidden, other=0.0).to(tl.float32)
    tl.store(out + n * hidden + c, y.to(out.dtype.element_ty), mask=c < hidden)


def few(
    x_NC: Tensor,
    router_EC: Tensor,
    bias_E: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    normalise: bool,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual_NC: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer for at most 8 rows: ``out [N, C]``, ``expert [N, K]`` int32, ``gate [N, K]`` fp32.

    Args:
        norm: the weight ``[C]`` and epsilon of an RMSNorm that ``x`` goes through first.
        residual_NC: added to the result.
    """
    rows, hidden = x_NC.shape
    experts, size = down.shape[0], down.shape[2]
    logits = gemv(x_NC, router_EC, dtype=torch.float32, norm=norm)
    expert = torch.empty(rows, top_k, device=x_NC.device, dtype=torch.int32)
    gate = torch.empty(rows, top_k, device=x_NC.device, dtype=torch.float32)
    inner = x_NC.new_empty(rows * top_k, size)
    scale, eps = norm or (None, 0.0)
    _few_gate_up_kernel[(rows * top_k, triton.cdiv(size, 4))](
        x_NC, logits, bias_E, scale, gate_up, expert, gate, inner, hidden, size, eps,
        E=experts, EP=triton.next_power_of_2(experts), K=top_k, NORMALISE=normalise, NORM=norm is not None,
        BF=4, BC=min(512, triton.next_power_of_2(hidden)), num_warps=4,
    )  # fmt: skip
    out = torch.empty_like(x_NC)
    _few_down_kernel[(rows, triton.cdiv(hidden, 4))](
        inner, expert, down, residual_NC, out, hidden, size, K=top_k, RESIDUAL=residual_NC is not None,
        BC=4, BF=min(512, triton.next_power_of_2(size)), num_warps=4,
    )  # fmt: skip
    return out, expert, gate


# --- more rows ------------------------------------------------------------------------------------------------------


@triton.jit
def _sort_kernel(
    expert, order, block_expert, block_first, block_rows, n, blocks,
    E: tl.constexpr, EP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: counting sort of the assignments by expert, and the table of blocks."""
    e = tl.arange(0, EP)
    i = tl.arange(0, CHUNK)
    count = tl.zeros((EP,), dtype=tl.int32)
    for start in range(0, n, CHUNK):
        mine = tl.load(expert + start + i, mask=start + i < n, other=EP)
        count += tl.sum((mine[:, None] == e[None, :]).to(tl.int32), 0)
    first = tl.cumsum(count, 0) - count
    next_place = first
    for start in range(0, n, CHUNK):
        mine = tl.load(expert + start + i, mask=start + i < n, other=EP)
        hit = (mine[:, None] == e[None, :]).to(tl.int32)
        place = tl.sum(hit * (next_place[None, :] + tl.cumsum(hit, 0) - 1), 1)
        tl.store(order + place, start + i, mask=start + i < n)
        next_place += tl.sum(hit, 0)
    of_expert = (count + BLOCK - 1) // BLOCK
    end = tl.cumsum(of_expert, 0)
    for start in range(0, blocks, CHUNK):
        b = start + i
        mine = tl.sum((end[None, :] <= b[:, None]).to(tl.int32), 1)  # EP or more: not in use
        hit = (mine[:, None] == e[None, :]).to(tl.int32)
        within = (b - tl.sum(hit * (end - of_expert)[None, :], 1)) * BLOCK
        rows = tl.minimum(tl.sum(hit * count[None, :], 1) - within, BLOCK)
        tl.store(block_expert + b, tl.minimum(mine, E - 1), mask=b < blocks)
        tl.store(block_first + b, tl.sum(hit * first[None, :], 1) + within, mask=b < blocks)
        tl.store(block_rows + b, tl.where(mine < E, rows, 0), mask=b < blocks)


def sort_blocks(expert_NK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assignments sorted by expert, stably, in blocks of at most ``BLOCK`` rows of one expert; all int32.

    Returns:
        ``order [A]``: the assignment at each sorted place. ``expert [B]``, ``first [B]`` (a sorted place), ``rows [B]``
        (0: not in use) of each block.
    """
    n, device = expert_NK.numel(), expert_NK.device
    most = min(n, experts)
    blocks = most + (n - most) // BLOCK
    padded = triton.next_power_of_2(experts)
    order = torch.empty(n, device=device, dtype=torch.int32)
    block_expert, block_first, block_rows = torch.empty(3, blocks, device=device, dtype=torch.int32).unbind()
    _sort_kernel[(1,)](
        expert_NK, order, block_expert, block_first, block_rows, n, blocks,
        E=experts, EP=padded, CHUNK=max(16, min(128, 16_384 // padded)), BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return order, block_expert, block_first, block_rows


@triton.jit
def _grouped_gate_up_kernel(
    x, gate, order, block_expert, block_first, block_rows, weight, inner, hidden, size,
    K: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    rows = tl.load(block_rows + b)
    if rows > 0:
        i = tl.arange(0, BN)
        place = tl.load(block_first + b) + i
        a = tl.load(order + place, mask=i < rows, other=0)
        f = tl.program_id(0) * BF + tl.arange(0, BF)
        mine = tl.load(block_expert + b).to(tl.int64)
        row = weight + (mine * 2 * size + f[None, :]) * hidden
        source = x + (a // K).to(tl.int64)[:, None] * hidden
        gates = tl.zeros((BN, BF), dtype=tl.float32)
        ups = tl.zeros((BN, BF), dtype=tl.float32)
        for start in range(0, hidden, BC):
            c = start + tl.arange(0, BC)
            there = (f < size)[None, :] & (c < hidden)[:, None]
            v = tl.load(source + c[None, :], mask=(i < rows)[:, None] & (c < hidden)[None, :], other=0.0)
            gates = tl.dot(
                v, tl.load(row + c[:, None], mask=there, other=0.0), gates, input_precision=PRECISION
            )
            up = tl.load(row + size * hidden + c[:, None], mask=there, other=0.0)
            ups = tl.dot(v, up, ups, input_precision=PRECISION)
        g = tl.load(gate + a, mask=i < rows, other=0.0)[:, None]
        h = g * ups * gates / (1 + tl.exp(-gates))
        at = inner + place.to(tl.int64)[:, None] * size + f[None, :]
        tl.store(at, h.to(inner.dtype.element_ty), mask=(i < rows)[:, None] & (f < size)[None, :])


@triton.jit
def _grouped_down_kernel(
    inner, order, block_expert, block_first, block_rows, weight, parts, hidden, size,
    BN: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    rows = tl.load(block_rows + b)
    if rows > 0:
        i = tl.arange(0, BN)
        place = (tl.load(block_first + b) + i).to(tl.int64)
        a = tl.load(order + place, mask=i < rows, other=0)
        c = tl.program_id(0) * BC + tl.arange(0, BC)
        row = weight + (tl.load(block_expert + b).to(tl.int64) * hidden + c[None, :]) * size
        total = tl.zeros((BN, BC), dtype=tl.float32)
        for start in range(0, size, BF):
            f = start + tl.arange(0, BF)
            v = tl.load(inner + place[:, None] * size + f[None, :],
                        mask=(i < rows)[:, None] & (f < size)[None, :], other=0.0)  # fmt: skip
            w = tl.load(row + f[:, None], mask=(c < hidden)[None, :] & (f < size)[:, None], other=0.0)
            total = tl.dot(v, w, total, input_precision=PRECISION)
        at = parts + a.to(tl.int64)[:, None] * hidden + c[None, :]
        tl.store(at, total, mask=(i < rows)[:, None] & (c < hidden)[None, :])


@triton.jit
def _add_parts_kernel(parts, out, hidden, K: tl.constexpr, BC: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros((BC,), dtype=tl.float32)
    for k in tl.static_range(K):
        total += tl.load(parts + (n * K + k) * hidden + c, mask=c < hidden, other=0.0)
    tl.store(out + n * hidden + c, total.to(out.dtype.element_ty), mask=c < hidden)


def grouped(
    x_NC: Tensor,
    router_EC: Tensor,
    bias_E: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer for any number of rows: ``out [N, C]``, ``expert [N, K]`` int32, ``gate [N, K]`` fp32."""
    rows, hidden = x_NC.shape
    experts, size = down.shape[0], down.shape[2]
    _, expert, gate = router(x_NC, router_EC, bias_E, top_k, normalise)
    order, *blocks = sort_blocks(expert, experts)
    count = blocks[0].shape[0]
    inner = x_NC.new_empty(rows * top_k, size)
    tile = {"BN": BLOCK, "PRECISION": "ieee", "num_warps": 4, "num_stages": 4}
    _grouped_gate_up_kernel[(triton.cdiv(size, 32), count)](
        x_NC, gate, order, *blocks, gate_up, inner, hidden, size, K=top_k, BF=32, BC=128, **tile
    )
    parts = torch.empty(rows * top_k, hidden, device=x_NC.device, dtype=torch.float32)
    _grouped_down_kernel[(triton.cdiv(hidden, 64), count)](
        inner, order, *blocks, down, parts, hidden, size, BC=64, BF=128, **tile
    )
    out = torch.empty_like(x_NC)
    block = min(512, triton.next_power_of_2(hidden))
    _add_parts_kernel[(rows, triton.cdiv(hidden, block))](parts, out, hidden, K=top_k, BC=block, num_warps=2)
    return out, expert, gate
