"""AdamW on one tensor in one pass over memory, every number that changes from step to step read from the device.

Master weight, both moments and gradient are read once, master, moments and the low-precision weight written once: 28
bytes a parameter with a bf16 weight and gradient, against 50 and more for separate clipping, update and conversion.
Because learning rate, betas and the decision to apply the step lie in a tensor, a CUDA graph replays it as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.ops.triton import available, kernels

#: The columns of ``scalars``. ``rest`` is 1 − beta, ``keep`` 1 − lr·weight_decay, ``rate`` lr / (1 − Πβ₁), ``widen``
#: 1 / √(1 − Πβ₂); ``scale`` multiplies the gradient, ``apply`` is 0 for a step that must change nothing.
SCALARS = ("beta1", "rest1", "beta2", "rest2", "eps", "keep", "rate", "widen", "scale", "apply")


def adamw_(
    weight: Tensor, master: Tensor, mean: Tensor, square: Tensor, grad: Tensor, scalars: Tensor
) -> None:
    """One AdamW step (arXiv 1711.05101) of one parameter, in place.

    Args:
        weight: any float dtype, what the model computes with; becomes ``master`` rounded. May be ``master`` itself.
        master, mean, square: fp32 (or fp64) weight and moments, contiguous, of the weight's shape.
        grad: any float dtype. scalars: the ``SCALARS``, ``[10]`` on the device, in the master's dtype.
    """
    run = kernels("adamw").adamw_ if weight.is_cuda and available() else reference_adamw_
    run(weight, master, mean, square, grad.contiguous(), scalars)


def reference_adamw_(
    weight: Tensor, master: Tensor, mean: Tensor, square: Tensor, grad: Tensor, scalars: Tensor
) -> None:
    """The same in plain torch."""
    beta1, rest1, beta2, rest2, eps, keep, rate, widen, scale, apply = scalars.unbind()
    ok = apply > 0
    g = torch.where(ok, grad.to(master.dtype) * scale, 0.0)
    mean.copy_(torch.where(ok, mean * beta1 + g * rest1, mean))
    square.copy_(torch.where(ok, square * beta2 + g * g * rest2, square))
    moved = master * keep - rate * mean / (square.sqrt() * widen + eps)
    master.copy_(torch.where(ok, moved, master))
    if weight is not master:
        weight.copy_(master)
