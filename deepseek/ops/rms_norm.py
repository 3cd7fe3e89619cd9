"""RMSNorm as one operation each way, alone or with the residual stream beside it (arXiv 1910.07467).

A pre-norm block adds to the residual stream and norms the sum. In backward the sum's gradient has two parts, one
through the norm and one past it; the kernel here reads both and writes their total, which a norm on its own leaves to
another pass over memory. Where nothing is added, ``rms_norm_beside`` hands its input on, so that it gets both parts,
too; where two layers read the norm, ``add_rms_norm_twice`` has their gradients in two parts as well. Kept for backward
are the sum and one fp32 number a row.

On CUDA only: elsewhere a layer stays plain torch, which a compiler may fuse.

Shape letters: C features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek.ops.triton import available, kernels
from deepseek.ops.triton import fuses as takes

WIDEST = 8192  #: features of a row that one program holds


def fuses(x: Tensor) -> bool:
    """Whether these operations are meant for ``x``."""
    return takes(x) and 0 < x.shape[-1] <= WIDEST


def _forward(x: Tensor, y: Tensor | None, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if fuses(x) and available():
        total, normed, rstd = kernels("rms_norm").forward(x, y, weight_C, eps)
        return total, normed, rstd
    total = x.contiguous() if y is None else torch.add(x, y).contiguous()
    return total, *reference(total, weight_C, eps)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reference(x: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of ``x [..., C]`` in its dtype, and ``1/rms [...]``: fp32 at least inside."""
    wide = _wide(x)
    normed = F.rms_norm(wide, weight_C.shape, weight_C.to(wide.dtype), eps)
    return normed.to(x.dtype), (wide.square().mean(-1) + eps).rsqrt()


def reference_gradient(
    d_normed: Tensor, d_again: Tensor | None, d_sum: Tensor | None, x: Tensor, weight_C: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient for ``x [..., C]`` and that for the weight ``[C]``: fp32 at least inside, each rounded once."""
    d, r = _wide(d_normed), rstd.unsqueeze(-1)
    if d_again is not None:
        d = d + d_again
    normed = _wide(x) * r
    d_weight = (d * normed).reshape(-1, x.shape[-1]).sum(0)
    d = d * weight_C.to(d.dtype)
    d = r * (d - normed * (d * normed).mean(-1, keepdim=True))
    if d_sum is not None:
        d = d + d_sum
    return d.to(x.dtype), d_weight.to(weight_C.dtype)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _empty_rstd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("deepseek::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _forward(x, None, weight_C, eps)[1:]


@_rms_norm.register_fake
def _(x: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _empty(x), _empty_rstd(x)


@torch.library.custom_op("deepseek::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, y: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, y, weight_C, eps)


@_add_rms_norm.register_fake
def _(x: Tensor, y: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x), _empty(x), _empty_rstd(x)


@torch.library.custom_op("deepseek::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    d_normed: Tensor, d_again: Tensor | None, d_sum: Tensor | None, x: Tensor, weight_C: Tensor, rstd: Tensor,
    weight_too: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if fuses(x) and available():
        d_x, d_weight = kernels("rms_norm").backward(d_normed, d_again, d_sum, x, weight_C, rstd, weight_too)
        return d_x, d_weight
    d_x, d_weight = reference_gradient(d_normed, d_again, d_sum, x, weight_C, rstd)
    return d_x.contiguous(), d_weight if weight_too else weight_C.new_empty(0)


@_rms_norm_backward.register_fake
def _(
    d_normed: Tensor, d_again: Tensor | None, d_sum: Tensor | None, x: Tensor, weight_C: Tensor, rstd: Tensor,
    weight_too: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty(x), weight_C.new_empty(weight_C.shape if weight_too else 0)


def _gradient(
    d_sum: Tensor | None,
    d_normed: Tensor | None,
    saved: tuple[Tensor, ...],
    weight_too: bool,
    d_again: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients for the sum and for the weight; either part of the first may be missing."""
    if d_normed is None:
        return d_sum, None
    d, d_weight = _rms_norm_backward(d_normed, d_again, d_sum, *saved, weight_too)
    return d, d_weight if weight_too else None


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _backward(ctx: Any, d_normed: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
    return *_gradient(None, d_normed, ctx.saved_tensors, ctx.needs_input_grad[1]), None


def _context_of_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], inputs[2], output[2])


def _backward_of_sum(
    ctx: Any, d_sum: Tensor | None, d_normed: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    d, d_weight = _gradient(d_sum, d_normed, ctx.saved_tensors, ctx.needs_input_grad[2])
    return d, d, d_weight, None


_rms_norm.register_autograd(_backward, setup_context=_context)
_add_rms_norm.register_autograd(_backward_of_sum, setup_context=_context_of_sum)


# An operation must not return its input, or one tensor twice. So these stand around the operations.


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, rstd = _rms_norm(x, weight_C, eps)
        ctx.save_for_backward(x, weight_C, rstd)
        return x.view_as(x), normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor, d_normed: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return *_gradient(d_x, d_normed, ctx.saved_tensors, ctx.needs_input_grad[1]), None


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, normed, rstd = _add_rms_norm(x, y, weight_C, eps)
        ctx.save_for_backward(total, weight_C, rstd)
        return total, normed, normed.view_as(normed)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_sum: Tensor, d_normed: Tensor, d_again: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        d, d_weight = _gradient(d_sum, d_normed, ctx.saved_tensors, ctx.needs_input_grad[2], d_again)
        return d, d, d_weight, None


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """``weight · x / sqrt(mean(x²) + eps)`` over the last dimension, fp32 at least inside.

    Args:
        x: ``[..., C]``, any float dtype. weight_C: of any float dtype.

    Returns:
        ``[..., C]`` in the dtype of ``x``; differentiable once.
    """
    return _rms_norm(x, weight_C, eps)[0]


def rms_norm_beside(x: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` itself, for the residual stream, and its ``rms_norm``.

    Use the ``x`` that comes back: its gradient then joins that of the norm where that is computed. It is a view, which
    must not be changed in place.
    """
    passed, normed = _Beside.apply(x, weight_C, eps)
    return passed, normed


def add_rms_norm(x: Tensor, y: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + y`` rounded to their dtype, and the ``rms_norm`` of that.

    Args:
        x, y: ``[..., C]``, of one shape and dtype.

    Returns:
        Two tensors ``[..., C]``; differentiable once.
    """
    total, normed, _ = _add_rms_norm(x, y, weight_C, eps)
    return total, normed


def add_rms_norm_twice(x: Tensor, y: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``add_rms_norm``, whose second result comes twice, for two readers.

    Their gradients then meet where that of the norm is computed. Both are one memory, not to be changed in place.
    """
    total, normed, again = _Twice.apply(x, y, weight_C, eps)
    return total, normed, again
