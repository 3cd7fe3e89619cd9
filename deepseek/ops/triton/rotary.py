"""Triton kernels of ``deepseek.ops.rotary``: a packed projection rotated into its parts, and their gradients back.

Bound by memory: every element is read and written once, 16 bytes a thread. A program has a few positions and goes
through all of their heads, some at a time, with the angles in registers. It loads both halves of a head, for pairs are
half a head apart. Products are rounded before they are added, as in ``rotated``, so that both agree to the last bit.

Shape letters: N = B·T positions, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  #: elements of each half that a program has at a time


@triton.jit
def _tile(positions, D: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BF: tl.constexpr):
    """This program's positions, heads counted from the first of a tile, pairs, and which of them there are."""
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None, None]
    h = tl.arange(0, BH)[None, :, None]
    f = tl.arange(0, BF)[None, None, :]
    return n, h, f, (n < positions) & (f < D // 2)


@triton.jit
def _angles(cos, sin, n, f, mask, length, D: tl.constexpr, SHARED: tl.constexpr):
    """Cosines and sines; ``SHARED``: a table of one row's positions."""
    place = (n % length if SHARED else n).to(tl.int64) * (D // 2) + f
    return tl.load(cos + place, mask=mask, other=0.0), tl.load(sin + place, mask=mask, other=0.0)


@triton.jit
def _turn(
    source,
    target,
    c,
    s,
    mask,
    source_step,
    target_step,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BH: tl.constexpr,
):
    """Rotate ``HEADS`` heads, ``BH`` at a time."""
    for _ in range(HEADS // BH):
        a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(source + D // 2, mask=mask, other=0.0).to(tl.float32)
        tl.store(target, (a * c - b * s).to(target.dtype.element_ty), mask=mask)
        tl.store(target + D // 2, (b * c + a * s).to(target.dtype.element_ty), mask=mask)
        source += source_step
        target += target_step


@triton.jit
def _copy(
    source, target, mask, source_step, target_step, HEADS: tl.constexpr, D: tl.constexpr, BH: tl.constexpr
):
    for _ in range(HEADS // BH):
        a = tl.load(source, mask=mask, other=0.0)
        b = tl.load(source + D // 2, mask=mask, other=0.0)
        tl.store(target, a, mask=mask)
        tl.store(target + D // 2, b, mask=mask)
        source += source_step
        target += target_step


@triton.jit
def _rotary_kernel(
    y, cos, sin, q, k, v, positions, length,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SHARED: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    n, h, f, mask = _tile(positions, D, BN, BH, BF)
    c, s = _angles(cos, sin, n, f, mask, length, D, SHARED)
    n, inside = n.to(tl.int64), h * D + f
    y += n * ((H + 2 * K) * D) + inside
    few = n * (K * D) + inside
    _turn(y, q + n * (H * D) + inside, c, s, mask, BH * D, BH * D, H, D, BH)
    _turn(y + H * D, k + few, c, s, mask, BH * D, BH * D, K, D, BH)
    _copy(y + (H + K) * D, v + few, mask, BH * D, BH * D, K, D, BH)


@triton.jit
def _rotary_gradient_kernel(
    d_q, d_k, d_v, cos, sin, d_y, positions, length,
    q_row, q_position, q_head, k_row, k_position, k_head, v_row, v_position, v_head,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SHARED: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    n, h, f, mask = _tile(positions, D, BN, BH, BF)
    c, s = _angles(cos, sin, n, f, mask, length, D, SHARED)
    b, t, n = (n // length).to(tl.int64), (n % length).to(tl.int64), n.to(tl.int64)
    d_q += b * q_row + t * q_position + h * q_head + f
    d_k += b * k_row + t * k_position + h * k_head + f
    d_v += b * v_row + t * v_position + h * v_head + f
    d_y += n * ((H + 2 * K) * D) + h * D + f
    _turn(d_q, d_y, c, -s, mask, BH * q_head, BH * D, H, D, BH)
    _turn(d_k, d_y + H * D, c, -s, mask, BH * k_head, BH * D, K, D, BH)
    _copy(d_v, d_y + (H + K) * D, mask, BH * v_head, BH * D, K, D, BH)


def _options(q_BTHD: Tensor, k_BTKD: Tensor, cos: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, sizes and tile: up to four heads at a time, as many as divide those of either kind."""
    B, T, H, D = q_BTHD.shape
    K = k_BTKD.shape[2]
    heads, pairs = min(4, (H | K) & -(H | K)), triton.next_power_of_2(D // 2)
    high = max(1, TILE // (heads * pairs))
    options = {
        "H": H,
        "K": K,
        "D": D,
        "SHARED": cos.numel() == T * (D // 2),
        "BN": high,
        "BH": heads,
        "BF": pairs,
    }
    return (triton.cdiv(B * T, high),), {**options, "num_warps": 4, "enable_fp_fusion": False}


def rotate(y_BTE: Tensor, cos: Tensor, sin: Tensor, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
    """Fill ``q``, ``k``, ``v`` from ``y``; all contiguous."""
    B, T = y_BTE.shape[:2]
    grid, options = _options(q_BTHD, k_BTKD, cos)
    if y_BTE.numel():
        _rotary_kernel[grid](y_BTE, cos, sin, q_BTHD, k_BTKD, v_BTKD, B * T, T, **options)


def rotate_back(
    d_q_BTHD: Tensor, d_k_BTKD: Tensor, d_v_BTKD: Tensor, cos: Tensor, sin: Tensor, d_y_BTE: Tensor
) -> None:
    """Fill ``d_y`` from the gradients of its parts, contiguous in their last dimension; the others contiguous."""
    B, T = d_y_BTE.shape[:2]
    grid, options = _options(d_q_BTHD, d_k_BTKD, cos)
    parts = (d_q_BTHD, d_k_BTKD, d_v_BTKD)
    strides = [s for d in parts for s in d.stride()[:3]]
    if d_y_BTE.numel():
        _rotary_gradient_kernel[grid](*parts, cos, sin, d_y_BTE, B * T, T, *strides, **options)
