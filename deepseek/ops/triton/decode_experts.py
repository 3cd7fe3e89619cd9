"""Triton kernels of the expert layer in a serving step: static shapes, no wait for the host, no atomics.

Few rows (``few``): three kernels. Router logits; then one program for every assignment and tile of inner features,
which finds its expert itself (a softmax and top-k over E numbers costs less than a launch), streams that expert's gate
and up rows and leaves ``gate · silu(a) · b``; then one program for every row and tile of outputs, which finds the row's
K experts again and has their weights on the way before the inner features are there. Rows that share an expert find
its weights in the L2 cache.

More rows (``grouped``): logits, choice, and two products that read a tile of an expert's weights once for ``BLOCK`` of
its rows, on the matrix units; then a row's K parts are added in its own order. Up to ``FIND`` assignments, every
program of the products finds the rows of its expert in the list of all choices; of more, they are sorted by expert
and cut into blocks, whose number is bounded from outside. Programs with nothing to do leave at once. One tile shape
serves every number of rows, so a row's bits do not depend on the other rows.

Kernels of a chain (``deepseek.ops.triton.chain``): the first product lets the next kernel begin only when it has
waited itself, so that the second may read what was chosen, and fetch weights, while the first is at work.

Weights lie with their inputs together: ``gate_up [E, 2F, C]``, ``down [E, C, F]``.

Shape letters: N rows, E experts, K experts per row, A = N·K assignments, C hidden size, F expert size, B blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek.ops.triton.chain import begin, options, wait
from deepseek.ops.triton.decode_router import choose, route_rows, row_logits, sizes

BLOCK = 16  #: rows of one expert that share a read of its weights: the least the matrix units take
FIND = 512  #: up to how many assignments programs find their rows themselves

#: Tiles: outputs of a program and inputs of a step (the most: it is no larger than the inputs).
TILES: dict[str, dict[str, Any]] = {
    "few_gate_up": {"BF": 2, "BC": 2048, "num_warps": 1},
    "few_down": {"BC": 1, "BF": 1024, "num_warps": 1},
    "gate_up": {"BF": 32, "BC": 128, "num_warps": 4, "num_stages": 4, "maxnreg": 168},
    "down": {"BC": 64, "BF": 128, "num_warps": 4, "num_stages": 4, "maxnreg": 168},
}
FEW = 2048  #: weights that a program of ``few_down`` holds at once for each output, of all K experts
AHEAD = 396  #: programs that have their weights fetched into the L2 cache before it is their turn: what runs at once
FETCH = 512  #: bytes that they fetch of every row; 0: none


# --- few rows -------------------------------------------------------------------------------------------------------


@triton.jit
def _few_gate_up_kernel(
    x, logits, bias, weight, expert, gate, inner, hidden, size,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    NORMALISE: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, EP)
    shift = tl.load(bias + e, mask=e < E, other=0.0)
    wait(CHAIN)
    begin(CHAIN)
    n = tl.program_id(0) // K
    chosen, gates = choose(logits, None, shift, n, hidden, 0.0, E, EP, K, KP, S, SP, NORMALISE, False)
    k = tl.arange(0, KP)
    own = k == tl.program_id(0) % K
    mine = tl.sum(tl.where(own, chosen, 0), 0)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    row = weight + (mine.to(tl.int64) * 2 * size + f[:, None]) * hidden
    h = tl.zeros((BF,), dtype=tl.float32)
    up = tl.zeros((BF,), dtype=tl.float32)
    for start in range(0, hidden, BC):
        c = start + tl.arange(0, BC)
        there = (f < size)[:, None] & (c < hidden)[None, :]
        w = tl.load(row + c[None, :], mask=there, other=0.0)
        u = tl.load(row + size.to(tl.int64) * hidden + c[None, :], mask=there, other=0.0)
        v = tl.load(x + n * hidden + c, mask=c < hidden, other=0.0).to(tl.float32)
        h += tl.sum(v[None, :] * w.to(tl.float32), 1)
        up += tl.sum(v[None, :] * u.to(tl.float32), 1)
    g = tl.sum(tl.where(own, gates, 0.0), 0)
    at = inner + tl.program_id(0) * size + f
    tl.store(at, (g * up * h / (1 + tl.exp(-h))).to(inner.dtype.element_ty), mask=f < size)
    if tl.program_id(1) == 0:
        tl.store(expert + n * K + k, chosen, mask=own)
        tl.store(gate + n * K + k, gates, mask=own)


@triton.jit
def _few_down_kernel(
    inner, logits, bias, weight, residual, out, hidden, size,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    RESIDUAL: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    begin(CHAIN)
    n = tl.program_id(0)
    e = tl.arange(0, EP)
    shift = tl.load(bias + e, mask=e < E, other=0.0)
    # The logits were there before the kernel before this one let it begin.
    chosen, _ = choose(logits, None, shift, n, hidden, 0.0, E, EP, K, KP, S, SP, False, False)
    k = tl.arange(0, KP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    f = tl.arange(0, BF)
    row = weight + (chosen.to(tl.int64)[:, None, None] * hidden + c[None, :, None]) * size + f[None, None, :]
    there = (k < K)[:, None, None] & (c < hidden)[None, :, None]
    source = inner + (n * K + k)[:, None] * size + f[None, :]
    w = tl.load(row, mask=there & (f < size)[None, None, :], other=0.0)
    wait(CHAIN)
    y = tl.zeros((BC,), dtype=tl.float32)
    for start in range(0, size, BF):
        v = tl.load(source + start, mask=(k < K)[:, None] & (start + f < size)[None, :], other=0.0).to(
            tl.float32
        )
        y += tl.sum(tl.sum(v[:, None, :] * w.to(tl.float32), 2), 0)
        w = tl.load(row + start + BF, mask=there & (start + BF + f < size)[None, None, :], other=0.0)
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
    """The layer for a few rows: ``out [N, C]``, ``expert [N, K]`` int32, ``gate [N, K]`` fp32.

    Args:
        norm: the weight ``[C]`` and epsilon of an RMSNorm that ``x`` goes through first.
        residual_NC: added to the result.
    """
    rows, hidden = x_NC.shape
    size = down.shape[2]
    logits, x_NC = row_logits(x_NC, router_EC, norm)
    expert = torch.empty(rows, top_k, device=x_NC.device, dtype=torch.int32)
    gate = torch.empty(rows, top_k, device=x_NC.device, dtype=torch.float32)
    inner = x_NC.new_empty(rows * top_k, size)
    same = sizes(logits, top_k) | options(x_NC.device)
    tile = TILES["few_gate_up"]
    _few_gate_up_kernel[(rows * top_k, triton.cdiv(size, tile["BF"]))](
        x_NC, logits.parts, bias_E, gate_up, expert, gate, inner, hidden, size, NORMALISE=normalise,
        **same, **tile | {"BC": min(tile["BC"], triton.next_power_of_2(hidden))},
    )  # fmt: skip
    out = torch.empty_like(x_NC)
    tile = TILES["few_down"]
    _few_down_kernel[(rows, triton.cdiv(hidden, tile["BC"]))](
        inner, logits.parts, bias_E, down, residual_NC, out, hidden, size, RESIDUAL=residual_NC is not None,
        **same, **tile | {"BF": min(tile["BF"], triton.next_power_of_2(size), max(64, FEW // same["KP"]))},
    )  # fmt: skip
    return out, expert, gate


# --- more rows ------------------------------------------------------------------------------------------------------


@triton.jit
def _sort_kernel(
    expert, order, block_expert, block_first, block_rows, n, blocks,
    E: tl.constexpr, EP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    """One program: counting sort of the assignments by expert, and the table of blocks."""
    begin(CHAIN)
    e = tl.arange(0, EP)
    i = tl.arange(0, CHUNK)
    wait(CHAIN)
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
        **options(device),
    )  # fmt: skip
    return order, block_expert, block_first, block_rows


@triton.jit
def _fetch(rows, piece, BYTES: tl.constexpr, AHEAD: tl.constexpr):
    """Have the L2 cache fetch a piece of each of ``rows``, if this is one of the first programs."""
    if tl.program_id(1) * tl.num_programs(0) + tl.program_id(0) < AHEAD:
        at = rows.to(tl.int64) + piece * BYTES
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r", [at, piece * 0 + BYTES],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _own(expert, first, rows, b, n, FIND: tl.constexpr, BY_ROW: tl.constexpr, AP: tl.constexpr):
    """Program b's expert, how many rows are its to do, the first's sorted place, and where it finds itself, every
    assignment's rank among them (from 1; 0: not among them)."""
    start = 0
    rank = 0
    if FIND:
        i = tl.arange(0, AP)
        chosen = tl.load(expert + i, mask=i < n, other=-1, cache_modifier=".cg")
        e = tl.load(expert + b, cache_modifier=".cg") if BY_ROW else b
        hit = (chosen == e).to(tl.int32)
        if BY_ROW:  # the first that chose an expert does it for all
            hit = tl.where(tl.sum(hit * (i < b).to(tl.int32), 0) > 0, 0, hit)
        rank = hit * tl.cumsum(hit, 0)
        count = tl.sum(hit, 0)
    else:
        e = tl.load(expert + b, cache_modifier=".cg")
        count = tl.load(rows + b, cache_modifier=".cg")
        start = tl.load(first + b, cache_modifier=".cg")
    return e, count, start, rank


