"""Rotary embedding (arXiv 2104.09864) of a packed projection, ``[queries, keys, values]``, as one operation.

Queries, keys and values leave it as tensors of their own. Their gradients come back in whatever layout attention's
kernels answer in, and are rotated back into the place that they have in the projection's gradient. So every element is
read and written once in either direction; a compiler has a kernel for each rotation, and one more that assembles the
gradient. Only the table is kept for backward: what attention keeps need not be kept twice.

On CUDA only: elsewhere ``rotated`` is plain torch, which a compiler may fuse.

Shape letters: B rows, T positions, H query heads, K key/value heads, D head size, E = (H + 2K)·D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek.ops.triton import available, fuses, kernels


def rotated(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The plain-torch rotation: pair i of a head, elements i and i + D/2, turns by its angle; in fp32 at least.

    Args:
        cos, sin: ``[T, D/2]`` or ``[B, 1, T, D/2]``; with ``-sin`` it turns back.
    """
    cos, sin = (t.movedim(-2, -3) if t.dim() == 4 else t[:, None] for t in (cos, sin))
    a, b = x_BTHD.to(torch.promote_types(x_BTHD.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTHD.dtype)


def _shapes(y_BTE: Tensor, cos: Tensor, heads: int) -> list[tuple[int, int, int, int]]:
    """The shapes of queries, keys and values."""
    B, T, size, head_dim = *y_BTE.shape, 2 * cos.shape[-1]
    kv_heads = (size // head_dim - heads) // 2
    return [(B, T, n, head_dim) for n in (heads, kv_heads, kv_heads)]


@torch.library.custom_op("deepseek::rotary", mutates_args=())
def _rotary(y_BTE: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = _shapes(y_BTE, cos, heads)
    if fuses(y_BTE) and available():
        parts = [y_BTE.new_empty(s) for s in shapes]
        kernels("rotary").rotate(y_BTE.contiguous(), cos.contiguous(), sin.contiguous(), *parts)
        return parts[0], parts[1], parts[2]
    q, k, v = (
        y.reshape(s) for s, y in zip(shapes, y_BTE.split([s[2] * s[3] for s in shapes], -1), strict=True)
    )
    return rotated(q, cos, sin), rotated(k, cos, sin), v.clone(memory_format=torch.contiguous_format)


@_rotary.register_fake
def _(y_BTE: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (y_BTE.new_empty(s) for s in _shapes(y_BTE, cos, heads))
    return q, k, v


@torch.library.custom_op("deepseek::rotary_backward", mutates_args=())
def _rotary_backward(
    d_q_BTHD: Tensor, d_k_BTKD: Tensor, d_v_BTKD: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    if fuses(d_q_BTHD) and available():
        d_y = d_q_BTHD.new_empty(_packed(d_q_BTHD, d_k_BTKD))
        parts = (d if d.stride(-1) == 1 else d.contiguous() for d in (d_q_BTHD, d_k_BTKD, d_v_BTKD))
        kernels("rotary").rotate_back(*parts, cos.contiguous(), sin.contiguous(), d_y)
        return d_y
    d_q, d_k = (rotated(d, cos, -sin) for d in (d_q_BTHD, d_k_BTKD))
    return torch.cat((d_q, d_k, d_v_BTKD), dim=2).flatten(2)


@_rotary_backward.register_fake
def _(d_q_BTHD: Tensor, d_k_BTKD: Tensor, d_v_BTKD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return d_q_BTHD.new_empty(_packed(d_q_BTHD, d_k_BTKD))


def _packed(q_BTHD: Tensor, k_BTKD: Tensor) -> tuple[int, int, int]:
    B, T, H, D = q_BTHD.shape
    return B, T, (H + 2 * k_BTKD.shape[2]) * D


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _gradient(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
    return _rotary_backward(d_q, d_k, d_v, *ctx.saved_tensors), None, None, None


_rotary.register_autograd(_gradient, setup_context=_context)


def rotary(y_BTE: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, of a projection ``[queries, keys, values] = y [B, T, (H + 2K)·D]``.

    Args:
        y_BTE: any float dtype; rotated in fp32 at least and rounded once.
        cos, sin: fp32 ``[T, D/2]``, or ``[B, 1, T, D/2]`` where rows have positions of their own. They get no gradient.
        heads: H; D is twice the table's last dimension, and K follows.

    Returns:
        ``[B, T, H, D]`` and twice ``[B, T, K, D]``, contiguous, in the dtype of ``y``; differentiable once.
    """
    return _rotary(y_BTE, cos, sin, heads)
