"""Means of blocks of keys and values in one kernel, without overlapping copies, and their gradients without atomics.

A position is in the slots whose blocks complete from it to ``block − 1`` positions later, and slots are sorted, so
backward finds them by two counts.

Shape letters: B rows, K key/value heads, T positions, D head size, J pooled slots.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _pool_kernel(
    k, v, k_pool, v_pool, starts, k_b, k_h, k_t, v_b, v_h, v_t, K, T, J,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOCS: tl.constexpr, NJ: tl.constexpr,
):  # fmt: skip
    """Means of BLOCK positions of keys and of values, NJ slots a program."""
    b, h = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    j, d = tl.program_id(1) * NJ + tl.arange(0, NJ), tl.arange(0, DP)
    if DOCS:
        start = tl.load(starts + b * J + j, mask=j < J, other=0).to(tl.int32)
        start = tl.minimum(start, T - BLOCK)  # an unused slot, which nobody sees
    else:
        start = j * STRIDE
    mask = (j < J)[:, None] & (d < D)[None, :]
    k_at = k + b * k_b + h * k_h + start[:, None].to(tl.int64) * k_t + d[None, :]
    v_at = v + b * v_b + h * v_h + start[:, None].to(tl.int64) * v_t + d[None, :]
    sum_k, sum_v = tl.zeros((NJ, DP), tl.float32), tl.zeros((NJ, DP), tl.float32)
    for _ in range(BLOCK):
        sum_k += tl.load(k_at, mask=mask, other=0.0).to(tl.float32)
        sum_v += tl.load(v_at, mask=mask, other=0.0).to(tl.float32)
        k_at += k_t
        v_at += v_t
    at = (b * K + h) * J * D + j[:, None] * D + d[None, :]
    tl.store(k_pool + at, (sum_k * (1.0 / BLOCK)).to(k_pool.dtype.element_ty), mask=mask)
    tl.store(v_pool + at, (sum_v * (1.0 / BLOCK)).to(v_pool.dtype.element_ty), mask=mask)


@triton.jit
def _unpool_kernel(
    dk_pool, dv_pool, dk, dv, slots, dkp_b, dkp_h, dkp_j, dvp_b, dvp_h, dvp_j, dk_b, dk_h, dk_t, B, K, T, J,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOCS: tl.constexpr, NT: tl.constexpr,
):  # fmt: skip
    """Gradients of NT positions: a position is in the slots that complete from it to BLOCK − 1 positions later."""
    b, h = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    t, d = tl.program_id(1) * NT + tl.arange(0, NT), tl.arange(0, DP)
    last = tl.minimum(t + (BLOCK - 1), T - 1)
    if DOCS:
        ends = slots + (B + b) * T
        first = tl.load(ends + t - 1, mask=(t > 0) & (t < T), other=0)
        end = tl.load(ends + last, mask=t < T, other=0)
    else:
        first = tl.where(t >= BLOCK, (t - BLOCK) // STRIDE + 1, 0)
        end = tl.where(last >= BLOCK - 1, (last - (BLOCK - 1)) // STRIDE + 1, 0)
    k_at = dk_pool + b * dkp_b + h * dkp_h + d[None, :]
    v_at = dv_pool + b * dvp_b + h * dvp_h + d[None, :]
    sum_k, sum_v = tl.zeros((NT, DP), tl.float32), tl.zeros((NT, DP), tl.float32)
    for ahead in range((BLOCK + STRIDE - 1) // STRIDE):
        j = first + ahead
        mask = ((j < end) & (t < T))[:, None] & (d < D)[None, :]
        sum_k += tl.load(k_at + j[:, None].to(tl.int64) * dkp_j, mask=mask, other=0.0).to(tl.float32)
        sum_v += tl.load(v_at + j[:, None].to(tl.int64) * dvp_j, mask=mask, other=0.0).to(tl.float32)
    at = b * dk_b + h * dk_h + t[:, None].to(tl.int64) * dk_t + d[None, :]
    mask = (t < T)[:, None] & (d < D)[None, :]
    tl.store(dk + at, (sum_k * (1.0 / BLOCK)).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + at, (sum_v * (1.0 / BLOCK)).to(dv.dtype.element_ty), mask=mask)


def strides_of(*tensors: Tensor) -> list[int]:
    return [s for x in tensors for s in x.stride()[:3]]


def rows_of(x: Tensor) -> Tensor:
    """``x`` with neighbouring features neighbouring in memory, as the kernels read it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("deepseek::pool_means", mutates_args=())
def pool_forward(
    k: Tensor, v: Tensor, starts: Tensor | None, slots: Tensor | None, block: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Means ``[B, K, J, D]`` over blocks of ``k, v [B, K, T, D]``; ``starts``, ``slots``: ``PooledSpans``."""
    k, v = rows_of(k), rows_of(v)
    B, K, T, D = k.shape
    J = max(0, (T - block) // stride + 1)
    k_pool, v_pool = (x.new_empty(B, K, J, D) for x in (k, v))
    if J:
        _pool_kernel[(B * K, triton.cdiv(J, 8))](
            k, v, k_pool, v_pool, k if starts is None else starts, *strides_of(k, v), K, T, J,
            BLOCK=block, STRIDE=stride, D=D, DP=triton.next_power_of_2(D), DOCS=starts is not None, NJ=8, num_warps=4,
        )  # fmt: skip
    return k_pool, v_pool


@pool_forward.register_fake
def _(k, v, starts, slots, block, stride):
    B, K, T, D = k.shape
    J = max(0, (T - block) // stride + 1)
    return k.new_empty(B, K, J, D), v.new_empty(B, K, J, D)


@torch.library.custom_op("deepseek::pool_means_backward", mutates_args=())
def pool_backward(
    dk_pool: Tensor, dv_pool: Tensor, slots: Tensor | None, length: int, block: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Gradients ``[B, K, T, D]`` of keys and values from those of their means."""
    dk_pool, dv_pool = rows_of(dk_pool), rows_of(dv_pool)
    B, K, J, D = dk_pool.shape
    dk, dv = (x.new_empty(B, length, K, D).transpose(1, 2) for x in (dk_pool, dv_pool))
    _unpool_kernel[(B * K, triton.cdiv(length, 16))](
        dk_pool, dv_pool, dk, dv, dk if slots is None else slots, *strides_of(dk_pool, dv_pool, dk), B, K, length, J,
        BLOCK=block, STRIDE=stride, D=D, DP=triton.next_power_of_2(D), DOCS=slots is not None, NT=16, num_warps=4,
    )  # fmt: skip
    return dk, dv


@pool_backward.register_fake
def _(dk_pool, dv_pool, slots, length, block, stride):
    B, K, _, D = dk_pool.shape
    return tuple(x.new_empty(B, length, K, D).transpose(1, 2) for x in (dk_pool, dv_pool))


def _save_pool(ctx, inputs, output):
    k, _, _, slots, block, stride = inputs
    ctx.save_for_backward(slots)
    ctx.sizes = k.shape[2], block, stride


def _differentiate_pool(ctx, dk_pool, dv_pool):
    return (*pool_backward(dk_pool, dv_pool, *ctx.saved_tensors, *ctx.sizes), None, None, None, None)


pool_forward.register_autograd(_differentiate_pool, setup_context=_save_pool)
