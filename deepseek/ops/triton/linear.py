"""Triton kernels of small-batch linear layers: weights are read once, at the speed of memory.

``gemv`` is for a few rows: no matrix units, each program streams a few rows of the weight with 16-byte loads and keeps
per-lane sums until the end. Where a weight has too few rows to occupy the chip, programs share a row's inputs and a
second kernel adds their parts in a fixed order: no atomics, the same bits every time.

``row_matmul`` is for results that must not depend on the batch: one tile shape for every number of rows and the inputs
in one order, so that a row meets the same instructions in any company.

Shape letters: N rows, C inputs, F outputs, S parts of the inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 8  #: of ``gemv``
PROGRAMS = 264  #: two for each of an H100's or H200's 132 multiprocessors


@triton.jit
def _gemv_kernel(
    x, weight, bias, out, n_rows, inputs, outputs, per_part,
    NP: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """``out [S, N, F]``; with one part, bias included, it is the result."""
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    part = tl.program_id(1)
    n = tl.arange(0, NP)
    row = weight + f.to(tl.int64)[:, None] * inputs
    total = tl.zeros((NP, BF, BC), dtype=tl.float32)
    first = part * per_part
    for start in range(first, tl.minimum(first + per_part, inputs), BC):
        c = start + tl.arange(0, BC)
        w = tl.load(row + c[None, :], mask=(f < outputs)[:, None] & (c < inputs)[None, :], other=0.0)
        a = tl.load(
            x + n[:, None] * inputs + c[None, :],
            mask=(n < n_rows)[:, None] & (c < inputs)[None, :],
            other=0.0,
        )
        total += a.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :]
    y = tl.sum(total, 2)
    if BIAS:
        y += tl.load(bias + f, mask=f < outputs, other=0.0).to(tl.float32)[None, :]
    at = out + (part * n_rows + n[:, None]).to(tl.int64) * outputs + f[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=(n < n_rows)[:, None] & (f < outputs)[None, :])


@triton.jit
def _add_parts_kernel(
    parts, bias, out, n_rows, outputs, S: tl.constexpr, BIAS: tl.constexpr, BF: tl.constexpr
):
    n = tl.program_id(0)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    total = tl.zeros((BF,), dtype=tl.float32)
    for part in tl.static_range(S):
        total += tl.load(parts + (part * n_rows + n).to(tl.int64) * outputs + f, mask=f < outputs, other=0.0)
    if BIAS:
        total += tl.load(bias + f, mask=f < outputs, other=0.0).to(tl.float32)
    tl.store(out + n.to(tl.int64) * outputs + f, total.to(out.dtype.element_ty), mask=f < outputs)


def gemv(
    x_NC: Tensor,
    weight_FC: Tensor,
    bias_F: Tensor | None = None,
    dtype: torch.dtype | None = None,
    parts: int = 0,
) -> Tensor:
    """``x Wᵀ + b`` for at most ``MOST_ROWS`` rows, sums in fp32.

    Args:
        dtype: of the result; that of ``x`` by default.
        parts: into how many the inputs are divided; 0: as many as it takes to occupy the chip.

    Returns:
        ``[N, F]``.
    """
    rows, inputs = x_NC.shape
    outputs = weight_FC.shape[0]
    padded = triton.next_power_of_2(rows)
    block_f = max(1, 4 // padded)
    block_c = min(1024, triton.next_power_of_2(inputs))
    programs = triton.cdiv(outputs, block_f)
    most = max(1, inputs // (2 * block_c))
    parts = parts or min(most, triton.cdiv(PROGRAMS, programs))
    per_part = triton.cdiv(triton.cdiv(inputs, parts), block_c) * block_c
    out = x_NC.new_empty(rows, outputs, dtype=dtype or x_NC.dtype)
    split = out if parts == 1 else out.new_empty(parts, rows, outputs, dtype=torch.float32)
    _gemv_kernel[(programs, parts)](
        x_NC, weight_FC, bias_F, split, rows, inputs, outputs, per_part,
        NP=padded, BF=block_f, BC=block_c, BIAS=bias_F is not None and parts == 1, num_warps=4,
    )  # fmt: skip
    if parts > 1:
        block = min(256, triton.next_power_of_2(outputs))
        _add_parts_kernel[(rows, triton.cdiv(outputs, block))](
            split, bias_F, out, rows, outputs, S=parts, BIAS=bias_F is not None, BF=block, num_warps=2
        )
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
    _row_matmul_kernel[(triton.cdiv(rows, 64), triton.cdiv(outputs, 64))](
        x_NC, weight_FC, bias_F, out, rows, inputs, outputs,
        BN=64, BF=64, BC=64, BIAS=bias_F is not None, PRECISION="ieee", num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
