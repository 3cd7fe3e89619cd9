"""Triton kernels of RMSNorm: forward with the residual addition, and backward with the residual's gradient.

Both are bound by memory and pass over it once. Backward keeps a fixed number of programs: each goes over its share of
the rows with its part of the weight's gradient in registers, writes that once, and a small kernel adds the parts. So
there are no atomics, and a result depends on the number of processors but not on chance.

A thread holds 16 elements of each tensor: a program's tile is as many rows as fill it.

Shape letters: N rows, C features, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek.ops.triton import processors

TILE = 2048  #: elements of a program of four warps
WARPS = 16  #: of all programs of backward that a processor has at once
STAGES = 2  #: iterations of backward whose loads are under way, through shared memory
AHEAD = 16 << 10  #: bytes of a tile up to which they are: four tiles fit any GPU's
ADDED = (64, 16)  #: parts and features of a tile when parts are added


@triton.jit
def _tile(x, row, c, rows, C, EVEN: tl.constexpr):
    """Elements ``[row, c]`` as fp32, zero beyond the tensor."""
    mask = row[:, None] < rows if EVEN else (row[:, None] < rows) & (c[None, :] < C)
    return tl.load(x + row.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(out, value, row, c, rows, C, EVEN: tl.constexpr):
    mask = row[:, None] < rows if EVEN else (row[:, None] < rows) & (c[None, :] < C)
    tl.store(out + row.to(tl.int64)[:, None] * C + c[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _norm_kernel(
    x, y, weight, total, out, rstd, rows, C, eps,
    ADD: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    row, c = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BC)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    s = _tile(x, row, c, rows, C, EVEN)
    if ADD:
        s = (s + _tile(y, row, c, rows, C, EVEN)).to(total.dtype.element_ty).to(tl.float32)
        _write(total, s, row, c, rows, C, EVEN)
    r = tl.rsqrt(tl.sum(s * s, 1) / C + eps)
    _write(out, s * r[:, None] * w[None, :], row, c, rows, C, EVEN)
    tl.store(rstd + row, r, mask=row < rows)


@triton.jit
def _norm_gradient_kernel(
    d_normed, d_again, d_sum, x, weight, rstd, d_x, parts, rows, C,
    AGAIN: tl.constexpr, SUM: tl.constexpr, WEIGHT: tl.constexpr, STAGES: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BC)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    part = tl.zeros((BR, BC), tl.float32)
    for start in tl.range(tl.program_id(0) * BR, rows, tl.num_programs(0) * BR, num_stages=STAGES):
        row = start + tl.arange(0, BR)
        d = _tile(d_normed, row, c, rows, C, EVEN)
        if AGAIN:
            d += _tile(d_again, row, c, rows, C, EVEN)
        normed = _tile(x, row, c, rows, C, EVEN)
        passed = _tile(d_sum, row, c, rows, C, EVEN) if SUM else 0.0  # before the sum over a row waits
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normed *= r
        if WEIGHT:
            part += d * normed
        d *= w
        d = r * (d - normed * (tl.sum(d * normed, 1) / C)[:, None])
        _write(d_x, d + passed, row, c, rows, C, EVEN)
    if WEIGHT:
        tl.store(parts + tl.program_id(0) * C + c, tl.sum(part, 0), mask=c < C)


@triton.jit
def _norm_parts_kernel(parts, out, P, C, BP: tl.constexpr, BC: tl.constexpr):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros((BP, BC), tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        here = (p[:, None] < P) & (c[None, :] < C)
        total += tl.load(parts + p[:, None] * C + c[None, :], mask=here, other=0.0)
    tl.store(out + c, tl.sum(total, 0).to(out.dtype.element_ty), mask=c < C)


def options(features: int) -> dict[str, int | bool]:
    """The tile, and the warps that hold it."""
    block = max(16, triton.next_power_of_2(features))
    high = max(1, TILE // block)
    return {
        "BR": high, "BC": block, "EVEN": block == features, "num_warps": max(4, 4 * block // TILE),
    }  # fmt: skip


def forward(x: Tensor, y: Tensor | None, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum ``x + y`` (``x`` itself without ``y``), its norm ``[..., C]``, and fp32 ``1/rms [...]``."""
    x = x.contiguous()
    total = x if y is None else torch.empty_like(x)
    out, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    tile, rows = options(x.shape[-1]), rstd.numel()
    if rows:
        _norm_kernel[(triton.cdiv(rows, tile["BR"]),)](
            x, x if y is None else y.contiguous(), weight_C.contiguous(), total, out, rstd, rows, x.shape[-1],
            eps, ADD=y is not None, **tile,
        )  # fmt: skip
    return total, out, rstd


def backward(
    d_normed: Tensor, d_again: Tensor | None, d_sum: Tensor | None, x: Tensor, weight_C: Tensor, rstd: Tensor,
    weight_too: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient for the sum ``x [..., C]`` and that for the weight, which is empty unless ``weight_too``.

    Args:
        d_normed, d_again: parts of the norm's gradient. d_sum: that of the sum past the norm.
    """
    x, C, rows = x.contiguous(), x.shape[-1], rstd.numel()
    d_x, d_weight = torch.empty_like(x), weight_C.new_empty(C if weight_too else 0)
    if not rows:
        return d_x, d_weight.zero_()
    tile = options(C)
    programs = min(triton.cdiv(rows, tile["BR"]), processors(x.device) * max(1, WARPS // tile["num_warps"]))
    ahead = tile["BR"] * tile["BC"] * x.element_size() <= AHEAD
    parts = rstd.new_empty((programs, C) if weight_too else 0)
    _norm_gradient_kernel[(programs,)](
        d_normed.contiguous(), *(x if d is None else d.contiguous() for d in (d_again, d_sum)), x,
        weight_C.contiguous(), rstd.contiguous(), d_x, parts, rows, C, AGAIN=d_again is not None,
        SUM=d_sum is not None, WEIGHT=weight_too, STAGES=STAGES if ahead else 1, **tile,
    )  # fmt: skip
    if weight_too:
        _norm_parts_kernel[(triton.cdiv(C, ADDED[1]),)](
            parts, d_weight, programs, C, BP=ADDED[0], BC=ADDED[1]
        )
    return d_x, d_weight
