"""What Muon does to each number before and after its matrix products, in one pass over memory each.

Around the orthogonalisation lie a dozen element-wise steps (widen, scale, average, look ahead, narrow; shrink, move,
round). One by one they move some ninety bytes a parameter; as two kernels twenty-four.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.ops.triton import available, kernels

#: Elements of ``scalars``. ``scale`` multiplies the gradient, ``fresh`` is the share of it that enters the momentum and
#: ``beta`` that of the momentum in the direction; ``keep`` is 1 − lr·weight_decay and ``rate`` multiplies the update.
#: For a step that must change nothing ``apply`` is 0, and the caller makes ``fresh`` and ``rate`` 0 and ``keep`` 1.
SCALARS = ("scale", "apply", "fresh", "beta", "keep", "rate")


def look_ahead_(direction: Tensor, momentum: Tensor, grad: Tensor, scalars: Tensor) -> None:
    """Nesterov's momentum: ``momentum ← lerp(momentum, g, fresh)``, ``direction ← lerp(g, momentum, beta)``.

    Args:
        direction: any float dtype, is overwritten. momentum: fp32 or fp64. Both contiguous, of the gradient's shape.
        grad: any float dtype; ``g`` is ``scale`` times it, and 0 where ``apply`` is 0, whatever it is.
        scalars: the ``SCALARS``, ``[6]`` on the device, in the momentum's dtype.
    """
    fast = grad.is_cuda and available()
    run = kernels("muon").look_ahead_ if fast else reference_look_ahead_
    run(direction, momentum, grad.contiguous(), scalars)


def descend_(lowered: Tensor | None, weight: Tensor, update: Tensor, scalars: Tensor) -> None:
    """``weight ← weight · keep − update · rate``, and ``lowered``, the same weight in fewer bits, rounded from it."""
    fast = weight.is_cuda and available()
    run = kernels("muon").descend_ if fast else reference_descend_
    run(lowered, weight, update.contiguous(), scalars)


def reference_look_ahead_(direction: Tensor, momentum: Tensor, grad: Tensor, scalars: Tensor) -> None:
    """The same in plain torch."""
    scale, apply, fresh, beta, _, _ = scalars.unbind()
    g = torch.where(apply > 0, grad.to(momentum.dtype) * scale, 0.0)
    momentum.lerp_(g, fresh)
    direction.copy_(g.lerp_(momentum, beta))


def reference_descend_(lowered: Tensor | None, weight: Tensor, update: Tensor, scalars: Tensor) -> None:
    """The same in plain torch."""
    keep, rate = scalars[4], scalars[5]
    weight.mul_(keep).sub_(update.to(weight.dtype) * rate)
    if lowered is not None:
        lowered.copy_(weight)
