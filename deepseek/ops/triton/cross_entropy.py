"""Triton kernel of the loss: log-sum-exp, loss and the logits' gradient in one visit of a row, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    lse = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    counted = target != ignore
    known = (target >= 0) & (target < vocab)
    own = tl.load(row + tl.where(known, target, 0)).to(tl.float32)
    own = tl.where(known, own, float("nan"))  # an id that is none spoils the step, which is then skipped
    tl.store(losses + n, tl.where(counted, lse - own, 0.0))
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
    logits_NV: Tensor, targets_N: Tensor, ignore: int, z_weight: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """See ``deepseek.ops.cross_entropy``: loss and squared log-sum-exp of every row, fp32 ``[N]``."""
    n, vocab = logits_NV.shape
    losses, squares = (torch.empty(n, device=logits_NV.device, dtype=torch.float32) for _ in range(2))
    block = min(4096, triton.next_power_of_2(vocab))
    _rows_kernel[(n,)](
        logits_NV,
        targets_N,
        losses,
        squares,
        vocab,
        ignore,
        z_weight,
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=8,
    )
    return losses, squares
