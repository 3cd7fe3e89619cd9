"""Triton kernel of AdamW with master weights: see ``deepseek.ops.adamw``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _adamw_kernel(weight, master, mean, square, grad, scalars, n, LOWERED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    beta1, rest1, beta2, rest2 = (
        tl.load(scalars),
        tl.load(scalars + 1),
        tl.load(scalars + 2),
        tl.load(scalars + 3),
    )
    eps, keep, rate, widen = (
        tl.load(scalars + 4),
        tl.load(scalars + 5),
        tl.load(scalars + 6),
        tl.load(scalars + 7),
    )
    scale, apply = tl.load(scalars + 8), tl.load(scalars + 9)
    here = i < tl.where(apply > 0, n, 0)  # a step that does not apply reads and writes nothing
    g = tl.load(grad + i, mask=here, other=0.0).to(tl.float32) * scale
    m = tl.load(mean + i, mask=here, other=0.0) * beta1 + g * rest1
    v = tl.load(square + i, mask=here, other=0.0) * beta2 + g * g * rest2
    w = tl.load(master + i, mask=here, other=0.0) * keep - rate * m / (tl.sqrt(v) * widen + eps)
    tl.store(mean + i, m, mask=here)
    tl.store(square + i, v, mask=here)
    tl.store(master + i, w, mask=here)
    if LOWERED:
        tl.store(weight + i, w.to(weight.dtype.element_ty), mask=here)


def adamw_(
    weight: Tensor, master: Tensor, mean: Tensor, square: Tensor, grad: Tensor, scalars: Tensor
) -> None:
    """See ``deepseek.ops.adamw``; all tensors contiguous, master and moments fp32."""
    n = master.numel()
    _adamw_kernel[(triton.cdiv(n, BLOCK),)](
        weight, master, mean, square, grad, scalars, n, LOWERED=weight is not master, BLOCK=BLOCK, num_warps=4
    )
