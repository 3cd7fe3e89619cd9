"""Head and cross-entropy as one operation that never holds all logits, and never computes them twice.

Rows go through in chunks. A chunk's logits are overwritten by their own gradient, from which the gradients of the
hidden states and of the head follow at once, in forward: backward only multiplies them by a number. So the head costs
three matrix products, where recomputing the logits would cost four, and memory is one chunk. (The idea is that of the
fused linear cross-entropies of Wijmans et al., arXiv 2411.09009, and Hsu et al., arXiv 2410.10989.) The optional
z-loss ``z · log²Σexp`` keeps logits from drifting (PaLM, arXiv 2204.02311).

Shape letters: N rows, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.batch import IGNORE
from deepseek.ops.triton import available, kernels

CHUNK_BYTES = 1 << 29  #: logits held at once on an accelerator
CHUNK_BYTES_CPU = 1 << 26  #: and on a CPU, where caches are small


def chunk_rows(vocab: int, element_size: int, cuda: bool) -> int:
    """How many rows of logits exist at once."""
    return max(1, (CHUNK_BYTES if cuda else CHUNK_BYTES_CPU) // (vocab * element_size))


def reference_rows(
    logits_NV: Tensor, targets_N: Tensor, found_2N: Tensor, ignore: int, z_weight: float, gradient: bool
) -> None:
    """Loss and squared log-sum-exp of every row go into ``found_2N``, fp32 at least; with ``gradient`` the logits
    become their gradient."""
    counted = targets_N != ignore
    wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    lse = wide.logsumexp(-1)
    own = targets_N.clamp(min=0)[:, None]
    found_2N[0] = (lse - wide.gather(1, own)[:, 0]).masked_fill(~counted, 0.0)
    found_2N[1] = lse.square().masked_fill(~counted, 0.0)
    if gradient:
        d = wide.sub_(lse[:, None]) if wide is logits_NV else wide - lse[:, None]
        d.exp_().mul_((counted * (1 + 2 * z_weight * lse))[:, None])
        d.scatter_add_(1, own, -counted[:, None].to(d.dtype))
        if d is not logits_NV:
            logits_NV.copy_(d)


@torch.library.custom_op("deepseek::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, z_weight: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cuda = hidden_NC.is_cuda
    rows = kernels("cross_entropy").rows if cuda and available() else reference_rows
    wide = torch.promote_types(hidden_NC.dtype, torch.float32)
    n = hidden_NC.shape[0]
    found_2N = hidden_NC.new_empty(2, n, dtype=wide)
    d_hidden = torch.empty_like(hidden_NC) if gradient else hidden_NC.new_empty(0)
    d_weight = torch.empty_like(weight_VC, dtype=wide) if gradient else hidden_NC.new_empty(0, dtype=wide)
    if n == 0:
        d_weight.zero_()
    size = chunk_rows(weight_VC.shape[0], hidden_NC.element_size(), cuda)
    for start in range(0, n, size):
        here = slice(start, start + size)
        hidden = hidden_NC[here]
        logits = F.linear(hidden, weight_VC)
        rows(logits, targets_N[here], found_2N[:, here], IGNORE, z_weight, gradient)
        if gradient:
            torch.mm(logits, weight_VC, out=d_hidden[here])
            _accumulate(d_weight, logits.T, hidden, first=start == 0)
    return found_2N[0].sum(), found_2N[1].sum(), d_hidden, d_weight


@_linear_cross_entropy.register_fake
def _(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, z_weight: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden_NC.dtype, torch.float32)
    d_hidden = torch.empty_like(hidden_NC) if gradient else hidden_NC.new_empty(0)
    d_weight = torch.empty_like(weight_VC, dtype=wide) if gradient else hidden_NC.new_empty(0, dtype=wide)
    return hidden_NC.new_empty((), dtype=wide), hidden_NC.new_empty((), dtype=wide), d_hidden, d_weight


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b`` in the precision of ``total``; at ``first`` its contents do not count."""
    beta = 0 if first else 1
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=beta, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += (a @ b).to(total.dtype)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.z_weight, ctx.dtypes = inputs[3], (inputs[0].dtype, inputs[1].dtype)
    ctx.save_for_backward(output[2], output[3])


def _backward(ctx: Any, d_nats: Tensor, d_squares: Tensor, *_: Tensor) -> tuple[Any, ...]:
    d_hidden, d_weight = ctx.saved_tensors
    return _times(d_hidden, d_nats, ctx.dtypes[0]), _times(d_weight, d_nats, ctx.dtypes[1]), None, None, None


def _times(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``x · factor``, rounded to ``dtype`` as it is written. (A 0-d factor would be rounded to the dtype of ``x``.)"""
    return torch.mul(x, factor.reshape(1), out=torch.empty_like(x, dtype=dtype))


_linear_cross_entropy.register_autograd(_backward, setup_context=_context)


def linear_cross_entropy(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, z_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum of −log softmax(``hidden @ weightᵀ``)[target] over targets that are not ``IGNORE``.

    Args:
        hidden_NC: any float dtype, in which the products run. weight_VC: the head, cast to that dtype.
        targets_N: int64 ids, or ``IGNORE``.
        z_weight: adds ``z_weight · Σ log²Σexp`` to the *gradient*, as if it were part of the first result.

    Returns:
        The sum of cross-entropies in nats (differentiable) and ``Σ log²Σexp`` (a number to report), fp32 at least.
    """
    weight = weight_VC.to(hidden_NC.dtype)
    gradient = torch.is_grad_enabled() and (hidden_NC.requires_grad or weight.requires_grad)
    nats, squares, _, _ = _linear_cross_entropy(
        hidden_NC.contiguous(), weight, targets_N.contiguous(), z_weight, gradient
    )
    return nats, squares.detach()
