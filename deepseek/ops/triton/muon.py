"""Triton kernels of Muon's element-wise steps: see ``deepseek.ops.muon``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _look_ahead_kernel(direction, momentum, grad, scalars, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale, apply = tl.load(scalars), tl.load(scalars + 1)
    fresh, beta = tl.load(scalars + 2), tl.load(scalars + 3)
    g = tl.load(grad + i, mask=i < tl.where(apply > 0, n, 0), other=0.0).to(tl.float32)
    g = tl.where(apply > 0, g * scale, 0.0)  # the scale may be NaN, too
    m = tl.load(momentum + i, mask=i < n, other=0.0)
    m += fresh * (g - m)
    tl.store(momentum + i, m, mask=i < n)
    d = g + beta * (m - g)
    tl.store(direction + i, d.to(direction.dtype.element_ty), mask=i < n)


@triton.jit
def _descend_kernel(lowered, weight, update, scalars, n, LOWERED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep, rate = tl.load(scalars + 4), tl.load(scalars + 5)
    u = tl.load(update + i, mask=i < n, other=0.0).to(tl.float32)
    w = tl.load(weight + i, mask=i < n, other=0.0) * keep - u * rate
    tl.store(weight + i, w, mask=i < n)
    if LOWERED:
        tl.store(lowered + i, w.to(lowered.dtype.element_ty), mask=i < n)


def look_ahead_(direction: Tensor, momentum: Tensor, grad: Tensor, scalars: Tensor) -> None:
    """See ``deepseek.ops.muon``; all tensors contiguous, momentum and scalars fp32."""
    n = momentum.numel()
    _look_ahead_kernel[(triton.cdiv(n, BLOCK),)](
        direction, momentum, grad, scalars, n, BLOCK=BLOCK, num_warps=4
    )


def descend_(lowered: Tensor | None, weight: Tensor, update: Tensor, scalars: Tensor) -> None:
    """See ``deepseek.ops.muon``; all tensors contiguous, weight and scalars fp32."""
    n, low = weight.numel(), lowered is not None
    target = lowered if lowered is not None else weight
    _descend_kernel[(triton.cdiv(n, BLOCK),)](
        target, weight, update, scalars, n, LOWERED=low, BLOCK=BLOCK, num_warps=4
    )
