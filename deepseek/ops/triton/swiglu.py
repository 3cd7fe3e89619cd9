"""Triton kernels of a dense SwiGLU: the product of both halves, its gradient, and weights with paired rows.

Bound by memory: every element is read and written once, 16 bytes a thread. In backward one program has the same columns
of both halves, so that both gradients and the product come from one sigmoid; a kernel over the wide result, which a
compiler makes of ``cat``, computes each of them for either half.

Shape letters: N rows, F features after the activation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  #: elements of a half that one program has


@triton.jit
def _tile(inner, BR: tl.constexpr, BF: tl.constexpr):
    """Rows and columns of this program: neighbours along a row are neighbours in time."""
    across = tl.cdiv(inner, BF)
    row = (tl.program_id(0) // across) * BR + tl.arange(0, BR)
    f = (tl.program_id(0) % across) * BF + tl.arange(0, BF)
    return row[:, None], f[None, :]


@triton.jit
def _swiglu_kernel(h, out, rows, inner, BR: tl.constexpr, BF: tl.constexpr, EVEN: tl.constexpr):
    row, f = _tile(inner, BR, BF)
    mask = row < rows if EVEN else (row < rows) & (f < inner)
    half, wide = row.to(tl.int64) * inner + f, row.to(tl.int64) * 2 * inner + f
    a = tl.load(h + wide, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(h + wide + inner, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + half, (b * a / (1 + tl.exp(-a))).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_gradient_kernel(
    h, d, d_h, rows, inner, PRODUCT: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, EVEN: tl.constexpr
):
    row, f = _tile(inner, BR, BF)
    mask = row < rows if EVEN else (row < rows) & (f < inner)
    half, wide = row.to(tl.int64) * inner + f, row.to(tl.int64) * 2 * inner + f
    a = tl.load(h + wide, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(h + wide + inner, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(d + half, mask=mask, other=0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-a))
    silu = a * s
    tl.store(d_h + wide, (g * b * s * (1 + a * (1 - s))).to(d_h.dtype.element_ty), mask=mask)
    tl.store(d_h + wide + inner, (g * silu).to(d_h.dtype.element_ty), mask=mask)
    if PRODUCT:
        tl.store(d + half, (silu * b).to(d.dtype.element_ty), mask=mask)


def _options(rows: int, inner: int) -> tuple[tuple[int], dict[str, int | bool]]:
    """The grid and the tile: as wide as a power of two that divides ``inner``, up to 512."""
    block = max(64, min(512, inner & -inner))
    high = TILE // block
    grid = (triton.cdiv(rows, high) * triton.cdiv(inner, block),)
    return grid, {"BR": high, "BF": block, "EVEN": inner % block == 0, "num_warps": 4}


def product(h_N2F: Tensor) -> Tensor:
    """``silu(gate) · up`` of ``[gate, up] = h``, fp32 inside: ``[N, F]``."""
    h = h_N2F.contiguous()
    rows, inner = h.shape[0], h.shape[1] // 2
    out = h.new_empty(rows, inner)
    grid, options = _options(rows, inner)
    if out.numel():
        _swiglu_kernel[grid](h, out, rows, inner, **options)
    return out


def gradient_in_place(h_N2F: Tensor, d_NF: Tensor, again: bool) -> Tensor:
    """The gradient for ``h`` from that of the product, ``d``, contiguous and of its dtype; ``again``: ``d`` then holds
    the product itself."""
    h = h_N2F.contiguous()
    rows, inner = h.shape[0], h.shape[1] // 2
    d_h = torch.empty_like(h)
    grid, options = _options(rows, inner)
    if d_NF.numel():
        _swiglu_gradient_kernel[grid](h, d_NF, d_h, rows, inner, PRODUCT=again, **options)
    return d_h


@triton.jit
def _pair_rows_kernel(w, out, columns, half, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row and ``BLOCK`` columns: row r of the paired matrix is row ``r // 2`` of one of the halves."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    apart = r // 2 + (r % 2) * half
    source, target = (r, apart) if REVERSE else (apart, r)
    tl.store(
        out + target * columns + c, tl.load(w + source * columns + c, mask=c < columns), mask=c < columns
    )


def pair_rows(w_2FD: Tensor, reverse: bool = False) -> Tensor:
    """``[2F, D]``, gate above up → the same rows with those of one feature as neighbours; or back."""
    w = w_2FD.contiguous()
    out = torch.empty_like(w)
    rows, columns = w.shape
    block = min(2048, triton.next_power_of_2(max(1, columns)))
    if w.numel():
        _pair_rows_kernel[(rows, triton.cdiv(columns, block))](
            w, out, columns, rows // 2, REVERSE=reverse, BLOCK=block, num_warps=max(1, min(8, block // 256))
        )
    return out