@triton.jit
def _assignments(order, first, rank, count, done, FIND: tl.constexpr, AP: tl.constexpr, BN: tl.constexpr):
    """The next ``BN`` assignments after ``done``, and which of them there are."""
    j = done + tl.arange(0, BN)
    if FIND:
        i = tl.arange(0, AP)
        a = tl.sum(tl.where(rank[None, :] == j[:, None] + 1, i[None, :], 0), 1)
    else:
        a = tl.load(order + first + j, mask=j < count, other=0)
    return a.to(tl.int64), j < count


@triton.jit
def _grouped_gate_up_kernel(
    x, gate, expert, order, block_first, block_rows, weight, inner, n, hidden, size,
    FIND: tl.constexpr, BY_ROW: tl.constexpr, AP: tl.constexpr, K: tl.constexpr,
    AHEAD: tl.constexpr, FETCH: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    if (
        FIND and not BY_ROW and FETCH > 0
    ):  # most experts are chosen: these weights are needed, if not for certain
        i = tl.arange(0, 128)  # as many as there are threads, each a piece of a row
        own = tl.minimum(tl.program_id(0) * BF + i % BF, size - 1)
        row = (tl.program_id(1).to(tl.int64) * 2 + i // BF % 2) * size + own
        _fetch(weight + row * hidden, i // (2 * BF), FETCH * 2 * BF // 128, AHEAD)
    wait(CHAIN)
    begin(CHAIN)
    e, count, first, rank = _own(expert, block_first, block_rows, tl.program_id(1), n, FIND, BY_ROW, AP)
    row = weight + (e.to(tl.int64) * 2 * size + f[None, :]) * hidden
    for done in range(0, count, BN):
        a, mine = _assignments(order, first, rank, count, done, FIND, AP, BN)
        source = x + (a // K)[:, None] * hidden
        g = tl.load(gate + a, mask=mine, other=0.0)
        gates = tl.zeros((BN, BF), dtype=tl.float32)
        ups = tl.zeros((BN, BF), dtype=tl.float32)
        for start in range(0, hidden, BC):
            c = start + tl.arange(0, BC)
            there = (f < size)[None, :] & (c < hidden)[:, None]
            w = tl.load(row + c[:, None], mask=there, other=0.0)
            u = tl.load(row + size * hidden + c[:, None], mask=there, other=0.0)
            v = tl.load(source + c[None, :], mask=mine[:, None] & (c < hidden)[None, :], other=0.0)
            gates = tl.dot(v, w, gates, input_precision="ieee")
            ups = tl.dot(v, u, ups, input_precision="ieee")
        h = g[:, None] * ups * gates / (1 + tl.exp(-gates))
        at = inner + a[:, None] * size + f[None, :]
        tl.store(at, h.to(inner.dtype.element_ty), mask=mine[:, None] & (f < size)[None, :])


@triton.jit
def _grouped_down_kernel(
    inner, expert, order, block_first, block_rows, weight, parts, n, hidden, size,
    FIND: tl.constexpr, BY_ROW: tl.constexpr, AP: tl.constexpr,
    AHEAD: tl.constexpr, FETCH: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    begin(CHAIN)
    # What was chosen was there before the kernel before this one let it begin.
    e, count, first, rank = _own(expert, block_first, block_rows, tl.program_id(1), n, FIND, BY_ROW, AP)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    row = weight + (e.to(tl.int64) * hidden + c[None, :]) * size
    if FETCH > 0 and count > 0:
        i = tl.arange(0, 128)
        own = tl.minimum(tl.program_id(0) * BC + i % BC, hidden - 1)
        _fetch(weight + (e.to(tl.int64) * hidden + own) * size, i // BC, FETCH * BC // 128, AHEAD)
    wait(CHAIN)
    for done in range(0, count, BN):
        a, mine = _assignments(order, first, rank, count, done, FIND, AP, BN)
        source = inner + a[:, None] * size
        total = tl.zeros((BN, BC), dtype=tl.float32)
        for start in range(0, size, BF):
            f = start + tl.arange(0, BF)
            w = tl.load(row + f[:, None], mask=(c < hidden)[None, :] & (f < size)[:, None], other=0.0)
            v = tl.load(source + f[None, :], mask=mine[:, None] & (f < size)[None, :], other=0.0)
            total = tl.dot(v, w, total, input_precision="ieee")
        tl.store(parts + a[:, None] * hidden + c[None, :], total, mask=mine[:, None] & (c < hidden)[None, :])


@triton.jit
def _add_parts_kernel(
    parts,
    residual,
    out,
    hidden,
    K: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BC: tl.constexpr,
    CHAIN: tl.constexpr,
):
    begin(CHAIN)
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    wait(CHAIN)
    total = tl.zeros((BC,), dtype=tl.float32)
    for k in tl.static_range(K):
        total += tl.load(parts + (n * K + k) * hidden + c, mask=c < hidden, other=0.0)
    if RESIDUAL:
        total += tl.load(residual + n * hidden + c, mask=c < hidden, other=0.0).to(tl.float32)
    tl.store(out + n * hidden + c, total.to(out.dtype.element_ty), mask=c < hidden)


def _fetched(weight: Tensor) -> int:
    """How many bytes of a row are fetched ahead of time."""
    row = weight.shape[-1] * weight.itemsize
    return FETCH if options(weight.device)["CHAIN"] and row % 16 == 0 and row >= FETCH else 0


def grouped(
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
    """The layer for any number of rows; arguments and results as of ``few``."""
    rows, hidden = x_NC.shape
    experts, size = down.shape[0], down.shape[2]
    n = rows * top_k
    expert, gate, x_NC = route_rows(x_NC, router_EC, bias_E, top_k, normalise, norm)
    find = n <= FIND
    order = first = block_rows = None
    blocks, count = expert, min(n, experts)
    if not find:
        order, blocks, first, block_rows = sort_blocks(expert, experts)
        count = len(blocks)
    same = {
        "FIND": find, "BY_ROW": find and n < experts, "AP": max(16, triton.next_power_of_2(n)) if find else 1,
        "AHEAD": AHEAD, "BN": BLOCK, **options(x_NC.device),
    }  # fmt: skip
    inner = x_NC.new_empty(n, size)
    tile = TILES["gate_up"]
    _grouped_gate_up_kernel[(triton.cdiv(size, tile["BF"]), count)](
        x_NC, gate, blocks, order, first, block_rows, gate_up, inner, n, hidden, size, K=top_k,
        FETCH=_fetched(gate_up), **same, **tile,
    )  # fmt: skip
    parts = torch.empty(n, hidden, device=x_NC.device, dtype=torch.float32)
    tile = TILES["down"]
    _grouped_down_kernel[(triton.cdiv(hidden, tile["BC"]), count)](
        inner, blocks, order, first, block_rows, down, parts, n, hidden, size,
        FETCH=_fetched(down), **same, **tile,
    )  # fmt: skip
    out = torch.empty_like(x_NC)
    block = min(512, triton.next_power_of_2(hidden))
    _add_parts_kernel[(rows, triton.cdiv(hidden, block))](
        parts, residual_NC, out, hidden,
        K=top_k, RESIDUAL=residual_NC is not None, BC=block, num_warps=2, **options(x_NC.device),
    )  # fmt: skip
    return out, expert, gate
