"""Triton kernels of the expert path: route, sort, gather, SwiGLU with the gate folded in, sum back.

Everything here is bound by memory, so each kernel reads and writes a tensor once. Sizes that depend on the data stay on
the device: rows beyond ``ends[-1]`` are skipped, never computed, so that shapes are static and the host never waits.

Shape letters: N tokens, K experts per token, E experts, A = N·K + S assignments, S rescue slots, R = A rows, D hidden
size, F expert size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek.ops.triton.rescue import rescue


def _divisor(size: int, most: int, least: int = 64) -> int:
    """The largest power of two that divides ``size``, between ``least`` and ``most``."""
    return max(least, min(most, size & -size))


# --- router ---------------------------------------------------------------------------------------------------------


@triton.jit
def _split_kernel(weight, parts, n, BLOCK: tl.constexpr):
    """fp32 numbers as sums of three of bf16, which hold all their bits."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(weight + i, mask=i < n, other=0.0)
    for part in tl.static_range(3):
        piece = left.to(tl.bfloat16)
        tl.store(parts + part * n + i, piece, mask=i < n)
        left -= piece.to(tl.float32)


@triton.jit
def _router_kernel(
    x, weight, bias, probs, expert, gate, n_tokens, hidden,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, NORMALISE: tl.constexpr,
    PARTS: tl.constexpr, NARROW: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``PARTS`` 3: the weight is split, and each part is multiplied as bf16, which for tokens in bf16 is exact (not
    ``NARROW``: as fp32, for the interpreter, which multiplies bf16 wrongly); 1: each fp32 product is three in tf32."""
    token = tl.program_id(0) * BN + tl.arange(0, BN)
    e = tl.arange(0, EP)
    there = token < n_tokens
    scores = tl.zeros((BN, EP), dtype=tl.float32)
    for start in range(0, hidden, BD):
        d = start + tl.arange(0, BD)
        a = tl.load(x + token[:, None].to(tl.int64) * hidden + d[None, :],
                    mask=there[:, None] & (d < hidden)[None, :], other=0.0)  # fmt: skip
        for part in tl.static_range(PARTS):
            b = tl.load(weight + part * E * hidden + e[None, :] * hidden + d[:, None],
                        mask=(e < E)[None, :] & (d < hidden)[:, None], other=0.0)  # fmt: skip
            if NARROW:
                scores = tl.dot(a, b, scores)
            else:
                scores += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    scores = tl.where((e < E)[None, :], scores, float("-inf"))
    scores = tl.exp(scores - tl.max(scores, 1)[:, None])
    p = scores / tl.sum(scores, 1)[:, None]
    tl.store(probs + token[:, None].to(tl.int64) * E + e[None, :], p, mask=there[:, None] & (e < E)[None, :])
    left = tl.where((e < E)[None, :], p + tl.load(bias + e, mask=e < E, other=0.0)[None, :], float("-inf"))
    k = tl.arange(0, KP)
    chosen = tl.zeros((BN, KP), dtype=tl.int32)
    gates = tl.zeros((BN, KP), dtype=tl.float32)
    for i in tl.static_range(K):
        # Of NaN, argmax may say any column, of the padding too: an expert that does not exist would write anywhere.
        best = tl.minimum(tl.argmax(left, 1).to(tl.int32), E - 1)
        taken = e[None, :] == best[:, None]
        chosen = tl.where((k == i)[None, :], best[:, None], chosen)
        gates = tl.where((k == i)[None, :], tl.sum(tl.where(taken, p, 0.0), 1)[:, None], gates)
        left = tl.where(taken, float("-inf"), left)
    if NORMALISE:
        gates = gates / tl.sum(gates, 1)[:, None]
    at = token[:, None] * K + k[None, :]
    mask = there[:, None] & (k < K)[None, :]
    tl.store(expert + at, chosen, mask=mask)
    tl.store(gate + at, gates, mask=mask)


def _split(weight: Tensor) -> Tensor:
    """``[3, E, D]`` in bf16, whose sum is ``weight``."""
    parts, n = weight.new_empty(3, *weight.shape, dtype=torch.bfloat16), weight.numel()
    _split_kernel[(triton.cdiv(n, 1024),)](weight.contiguous(), parts, n, BLOCK=1024, num_warps=4)
    return parts


def router(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (fp32 product), softmax, top-k of ``p + bias`` and gates in one pass over ``x [N, D]``."""
    tokens, hidden = x.shape
    experts = weight.shape[0]
    probs = torch.empty(tokens, experts, device=x.device, dtype=torch.float32)
    expert = torch.empty(tokens, top_k, device=x.device, dtype=torch.int32)
    gate = torch.empty(tokens, top_k, device=x.device, dtype=torch.float32)
    padded = max(16, triton.next_power_of_2(experts))
    parts, rows = 1, 64 if padded <= 64 else 32
    depth = min(64, max(16, triton.next_power_of_2(hidden)))
    if x.dtype == torch.bfloat16 and weight.dtype == torch.float32 and padded <= 128:
        # With more experts three parts need more shared memory than a GPU has, and registers than a thread.
        parts, rows, weight = 3, 2 * rows, _split(weight)
        depth = min(depth, 4096 // padded)
    _router_kernel[(triton.cdiv(tokens, rows),)](
        x, weight, bias, probs, expert, gate, tokens, hidden,
        E=experts, EP=padded, K=top_k, KP=triton.next_power_of_2(top_k),
        NORMALISE=normalise, PARTS=parts, NARROW=parts > 1 and x.is_cuda, BN=rows, BD=depth,
        num_warps=8 if rows > 64 else 4, num_stages=2 if parts > 1 else 3,
    )  # fmt: skip
    return probs, expert, gate


# --- sort: counting sort by expert, stable --------------------------------------------------------------------------


@triton.jit
def _count_kernel(expert, counts, n, blocks, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0)
    a = b * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, EP)
    mine = tl.load(expert + a, mask=a < n, other=EP)
    hit = (mine[:, None] == e[None, :]).to(tl.int32)
    tl.store(counts + e * blocks + b, tl.sum(hit, 0), mask=e < E)


@triton.jit
def _offsets_kernel(
    counts, chosen, first, ends, blocks, floor, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr
):
    """One program an expert: where its rows end, and the first row of each block's assignments to it."""
    e = tl.program_id(0)
    other = tl.arange(0, EP)
    rows = tl.maximum(tl.load(chosen + other, mask=other < E, other=0), floor)
    start = tl.sum(tl.where(other < e, rows, 0), 0)
    tl.store(ends + e, tl.sum(tl.where(other <= e, rows, 0), 0))
    for at in range(0, blocks, BLOCK):
        b = at + tl.arange(0, BLOCK)
        count = tl.load(counts + e * blocks + b, mask=b < blocks, other=0)
        tl.store(first + e * blocks + b, start + tl.cumsum(count, 0) - count, mask=b < blocks)
        start += tl.sum(count, 0)


@triton.jit
def _place_kernel(
    expert, first, row, assignment, token, n, blocks, K: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr
):
    b = tl.program_id(0)
    a = b * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, EP)
    mine = tl.load(expert + a, mask=a < n, other=EP)
    hit = (mine[:, None] == e[None, :]).to(tl.int32)
    rank = tl.sum(hit * tl.cumsum(hit, 0), 1) - 1
    place = tl.load(first + mine * blocks + b, mask=a < n, other=0) + rank
    tl.store(row + a, place, mask=a < n)
    tl.store(assignment + place, a, mask=a < n)
    tl.store(token + place, a // K, mask=a < n)


def dispatch(
    expert_NK: Tensor, probs_NE: Tensor, valid_N: Tensor | None, floor: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``deepseek.ops.experts.dispatch``; two small passes over the assignments, none over the tokens' features."""
    top_k, experts, device, n = expert_NK.shape[1], probs_NE.shape[1], expert_NK.device, expert_NK.numel()
    slots = experts * floor
    padded = max(16, triton.next_power_of_2(experts))
    block = max(16, min(256, 16384 // padded))
    blocks = triton.cdiv(n, block)
    counts = torch.empty(experts, blocks, device=device, dtype=torch.int32)
    _count_kernel[(blocks,)](expert_NK, counts, n, blocks, E=experts, EP=padded, BLOCK=block)
    chosen = counts.sum(1, dtype=torch.int32)
    first, ends = torch.empty_like(counts), torch.empty_like(chosen)
    _offsets_kernel[(experts,)](
        counts, chosen, first, ends, blocks, floor,
        E=experts, EP=padded, BLOCK=max(16, min(1024, triton.next_power_of_2(blocks))),
    )  # fmt: skip
    row = torch.empty(n + slots, device=device, dtype=torch.int32)
    assignment = torch.zeros(n + slots, device=device, dtype=torch.int32)
    token = torch.zeros(n + slots, device=device, dtype=torch.int32)
    rescued = torch.empty(slots, device=device, dtype=torch.int32)
    _place_kernel[(blocks,)](
        expert_NK, first, row, assignment, token, n, blocks, K=top_k, EP=padded, BLOCK=block
    )  # fmt: skip
    if floor:
        rescue(expert_NK, probs_NE, valid_N, floor, chosen, ends, row, assignment, token, rescued)
    return row, token, assignment, ends, chosen, rescued


# --- rows -----------------------------------------------------------------------------------------------------------


@triton.jit
def _gather_kernel(x, token, ends, out, hidden, E: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    total = tl.load(ends + E - 1)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    if tl.program_id(0) * BR < total:
        there = (r < total)[:, None]
        source = tl.load(token + r, mask=r < total, other=0).to(tl.int64)
        for start in range(0, hidden, BD):
            d = start + tl.arange(0, BD)
            mask = there & (d < hidden)[None, :]
            value = tl.load(x + source[:, None] * hidden + d[None, :], mask=mask)
            tl.store(out + r[:, None].to(tl.int64) * hidden + d[None, :], value, mask=mask)


def gather(x_ND: Tensor, token_R: Tensor, ends_E: Tensor) -> Tensor:
    """``x[token_R]`` for the rows in use; the others stay unwritten."""
    hidden = x_ND.shape[1]
    out = x_ND.new_empty(token_R.shape[0], hidden)
    rows = 8
    _gather_kernel[(triton.cdiv(out.shape[0], rows),)](
        x_ND, token_R, ends_E, out, hidden, E=ends_E.shape[0], BR=rows, BD=_divisor(hidden, 512), num_warps=4
    )
    return out


@triton.jit
def _sum_kernel(
    y, row, gate, out, n_tokens, hidden,
    K: tl.constexpr, GATED: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    there = n < n_tokens
    for start in range(0, hidden, BD):
        d = start + tl.arange(0, BD)
        mask = there[:, None] & (d < hidden)[None, :]
        total = tl.zeros((BN, BD), dtype=tl.float32)
        for k in tl.static_range(K):
            source = tl.load(row + n * K + k, mask=there, other=0).to(tl.int64)
            value = tl.load(y + source[:, None] * hidden + d[None, :], mask=mask, other=0.0).to(tl.float32)
            if GATED:
                value *= tl.load(gate + n * K + k, mask=there, other=0.0).to(tl.float32)[:, None]
            total += value
        at = out + n[:, None].to(tl.int64) * hidden + d[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum_rescued_kernel(
    y, row, gate, rescued, out, slots, hidden, GATED: tl.constexpr, SB: tl.constexpr, BD: tl.constexpr
):
    for i in range(SB):
        s = tl.program_id(0) * SB + i
        token = tl.load(rescued + s, mask=s < slots, other=-1).to(tl.int64)
        if token >= 0:
            source = tl.load(row + s).to(tl.int64)
            for start in range(0, hidden, BD):
                d = start + tl.arange(0, BD)
                value = tl.load(y + source * hidden + d, mask=d < hidden, other=0.0).to(tl.float32)
                if GATED:
                    value *= tl.load(gate + s).to(tl.float32)
                tl.atomic_add(
                    out + token * hidden + d, value.to(out.dtype.element_ty), mask=d < hidden, sem="relaxed"
                )


def sum_rows(
    y_RD: Tensor, row_A: Tensor, rescued_S: Tensor, tokens: int, top_k: int, gate_A: Tensor | None = None
) -> Tensor:
    """``out[n] = Σ gate · y[row]`` over token n's assignments, added up in fp32 (rescued ones in the output's dtype);
    without gates as if all were 1."""
    hidden, slots = y_RD.shape[1], rescued_S.shape[0]
    out = y_RD.new_empty(tokens, hidden)
    block = _divisor(hidden, 512)
    rows = 8
    gated, gate = gate_A is not None, row_A if gate_A is None else gate_A
    _sum_kernel[(triton.cdiv(tokens, rows),)](
        y_RD, row_A, gate, out, tokens, hidden, K=top_k, GATED=gated, BN=rows, BD=block, num_warps=4
    )
    if slots:
        _sum_rescued_kernel[(triton.cdiv(slots, 16),)](
            y_RD, row_A[tokens * top_k :], gate[tokens * top_k :], rescued_S, out, slots, hidden,
            GATED=gated, SB=16, BD=block, num_warps=4,
        )  # fmt: skip
    return out


# --- SwiGLU ---------------------------------------------------------------------------------------------------------


@triton.jit
def _swiglu_kernel(
    h, gate, assignment, ends, out, inner, E: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr
):
    total = tl.load(ends + E - 1)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    if tl.program_id(0) * BR < total:
        there = r < total
        g = tl.load(gate + tl.load(assignment + r, mask=there, other=0), mask=there, other=0.0)[:, None]
        row = r[:, None].to(tl.int64)
        for start in range(0, inner, BF):
            f = (start + tl.arange(0, BF))[None, :]
            mask = there[:, None] & (f < inner)
            a = tl.load(h + row * 2 * inner + f, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(h + row * 2 * inner + inner + f, mask=mask, other=0.0).to(tl.float32)
            value = g * b * a / (1 + tl.exp(-a))
            tl.store(out + row * inner + f, value.to(out.dtype.element_ty), mask=mask)


def swiglu(h_RF2: Tensor, gate_A: Tensor, assignment_R: Tensor, ends_E: Tensor) -> Tensor:
    """``gate · silu(a) · b`` of ``[a, b] = h [R, 2F]``."""
    inner = h_RF2.shape[1] // 2
    out = h_RF2.new_empty(h_RF2.shape[0], inner)
    rows = 8
    _swiglu_kernel[(triton.cdiv(out.shape[0], rows),)](
        h_RF2,
        gate_A,
        assignment_R,
        ends_E,
        out,
        inner,
        E=ends_E.shape[0],
        BR=rows,
        BF=_divisor(inner, 512),
        num_warps=4,
    )
    return out


@triton.jit
def _swiglu_backward_kernel(
    h,
    gate,
    assignment,
    ends,
    d_out,
    d_h,
    out,
    d_gate,
    inner,
    E: tl.constexpr,
    BR: tl.constexpr,
    BF: tl.constexpr,
):
    total = tl.load(ends + E - 1)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    if tl.program_id(0) * BR < total:
        there = r < total
        a_of_r = tl.load(assignment + r, mask=there, other=0)
        g = tl.load(gate + a_of_r, mask=there, other=0.0)[:, None]
        row = r[:, None].to(tl.int64)
        slope = tl.zeros((BR,), dtype=tl.float32)
        for start in range(0, inner, BF):
            f = (start + tl.arange(0, BF))[None, :]
            mask = there[:, None] & (f < inner)
            a = tl.load(h + row * 2 * inner + f, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(h + row * 2 * inner + inner + f, mask=mask, other=0.0).to(tl.float32)
            d = tl.load(d_out + row * inner + f, mask=mask, other=0.0).to(tl.float32)
            s = 1 / (1 + tl.exp(-a))
            y = a * s * b
            slope += tl.sum(d * y, 1)
            d = d * g
            tl.store(out + row * inner + f, (g * y).to(out.dtype.element_ty), mask=mask)
            d_a = d * b * s * (1 + a * (1 - s))
            tl.store(d_h + row * 2 * inner + f, d_a.to(d_h.dtype.element_ty), mask=mask)
            tl.store(d_h + row * 2 * inner + inner + f, (d * a * s).to(d_h.dtype.element_ty), mask=mask)
        tl.store(d_gate + a_of_r, slope, mask=there)


def swiglu_backward(
    h_RF2: Tensor, gate_A: Tensor, assignment_R: Tensor, ends_E: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``swiglu`` for ``h`` and the gates, and its value again: one pass."""
    inner = h_RF2.shape[1] // 2
    d_h, out, d_gate = torch.empty_like(h_RF2), torch.empty_like(d_out), torch.zeros_like(gate_A)
    rows = 8
    _swiglu_backward_kernel[(triton.cdiv(out.shape[0], rows),)](
        h_RF2, gate_A, assignment_R, ends_E, d_out, d_h, out, d_gate, inner,
        E=ends_E.shape[0], BR=rows, BF=_divisor(inner, 256), num_warps=4,
    )  # fmt: skip
    return d_h, out, d_gate


@triton.jit
def _sample_kernel(
    h, ends, out, inner, step, apart, SAMPLE: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr
):
    e = tl.program_id(0)
    f = (tl.program_id(1) * BF + tl.arange(0, BF))[None, :]
    start = tl.load(ends + e - 1, mask=e > 0, other=0)
    count = tl.load(ends + e) - start
    taken = tl.minimum(count, SAMPLE)
    total = tl.zeros((1, BF), dtype=tl.float32)
    for at in range(0, taken, BR):
        i = at + tl.arange(0, BR)
        r = (start + i * count // tl.maximum(taken, 1)).to(tl.int64)[:, None]
        mask = (i < taken)[:, None] & (f < inner)
        a = tl.load(h + r * 2 * inner + f * step, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(h + r * 2 * inner + f * step + apart, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(b * a / (1 + tl.exp(-a)), 0)[None, :]
    tl.store(out + e * inner + f, total, mask=f < inner)


def sample_hidden(hidden: Tensor, ends_E: Tensor, sample: int) -> Tensor:
    """Sum of ``silu(a)·b`` over at most ``sample`` evenly spaced rows of every expert: fp32 ``[E, F]``.

    ``hidden``: ``[a, b]`` side by side ``[R, 2F]``, or as neighbours ``[R, F, 2]``.
    """
    inner, experts = hidden.shape[1] if hidden.dim() == 3 else hidden.shape[1] // 2, ends_E.shape[0]
    step, apart = (2, 1) if hidden.dim() == 3 else (1, inner)
    out = torch.empty(experts, inner, device=hidden.device, dtype=torch.float32)
    block = _divisor(inner, 128)
    _sample_kernel[(experts, triton.cdiv(inner, block))](
        hidden, ends_E, out, inner, step, apart, SAMPLE=sample, BR=32, BF=block, num_warps=4
    )
    return out


# --- gate and up as neighbours --------------------------------------------------------------------------------------


@triton.jit
def _pair_kernel(w, out, n, half, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Places of a row of ``2 · half`` numbers: (i, half + i) to (2i, 2i + 1), or back."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    a = i + i // half * half
    if REVERSE:
        both = tl.load(w + wide, mask=wide < 2 * n, other=0.0)
        first, second = tl.split(tl.reshape(both, (BLOCK, 2)))
        tl.store(out + a, first, mask=i < n)
        tl.store(out + a + half, second, mask=i < n)
    else:
        first, second = tl.load(w + a, mask=i < n, other=0.0), tl.load(w + a + half, mask=i < n, other=0.0)
        tl.store(out + wide, tl.interleave(first, second), mask=wide < 2 * n)


def pair(w: Tensor) -> Tensor:
    """``[…, 2F]``, halves side by side → the same numbers with those of one place as neighbours."""
    return _paired(w, False)


def unpair(w: Tensor) -> Tensor:
    """The reverse of ``pair``."""
    return _paired(w, True)


def _paired(w: Tensor, reverse: bool) -> Tensor:
    w = w.contiguous()
    out, n = torch.empty_like(w), w.numel() // 2
    if n:
        _pair_kernel[(triton.cdiv(n, 1024),)](
            w, out, n, w.shape[-1] // 2, REVERSE=reverse, BLOCK=1024, num_warps=4
        )
    return out
