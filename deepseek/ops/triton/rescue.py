"""Triton kernels that find the tokens which like a neglected expert best: a selection in two steps, nothing sorted.

An expert takes few of many tokens (410 of 131,072, say), so most are ruled out by groups. ``_liking_kernel`` writes a
key for every expert and token, and the greatest key of every group of neighbours: the peaks. If M tokens are missing,
all of them lie in the groups whose peak is among the M greatest, which ``_near_kernel`` lists; ``_rescue_kernel`` looks
no further. Groups of √(N/M) tokens make both lists equally long (8,192 peaks, then 6,560 keys): one program an expert
holds them in registers while it finds, bit by bit, the greatest key that M of them reach. The choice is exact however
the tokens lie, and among equal keys the earlier token wins; where many groups have equal peaks, only time is lost.

Shape letters: N tokens, K experts per token, E experts, A = N·K + S assignments, S rescue slots, R = A rows, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEAD = 8192  #: keys that a program keeps in registers, at most; it reads the others again for every bit
BLOCK = 2048  #: keys that are put in order at a time, at most


@triton.jit
def _liking_kernel(
    probs, expert, valid, chosen, keys, peaks, n_tokens, groups, floor,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, HAS_VALID: tl.constexpr, TILE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Keys ``[E, N]`` in the order of preference: real tokens by the bits of their probability, padding below them, -1
    for those that chose the expert already; and peaks ``[E, G]``. Nothing is written when no expert misses a token."""
    e = tl.arange(0, EP)
    if tl.min(tl.load(chosen + e, mask=e < E, other=floor), 0) < floor:
        n = tl.program_id(0) * TILE + tl.arange(0, TILE)
        there = n < n_tokens
        mask = there[:, None] & (e < E)[None, :]
        p = tl.load(probs + n[:, None].to(tl.int64) * E + e[None, :], mask=mask, other=0.0)
        key = tl.minimum(p.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x3F800000)  # NaN counts as 1
        if HAS_VALID:
            key += tl.where(tl.load(valid + n, mask=there, other=0) != 0, 0x40000000, 0)[:, None]
        else:
            key += 0x40000000
        key = tl.where(there[:, None], key, -1)
        for k in tl.static_range(K):
            mine = tl.load(expert + n * K + k, mask=there, other=-1)
            key = tl.where(mine[:, None] == e[None, :], -1, key)
        row = e[None, :].to(tl.int64)
        tl.store(keys + row * n_tokens + n[:, None], key, mask=mask)
        g = tl.program_id(0) * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
        peak = tl.max(tl.reshape(key, (TILE // GROUP, GROUP, EP)), 1)
        tl.store(peaks + row * groups + g[:, None], peak, mask=(g < groups)[:, None] & (e < E)[None, :])


@triton.jit
def _key(keys, near, i, total, n_keys, GROUP: tl.constexpr):
    """The i-th of ``total`` keys, and its place: in the groups that ``near`` lists, or if ``GROUP`` is 0 among all."""
    place = i
    if GROUP:
        place = tl.load(near + i // GROUP, mask=i < total, other=0) * GROUP + i % GROUP
    return tl.load(keys + place, mask=(i < total) & (place < n_keys), other=-1), place


@triton.jit
def _bound(keys, near, total, n_keys, missing, GROUP: tl.constexpr, HEAD: tl.constexpr):
    """The greatest number that at least ``missing`` keys reach, bit by bit, 0 if so many do not; how many exceed it."""
    i = tl.arange(0, HEAD)
    head, _ = _key(keys, near, i, total, n_keys, GROUP)
    bound, count = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    # 31 bits; the last round finds nothing greater, and so counts what exceeds the bound
    for bit in range(32):
        goal = bound + (1 << tl.maximum(30 - bit, 0))
        reach = (head >= goal).to(tl.int32)
        for at in range(HEAD, total, HEAD):
            key, _ = _key(keys, near, at + i, total, n_keys, GROUP)
            reach += (key >= goal).to(tl.int32)
        count = tl.sum(reach, 0)
        bound = tl.where(count >= missing, goal, bound)
    return bound, count


@triton.jit
def _near_kernel(peaks, chosen, near, nears, groups, floor, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """The groups of an expert that may hold one of its tokens, in their order: ``near[e, : nears[e]]``."""
    e = tl.program_id(0)
    missing = floor - tl.load(chosen + e)
    if missing > 0:
        mine = e.to(tl.int64) * groups
        bound, _ = _bound(peaks + mine, near, groups, groups, missing, 0, HEAD)
        count = 0
        for at in range(0, groups, BLOCK):
            g = at + tl.arange(0, BLOCK)
            take = (tl.load(peaks + mine + g, mask=g < groups, other=-1) >= bound).to(tl.int32)
            tl.store(near + mine + count + tl.cumsum(take, 0) - 1, g, mask=take > 0)
            count += tl.sum(take, 0)
        tl.store(nears + e, count)


@triton.jit
def _rescue_kernel(
    keys, near, nears, chosen, ends, row, assignment, token, rescued, n_tokens, groups, floor,
    K: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The missing tokens of an expert, into its first slots and its last rows; -1 into the slots that are left."""
    e = tl.program_id(0)
    missing = floor - tl.load(chosen + e)
    done = tl.zeros((), tl.int32)
    if missing > 0:
        mine, groups_of = keys + e.to(tl.int64) * n_tokens, near + e.to(tl.int64) * groups
        total = tl.load(nears + e) * GROUP
        bound, above = _bound(mine, groups_of, total, n_tokens, missing, GROUP, HEAD)
        tied = 0
        start = tl.load(ends + e) - missing
        for at in range(0, total, BLOCK):
            key, n = _key(mine, groups_of, at + tl.arange(0, BLOCK), total, n_tokens, GROUP)
            tie = (key == bound).to(tl.int32)
            take = ((key > bound) | ((tie > 0) & (tied + tl.cumsum(tie, 0) <= missing - above))).to(tl.int32)
            s = done + tl.cumsum(take, 0) - 1
            tl.store(rescued + e * floor + s, n, mask=take > 0)
            tl.store(row + n_tokens * K + e * floor + s, start + s, mask=take > 0)
            tl.store(assignment + start + s, n_tokens * K + e * floor + s, mask=take > 0)
            tl.store(token + start + s, n, mask=take > 0)
            done += tl.sum(take, 0)
            tied += tl.sum(tie, 0)
    for at in range(done, floor, BLOCK):
        s = at + tl.arange(0, BLOCK)
        tl.store(rescued + e * floor + s, -1, mask=s < floor)
        tl.store(row + n_tokens * K + e * floor + s, -1, mask=s < floor)


def rescue(
    expert_NK: Tensor, probs_NE: Tensor, valid_N: Tensor | None, floor: int, chosen_E: Tensor, ends_E: Tensor,
    row_A: Tensor, assignment_R: Tensor, token_R: Tensor, rescued_S: Tensor,
) -> None:  # fmt: skip
    """Fill ``rescued``, the rescue slots of ``row``, and those rows of ``assignment`` and ``token`` that they have.

    An expert that fewer than ``floor`` (1 to N) tokens chose gets those of the others that like it best, real ones
    first, in the order of the tokens. See ``deepseek.ops.experts.Dispatch`` for the tensors, all int32; ``probs`` are
    fp32.
    """
    tokens, top_k = expert_NK.shape
    experts = probs_NE.shape[1]
    padded = max(16, triton.next_power_of_2(experts))
    tile = max(16, min(64, 8192 // padded))
    group = min(tile, 1 << ((tokens // floor).bit_length() - 1) // 2)
    groups = triton.cdiv(tokens, group)
    keys, peaks, near = (chosen_E.new_empty(experts, size) for size in (tokens, groups, groups))
    nears = torch.empty_like(chosen_E)
    _liking_kernel[(triton.cdiv(tokens, tile),)](
        probs_NE, expert_NK, valid_N if valid_N is not None else chosen_E, chosen_E, keys, peaks, tokens, groups,
        floor, E=experts, EP=padded, K=top_k, HAS_VALID=valid_N is not None, TILE=tile, GROUP=group, num_warps=8,
    )  # fmt: skip
    head = max(16, min(HEAD, triton.next_power_of_2(groups)))
    _near_kernel[(experts,)](
        peaks, chosen_E, near, nears, groups, floor, HEAD=head, BLOCK=min(BLOCK, head), num_warps=16
    )
    head = max(16, min(HEAD, triton.next_power_of_2(min(floor * group, tokens))))
    _rescue_kernel[(experts,)](
        keys, near, nears, chosen_E, ends_E, row_A, assignment_R, token_R, rescued_S, tokens, groups, floor,
        K=top_k, GROUP=group, HEAD=head, BLOCK=min(BLOCK, head), num_warps=16,
    )  # fmt: skip
