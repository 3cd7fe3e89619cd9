"""Triton kernels of the loss: log-sum-exp, loss and the logits' gradient in one visit of a row, in place.

A bf16 row is read once where registers hold it, two logits in each: at 64 logits a thread the kernel needs 64
registers, so that two rows of 32,768 share a multiprocessor and one is read while the other is computed. Unpacked, a
row would take twice the registers and have a multiprocessor for itself. Other rows are read twice, block by block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOGITS_PER_THREAD = 64
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _unpack(pairs, shift):
    """The logits in the lower and in the upper halves of 32-bit words, fp32. ``shift``: 16."""
    low, high = pairs << shift, pairs >> shift << shift
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def _own(row, target, vocab):
    """The target's logit, fp32, and whether there is one: an id that is none spoils the step, which is then skipped."""
    known = (target >= 0) & (target < vocab)
    own = tl.load(row + tl.where(known, target, 0)).to(tl.float32)
    return tl.where(known, own, float("nan")), known


@triton.jit
def _whole_row_kernel(
    logits, targets, losses, squares, vocab, ignore, z_weight, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """bf16 logits; ``vocab`` a multiple of 16, so that loads are 16 bytes wide, and at most ``BLOCK``."""
    n = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + n)
    row = logits + n * vocab
    counted = target != ignore
    own, known = _own(row, target, vocab)
    words = row.to(tl.pointer_type(tl.uint32), bitcast=True)
    w = tl.arange(0, BLOCK // 2)
    here = w < vocab // 2
    pairs = tl.load(words + w, mask=here, other=0xFF80FF80)  # twice minus infinity
    low, high = _unpack(pairs, 16)
    highest = tl.max(tl.maximum(low, high), 0)
    top = highest * LOG2_E
    # The other axes of the grid have one program, number 0. But the compiler does not know that: it has to unpack
    # again, where it would keep what was unpacked before, which are twice as many registers.
    low, high = _unpack(pairs, 16 + tl.program_id(1))
    rest = tl.log2(tl.sum(tl.exp2(low * LOG2_E - top) + tl.exp2(high * LOG2_E - top), 0))
    lse2 = top + rest
    lse = lse2 * LN_2
    # Large logits are subtracted from each other before anything is rounded: of a sure target much would be lost.
    tl.store(losses + n, tl.where(counted, highest - own + rest * LN_2, 0.0))
    tl.store(squares + n, tl.where(counted, lse * lse, 0.0))
    if GRADIENT:
        pull = tl.where(counted, 1.0 + 2.0 * z_weight * lse, 0.0)
        low, high = _unpack(pairs, 16 + tl.program_id(2))
        d = tl.interleave(pull * tl.exp2(low * LOG2_E - lse2), pull * tl.exp2(high * LOG2_E - lse2))
        v = tl.arange(0, BLOCK)
        # Every lane has read the target's logit: the reductions above waited for it.
        tl.store(row + v, d.to(logits.dtype.element_ty), mask=v < vocab)
        tl.debug_barrier()  # the target's gradient goes over what a lane has just stored
        d_own = pull * tl.exp2((own - highest) * LOG2_E - rest) - 1.0
        tl.store(row + target, d_own.to(logits.dtype.element_ty), mask=counted & known)


@triton.jit
def _rows_kernel(
    logits, targets, losses, squares, vocab, ignore, z_weight, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + n)
    row = logits + n * vocab
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - shift) + tl.exp(x - shift)
        highest = higher
    top = tl.max(highest, 0)
    rest = tl.log(tl.sum(total * tl.exp(highest - top), 0))
    lse = top + rest
    counted = target != ignore
    own, _ = _own(row, target, vocab)
    tl.store(losses + n, tl.where(counted, top - own + rest, 0.0))  # in this order, as above
    tl.store(squares + n, tl.where(counted, lse * lse, 0.0))
    if GRADIENT:
        pull = tl.where(counted, 1.0 + 2.0 * z_weight * lse, 0.0)
        one = tl.where(counted, 1.0, 0.0)
        tl.debug_barrier()  # every lane has read the target's logit before the row is overwritten
        for start in range(0, vocab, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(row + v, mask=v < vocab, other=float("-inf")).to(tl.float32)
            d = pull * tl.exp(x - lse) - tl.where(v == target, one, 0.0)
            tl.store(row + v, d.to(logits.dtype.element_ty), mask=v < vocab)


def rows(
    logits_NV: Tensor, targets_N: Tensor, found_2N: Tensor, ignore: int, z_weight: float, gradient: bool
) -> None:
    """See ``deepseek.ops.cross_entropy``: loss and squared log-sum-exp of every row go into ``found_2N``, fp32."""
    n, vocab = logits_NV.shape
    losses, squares = found_2N.unbind()
    arguments = (logits_NV, targets_N, losses, squares, vocab, ignore, z_weight)
    block = triton.next_power_of_2(vocab)
    if fits(vocab, logits_NV.dtype):
        warps = max(1, block // (32 * LOGITS_PER_THREAD))
        _whole_row_kernel[(n,)](*arguments, GRADIENT=gradient, BLOCK=block, num_warps=warps)
    else:
        _rows_kernel[(n,)](*arguments, GRADIENT=gradient, BLOCK=min(4096, block), num_warps=8)


def fits(vocab: int, dtype: torch.dtype) -> bool:
    """Whether rows are read once.

    65,536 logits are the most that 1,024 threads hold. They take half of a multiprocessor's registers at least, so that
    nothing overlaps, and lanes beyond the vocabulary compute too: that is not worth it where many are.
    """
    return dtype == torch.bfloat16 and vocab % 16 == 0 and (vocab <= 32_768 or 49_152 <= vocab <= 65_536)
