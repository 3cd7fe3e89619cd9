"""Triton kernels of small-batch linear layers: weights are read once, at the speed of memory.

``gemv`` is for a few rows: no matrix units, each program streams tiles of a few rows of the weight with 16-byte loads.
Its first tile is on its way before the kernel before has ended (``chain``), and every other before the one in hand is
used, so that memory is never waited for twice; the inputs stay in registers. Where a weight has too few rows to occupy
the chip, programs share a row's inputs and a second kernel adds their parts in a fixed order: no atomics, the same bits
every time.

``row_matmul`` is for results that must not depend on the batch: one tile shape for every number of rows and the inputs
in one order, so that a row meets the same instructions in any company.

What comes before and after a product in a decoder (norm, activation, residual) is done on the way: at one row a kernel
launch costs as much as reading megabytes.

Shape letters: N rows, C inputs, F outputs, S parts of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek.ops.triton import processors
from deepseek.ops.triton.chain import begin, options, wait

MOST_ROWS = 8  #: of ``gemv``
PROGRAMS = 264  #: from how many on every multiprocessor is busy


@triton.jit
def _weights(weight, f, c, outputs, last, inputs):
    """``[BF, BC]``: rows ``f``, inputs ``c``; zeros beyond."""
    there = (f < outputs)[:, None] & (c < last)[None, :]
    return tl.load(weight + f.to(tl.int64)[:, None] * inputs + c[None, :], mask=there, other=0.0)


@triton.jit
def _gemv_kernel(
    x, weight, bias, scale, residual, out, n_rows, inputs, outputs, per_part, eps,
    NP: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """``out [S, N, F]``; with one part, it is the result. ``SWIGLU``: the weight is gate above up, ``[2F, C]``.

    A program takes every so-many-th tile of BF rows. ``WHOLE``: a tile has all inputs of the part, and ``x`` is read
    once; else tiles are read in pieces of BC inputs.
    """
    begin(CHAIN)
    part, n, i = tl.program_id(1), tl.arange(0, NP), tl.arange(0, BF)
    up = weight + outputs.to(tl.int64) * inputs if SWIGLU else weight
    first = part * per_part
    last = tl.minimum(first + per_part, inputs)
    c = first + tl.arange(0, BC)
    f = tl.program_id(0) * BF + i
    w = _weights(weight, f, c, outputs, last, inputs)
    u = _weights(up, f, c, outputs, last, inputs) if SWIGLU else w
    wait(CHAIN)
    a = tl.zeros((NP, BC), dtype=tl.float32)
    squares = tl.zeros((NP, BC), dtype=tl.float32)
    if WHOLE:
        a = tl.load(
            x + n[:, None] * inputs + c[None, :], mask=(n < n_rows)[:, None] & (c < last)[None, :], other=0.0
        )
        a = a.to(tl.float32)
        squares = a * a
        if NORM:
            a *= tl.load(scale + c, mask=c < last, other=0.0).to(tl.float32)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(outputs, BF), tl.num_programs(0)):
        f = tile * BF + i
        f_next = f + tl.num_programs(0) * BF
        if WHOLE:
            w_next = _weights(weight, f_next, c, outputs, last, inputs)
            u_next = _weights(up, f_next, c, outputs, last, inputs) if SWIGLU else w_next
            y = tl.sum(a[:, None, :] * w.to(tl.float32)[None, :, :], 2)
            y_up = tl.sum(a[:, None, :] * u.to(tl.float32)[None, :, :], 2) if SWIGLU else y
            w = w_next
            u = u_next
        else:
            total = tl.zeros((NP, BF, BC), dtype=tl.float32)
            total_up = tl.zeros((NP, BF, BC), dtype=tl.float32)
            squares = tl.zeros((NP, BC), dtype=tl.float32)
            for start in range(first, last, BC):
                c = start + tl.arange(0, BC)
                more = start + BC < last
                f_then = tl.where(more, f, f_next)
                c_then = tl.where(more, c + BC, first + tl.arange(0, BC))
                w_next = _weights(weight, f_then, c_then, outputs, last, inputs)
                u_next = _weights(up, f_then, c_then, outputs, last, inputs) if SWIGLU else w_next
                a = tl.load(
                    x + n[:, None] * inputs + c[None, :],
                    mask=(n < n_rows)[:, None] & (c < last)[None, :], other=0.0,
                ).to(tl.float32)  # fmt: skip
                if NORM:
                    squares += a * a
                    a *= tl.load(scale + c, mask=c < last, other=0.0).to(tl.float32)[None, :]
                total += a[:, None, :] * w.to(tl.float32)[None, :, :]
                if SWIGLU:
                    total_up += a[:, None, :] * u.to(tl.float32)[None, :, :]
                w = w_next
                u = u_next
            y = tl.sum(total, 2)
            y_up = tl.sum(total_up, 2)
        if NORM:
            shrink = 1 / tl.sqrt(tl.sum(squares, 1) / inputs + eps)[:, None]
            y *= shrink
            y_up *= shrink
        if BIAS:
            y += tl.load(bias + f, mask=f < outputs, other=0.0).to(tl.float32)[None, :]
        if SWIGLU:
            if BIAS:
                y_up += tl.load(bias + outputs + f, mask=f < outputs, other=0.0).to(tl.float32)[None, :]
            y = y_up * y / (1 + tl.exp(-y))
        at = (part * n_rows + n[:, None]).to(tl.int64) * outputs + f[None, :]
        mask = (n < n_rows)[:, None] & (f < outputs)[None, :]
        if RESIDUAL:
            y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_parts_kernel(
    parts, bias, residual, out, n_rows, outputs,
    S: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BF: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    begin(CHAIN)
    wait(CHAIN)
    n = tl.program_id(0)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    total = tl.zeros((BF,), dtype=tl.float32)
    for part in tl.static_range(S):
        total += tl.load(parts + (part * n_rows + n).to(tl.int64) * outputs + f, mask=f < outputs, other=0.0)
    if BIAS:
        total += tl.load(bias + f, mask=f < outputs, other=0.0).to(tl.float32)
    at = n.to(tl.int64) * outputs + f
    if RESIDUAL:
        total += tl.load(residual + at, mask=f < outputs, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=f < outputs)


class Tile(NamedTuple):
    """How ``gemv`` is cut.

    Attributes:
        rows, inputs: of the weight that a program reads at a time; of gate and up, half as many rows each.
        blocks: programs of a multiprocessor, at most; each takes as many tiles as there are for it.
    """

    rows: int
    inputs: int
    warps: int
    blocks: int


TILE = Tile(4, 2048, 4, 4)
PIECES = Tile(4, 1024, 8, 8)  #: where a row's inputs are read in pieces

_forced: Tile | None = None


@contextmanager
def forced_tile(tile: Tile) -> Iterator[None]:
    """Use ``tile`` inside a ``with`` block, for finding better ones."""
    global _forced
    before, _forced = _forced, tile
    try:
        yield
    finally:
        _forced = before


def tile_for(rows: int, inputs: int, swiglu: bool) -> Tile:
    """How ``gemv`` cuts a weight of so many inputs for so many rows (padded to a power of two)."""
    tile = _forced or (TILE if inputs <= TILE.inputs else PIECES)
    width = min(tile.inputs, triton.next_power_of_2(inputs))
    return tile._replace(rows=max(1, (tile.rows // 2 if swiglu else tile.rows) // rows), inputs=width)


def gemv(
    x_NC: Tensor,
    weight_FC: Tensor,
    bias_F: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    norm: tuple[Tensor, float] | None = None,
    swiglu: bool = False,
    residual_NF: Tensor | None = None,
    parts: int = 0,
) -> Tensor:
    """``residual + act(norm(x) Wᵀ + b)`` for at most ``MOST_ROWS`` rows, in fp32 until it is stored.

    Args:
        dtype: of the result; that of ``x`` by default.
        norm: the weight ``[C]`` and epsilon of an RMSNorm that ``x`` goes through first.
        swiglu: the weight is gate above up, ``[2F, C]``, and the result ``silu(gate) · up``.
        parts: into how many the inputs are divided; 0: as many as it takes to occupy the chip. With a norm or
            swiglu it is one.

    Returns:
        ``[N, F]``.
    """
    rows, inputs = x_NC.shape
    outputs = weight_FC.shape[0] // 2 if swiglu else weight_FC.shape[0]
    padded = triton.next_power_of_2(rows)
    block_f, block_c, warps, blocks = tile_for(padded, inputs, swiglu)
    tiles = triton.cdiv(outputs, block_f)
    most = max(1, inputs // (2 * block_c))
    parts = 1 if swiglu or norm is not None else parts or min(most, triton.cdiv(PROGRAMS, tiles))
    per_part = triton.cdiv(triton.cdiv(inputs, parts), block_c) * block_c
    out = x_NC.new_empty(rows, outputs, dtype=dtype or x_NC.dtype)
    split = out if parts == 1 else out.new_empty(parts, rows, outputs, dtype=torch.float32)
    scale, eps = norm or (None, 0.0)
    chain = options(x_NC.device)
    _gemv_kernel[(min(tiles, blocks * processors(x_NC.device)), parts)](
        x_NC, weight_FC, bias_F, scale, residual_NF, split, rows, inputs, outputs, per_part, eps,
        NP=padded, BF=block_f, BC=block_c, WHOLE=per_part <= block_c, BIAS=bias_F is not None and parts == 1,
        NORM=norm is not None, SWIGLU=swiglu, RESIDUAL=residual_NF is not None and parts == 1, num_warps=warps, **chain,
    )  # fmt: skip
    if parts > 1:
        block = min(256, triton.next_power_of_2(outputs))
        _add_parts_kernel[(rows, triton.cdiv(outputs, block))](
            split, bias_F, residual_NF, out, rows, outputs,
            S=parts, BIAS=bias_F is not None, RESIDUAL=residual_NF is not None, BF=block, num_warps=2, **chain,
        )  # fmt: skip
    return out


@triton.jit
def _row_matmul_kernel(
    x, weight, bias, out, n_rows, inputs, outputs,
    BN: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    total = tl.zeros((BN, BF), dtype=tl.float32)
    for start in range(0, inputs, BC):
        c = start + tl.arange(0, BC)
        there = c < inputs
        a = tl.load(x + n.to(tl.int64)[:, None] * inputs + c[None, :],
                    mask=(n < n_rows)[:, None] & there[None, :], other=0.0)  # fmt: skip
        w = tl.load(weight + f.to(tl.int64)[None, :] * inputs + c[:, None],
                    mask=(f < outputs)[None, :] & there[:, None], other=0.0)  # fmt: skip
        total = tl.dot(a, w, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + f, mask=f < outputs, other=0.0).to(tl.float32)[None, :]
    at = out + n.to(tl.int64)[:, None] * outputs + f[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(n < n_rows)[:, None] & (f < outputs)[None, :])


def row_matmul(x_NC: Tensor, weight_FC: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b``, any number of rows; a row's bits do not depend on the other rows. ``[N, F]``, sums in fp32."""
    rows, inputs = x_NC.shape
    outputs = weight_FC.shape[0]
    out = x_NC.new_empty(rows, outputs)
    _row_matmul_kernel[(triton.cdiv(rows, 64), triton.cdiv(outputs, 32))](
        x_NC, weight_FC, bias_F, out, rows, inputs, outputs,
        BN=64, BF=32, BC=64, BIAS=bias_F is not None, PRECISION="ieee", num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
