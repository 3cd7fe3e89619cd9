"""``total += addend`` for an fp32 total and a narrower addend: how gradients of micro-batches add up.

Torch's addition of two formats loads element by element; the kernel here loads 16 bytes a thread, and is bound by
memory: 10 bytes an element with a bf16 addend.
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


def fits(total: Tensor, addend: Tensor) -> bool:
    """Whether the kernel takes these: an fp32 total, a 16-bit addend, both contiguous and of one shape."""
    narrow = addend.dtype in (torch.bfloat16, torch.float16) and total.dtype == torch.float32
    return narrow and total.shape == addend.shape and total.is_contiguous() and addend.is_contiguous()
