"""How gradients of micro-batches add up: two narrow ones to an fp32 total, then narrow ones into it.

Torch's addition of two formats loads element by element; the kernels here load 16 bytes a thread, and are bound by
memory: with bf16 addends 8 bytes an element for the first two, 10 for each further one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.ops.triton import available, kernels


def add_(total: Tensor, addend: Tensor) -> None:
    """``total += addend`` in place, rounded once, in the dtype of ``total``.

    Args:
        total: fp32 or wider. addend: any float dtype, of the same shape.
    """
    if total.is_cuda and fits(total, addend) and available():
        kernels("accumulate").add_(total, addend)
    else:
        total.add_(addend)


def wide_sum(a: Tensor, b: Tensor) -> Tensor:
    """``a + b`` in fp32 or wider, each widened first: the same bits as ``add_`` of ``b`` to a wide copy of ``a``.

    Args:
        a, b: any float dtype, of the same shape.
    """
    if a.is_cuda and a.dtype == b.dtype and narrow(a) and narrow(b) and a.shape == b.shape and available():
        return kernels("accumulate").wide_sum(a, b)
    total = a.to(torch.promote_types(a.dtype, torch.float32), copy=True)
    add_(total, b)
    return total


def narrow(x: Tensor) -> bool:
    """Whether the kernels take ``x`` as an addend: 16 bits, contiguous."""
    return x.dtype in (torch.bfloat16, torch.float16) and x.is_contiguous()


def fits(total: Tensor, addend: Tensor) -> bool:
    """Whether the kernel takes these: an fp32 total, a 16-bit addend, both contiguous and of one shape."""
    wide = total.dtype == torch.float32 and total.is_contiguous()
    return wide and narrow(addend) and total.shape == addend.shape
