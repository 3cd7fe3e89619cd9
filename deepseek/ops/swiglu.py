"""The second half of a dense SwiGLU network, ``down(silu(gate) · up)``, as one operation (arXiv 2002.05202).

It keeps ``[gate, up]`` alone for backward. The product between is needed there once more, for the gradient of ``down``;
the kernel that computes the gradients of both halves makes it again, in the place of its own gradient. So activations
are as small as where a compiler recomputes, in eager mode too, and every tensor is read and written once.

On CUDA only: elsewhere a layer stays plain torch, which a compiler may fuse.

Where ``fused_products`` are usable, ``swiglu_network`` is the whole network: the first product answers with the
activation too, and the product with the output's gradient with both gradients. Gate and up are neighbours then; the
first weight and its gradient are laid so, and back, around cuBLAS's products.

Shape letters: N rows, D features before, F after the activation, C features of the result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops import fused_products
from deepseek.ops.experts import swiglu
from deepseek.ops.triton import available, fuses, kernels


@torch.library.custom_op("deepseek::swiglu_linear", mutates_args=())
def _swiglu_linear(h_N2F: Tensor, weight_CF: Tensor, bias_C: Tensor | None) -> Tensor:
    product = kernels("swiglu").product(h_N2F) if fuses(h_N2F) and available() else swiglu(h_N2F)
    return F.linear(product, weight_CF, bias_C)


@_swiglu_linear.register_fake
def _(h_N2F: Tensor, weight_CF: Tensor, bias_C: Tensor | None) -> Tensor:
    return h_N2F.new_empty(h_N2F.shape[0], weight_CF.shape[0])


@torch.library.custom_op("deepseek::swiglu_linear_backward", mutates_args=())
def _swiglu_linear_backward(
    d_y_NC: Tensor, h_N2F: Tensor, weight_CF: Tensor, weight_too: bool
) -> tuple[Tensor, Tensor]:
    d_product = d_y_NC @ weight_CF
    if fuses(h_N2F) and available():
        d_h = kernels("swiglu").gradient_in_place(h_N2F, d_product, weight_too)
        product = d_product
    else:
        d_h, product = reference_gradient(h_N2F, d_product)
    return d_h, d_y_NC.T @ product if weight_too else weight_CF.new_empty(0)


@_swiglu_linear_backward.register_fake
def _(d_y_NC: Tensor, h_N2F: Tensor, weight_CF: Tensor, weight_too: bool) -> tuple[Tensor, Tensor]:
    d_weight = weight_CF.new_empty(weight_CF.shape if weight_too else 0)
    return torch.empty_like(h_N2F, memory_format=torch.contiguous_format), d_weight


def reference_gradient(h_N2F: Tensor, d_NF: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient for ``h`` from that of the product, and the product: fp32 at least inside."""
    wide = torch.promote_types(h_N2F.dtype, torch.float32)
    a, b = h_N2F.to(wide).chunk(2, -1)
    s, d = a.sigmoid(), d_NF.to(wide)
    silu = a * s
    d_h = torch.cat((d * b * s * (1 + a * (1 - s)), d * silu), dim=-1)
    return d_h.to(h_N2F.dtype), (silu * b).to(h_N2F.dtype)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradient(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    weight, bias = ctx.needs_input_grad[1:]
    d_h, d_weight = _swiglu_linear_backward(d_y, *ctx.saved_tensors, weight)
    return d_h, d_weight if weight else None, d_y.sum(0) if bias else None


_swiglu_linear.register_autograd(_gradient, setup_context=_context)


def swiglu_linear(h: Tensor, weight_CF: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """``linear(silu(gate) · up, weight, bias)`` of ``[gate, up] = h [..., 2F]``.

    Args:
        h: any float dtype, in which the products run. weight_CF, bias_C: cast to that dtype.

    Returns:
        ``[..., C]`` in the dtype of ``h``; differentiable once.
    """
    bias = None if bias_C is None else bias_C.to(h.dtype)
    y = _swiglu_linear(h.reshape(-1, h.shape[-1]), weight_CF.to(h.dtype), bias)
    return y.view(*h.shape[:-1], weight_CF.shape[0])


# --- the whole network, by fused products ---------------------------------------------------------------------------


def fuses_network(x: Tensor, weight_2FD: Tensor, weight_CF: Tensor) -> bool:
    """Whether ``swiglu_network`` runs here, in training; a first answer may compile kernels."""
    if not x.is_cuda or not torch.is_grad_enabled():
        return False
    sizes = weight_2FD.shape[1], weight_CF.shape[1], weight_CF.shape[0]
    return fused_products.usable(x.device, x.dtype, False, *sizes)


@torch.library.custom_op("deepseek::swiglu_network", mutates_args=())
def _swiglu_network(x_ND: Tensor, weight_2FD: Tensor, weight_CF: Tensor) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(x_ND):
        h, product = fused_products.products().dense_up(x_ND, weight_2FD)
    return product @ weight_CF.T, h


@_swiglu_network.register_fake
def _(x_ND: Tensor, weight_2FD: Tensor, weight_CF: Tensor) -> tuple[Tensor, Tensor]:
    rows = x_ND.shape[0]
    return x_ND.new_empty(rows, weight_CF.shape[0]), x_ND.new_empty(rows, weight_CF.shape[1], 2)


@torch.library.custom_op("deepseek::swiglu_network_backward", mutates_args=())
def _swiglu_network_backward(
    d_y_NC: Tensor, x_ND: Tensor, weight_2FD: Tensor, weight_CF: Tensor, h_NF2: Tensor, weights_too: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x_ND):
        d_h, product = fused_products.products().dense_down_gradient(d_y_NC.contiguous(), weight_CF, h_NF2)
    d_weight_out = d_y_NC.T @ product if weights_too else weight_CF.new_empty(0)
    del product
    d_h = d_h.flatten(1)
    d_weight_in = _pair_rows(d_h.T @ x_ND, reverse=True) if weights_too else weight_2FD.new_empty(0)
    return d_h @ _pair_rows(weight_2FD), d_weight_in, d_weight_out


def _pair_rows(w_2FD: Tensor, reverse: bool = False) -> Tensor:
    """Gate above up → the rows of one feature as neighbours; or back."""
    if fuses(w_2FD) and available():
        return kernels("swiglu").pair_rows(w_2FD, reverse)
    return w_2FD.unflatten(0, (-1, 2) if reverse else (2, -1)).transpose(0, 1).flatten(0, 1)


@_swiglu_network_backward.register_fake
def _(
    d_y_NC: Tensor, x_ND: Tensor, weight_2FD: Tensor, weight_CF: Tensor, h_NF2: Tensor, weights_too: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_in, d_out = (w.new_empty(w.shape if weights_too else 0) for w in (weight_2FD, weight_CF))
    return x_ND.new_empty(x_ND.shape), d_in, d_out


def _network_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _network_gradient(ctx: Any, d_y: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    up, down = ctx.needs_input_grad[1:]
    d_x, d_up, d_down = _swiglu_network_backward(d_y, *ctx.saved_tensors, up or down)
    return d_x, d_up if up else None, d_down if down else None


_swiglu_network.register_autograd(_network_gradient, setup_context=_network_context)


def swiglu_network(x: Tensor, weight_2FD: Tensor, weight_CF: Tensor) -> Tensor:
    """``down(silu(gate(x)) · up(x))``, where ``fuses_network`` says so.

    Args:
        x: ``[..., D]``, bf16. weight_2FD: gate above up. weight_CF: of down. Both cast to bf16.

    Returns:
        ``[..., C]`` in the dtype of ``x``; differentiable once.
    """
    flat = x.reshape(-1, x.shape[-1])
    y, _ = _swiglu_network(flat, weight_2FD.to(x.dtype), weight_CF.to(x.dtype))
    return y.view(*x.shape[:-1], weight_CF.shape[0])
