"""Triton kernels of ``deepseek.ops.accumulate``: a narrow tensor added to a wide one, two narrow ones to a wide one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _accumulate_kernel(total, addend, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    x = tl.load(total + i, mask=here, other=0.0) + tl.load(addend + i, mask=here, other=0.0).to(tl.float32)
    tl.store(total + i, x, mask=here)


@triton.jit
def _wide_sum_kernel(total, a, b, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    first = tl.load(a + i, mask=here, other=0.0).to(tl.float32)
    x = first + tl.load(b + i, mask=here, other=0.0).to(tl.float32)
    tl.store(total + i, x, mask=here)


def add_(total: Tensor, addend: Tensor) -> None:
    """See ``deepseek.ops.accumulate``; both contiguous, the total fp32."""
    n = total.numel()
    if n:
        _accumulate_kernel[(triton.cdiv(n, BLOCK),)](total, addend, n, BLOCK=BLOCK, num_warps=4)


def wide_sum(a: Tensor, b: Tensor) -> Tensor:
    """See ``deepseek.ops.accumulate``; both contiguous and of 16 bits."""
    total, n = torch.empty_like(a, dtype=torch.float32), a.numel()
    if n:
        _wide_sum_kernel[(triton.cdiv(n, BLOCK),)](total, a, b, n, BLOCK=BLOCK, num_warps=4)
    return total
