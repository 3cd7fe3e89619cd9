"""Triton kernel of ``deepseek.ops.accumulate``: a narrow tensor added to a wide one."""

from __future__ import annotations

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


def add_(total: Tensor, addend: Tensor) -> None:
    """See ``deepseek.ops.accumulate``; both contiguous, the total fp32."""
    n = total.numel()
    if n:
        _accumulate_kernel[(triton.cdiv(n, BLOCK),)](total, addend, n, BLOCK=BLOCK, num_warps=4)
