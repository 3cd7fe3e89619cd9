"""Triton kernels of a serving step's router: logits by many programs at once, then a row's choice from them.

A router is a small product (64 experts of 1024 inputs: 262 kB) that everything after it waits for, so what counts is
the longest chain of dependent steps. ``router_logits`` cuts rows, experts and inputs into tiles that one program loads
in one go; the parts of a logit lie side by side, and whoever reads a row's logits adds them, always in the same order.
An RMSNorm before the router costs nothing: its weight goes into the product, and a row's factor, from the parts of its
sum of squares, into the sum. For a few rows ``row_logits`` has a program for every logit.

One tile shape serves every number of rows: a row's bits do not depend on the other rows.

Shape letters: N rows, E experts, K experts per row, C hidden size, S parts of the inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek.ops.triton.chain import begin, options, wait

MOST_PARTS = 16  #: of a logit
PART = 64  #: inputs of a part, more where it takes to stay within ``MOST_PARTS``


class Logits(NamedTuple):
    """What ``router_logits`` leaves: ``parts [N, S, E]``, and with a norm ``squares [N, S]``; fp32."""

    parts: Tensor
    squares: Tensor | None


@triton.jit
def _logits_kernel(
    x, weight, scale, logits, squares, n_rows, hidden,
    E: tl.constexpr, S: tl.constexpr, PART: tl.constexpr, NORM: tl.constexpr,
    BN: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    begin(CHAIN)
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    part = tl.program_id(2)
    i = tl.arange(0, BC)
    c = part * PART + i
    there = (i < PART) & (c < hidden)
    row = weight + e[None, :] * hidden + c[:, None]
    w = tl.load(row, mask=(e < E)[None, :] & there[:, None], other=0.0)
    if NORM:
        s = tl.load(scale + c, mask=there, other=0.0).to(tl.float32)
        square = tl.zeros((BN,), dtype=tl.float32)
    wait(CHAIN)
    y = tl.zeros((BN, BE), dtype=tl.float32)
    for start in range(0, PART, BC):
        v = tl.load(x + n[:, None] * hidden + (start + c)[None, :], mask=(n < n_rows)[:, None] & there[None, :],
                    other=0.0).to(tl.float32)  # fmt: skip
        if NORM:
            square += tl.sum(v * v, 1)
            v *= s[None, :]
        y = tl.dot(v, w, y, input_precision="tf32x3")
        there = (start + BC + i < PART) & (start + BC + c < hidden)
        w = tl.load(row + start + BC, mask=(e < E)[None, :] & there[:, None], other=0.0)
        if NORM:
            s = tl.load(scale + start + BC + c, mask=there, other=0.0).to(tl.float32)
    if NORM and tl.program_id(1) == 0:
        tl.store(squares + n * S + part, square, mask=n < n_rows)
    tl.store(
        logits + (n[:, None] * S + part) * E + e[None, :], y, mask=(n < n_rows)[:, None] & (e < E)[None, :]
    )


@triton.jit
def _row_logits_kernel(
    x, weight, scale, logits, out, hidden, eps,
    E: tl.constexpr, NORM: tl.constexpr, OWN: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Row n's logit e; with a norm, also the e-th ``OWN`` features of the row after it."""
    begin(CHAIN)
    n = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1)
    c = tl.arange(0, BC)
    w = tl.load(weight + e * hidden + c, mask=c < hidden, other=0.0)
    if NORM:
        s = tl.load(scale + c, mask=c < hidden, other=0.0).to(tl.float32)
        o = e * OWN + tl.arange(0, BO)
        mine = (tl.arange(0, BO) < OWN) & (o < hidden)
        shape = tl.load(scale + o, mask=mine, other=0.0).to(tl.float32)
    wait(CHAIN)
    if NORM:
        shape *= tl.load(x + n * hidden + o, mask=mine, other=0.0).to(tl.float32)
    total = tl.zeros((BC,), dtype=tl.float32)
    square = tl.zeros((BC,), dtype=tl.float32)
    for start in range(0, hidden, BC):
        v = tl.load(x + n * hidden + start + c, mask=start + c < hidden, other=0.0).to(tl.float32)
        later = start + BC + c < hidden
        if NORM:
            square += v * v
            v *= s
            s = tl.load(scale + start + BC + c, mask=later, other=0.0).to(tl.float32)
        total += v * w
        w = tl.load(weight + e * hidden + start + BC + c, mask=later, other=0.0)
    y = tl.sum(total, 0)
    if NORM:
        factor = 1 / tl.sqrt(tl.sum(square, 0) / hidden + eps)
        y *= factor
        tl.store(out + n * hidden + o, (shape * factor).to(out.dtype.element_ty), mask=mine)
    tl.store(logits + n * E + e, y)


def router_logits(x_NC: Tensor, router_EC: Tensor, norm: tuple[Tensor, float] | None = None) -> Logits:
    """Products of rows with the router's weight (fp32), in parts.

    Args:
        norm: the weight ``[C]`` and epsilon of an RMSNorm that ``x`` goes through first.
    """
    rows, hidden = x_NC.shape
    experts = router_EC.shape[0]
    parts = min(MOST_PARTS, triton.cdiv(hidden, PART))
    part = triton.cdiv(triton.cdiv(hidden, parts), 16) * 16
    logits = torch.empty(rows, parts, experts, device=x_NC.device, dtype=torch.float32)
    squares = None if norm is None else logits.new_empty(rows, parts)
    _logits_kernel[(triton.cdiv(rows, 16), triton.cdiv(experts, 16), parts)](
        x_NC, router_EC, norm and norm[0], logits, squares, rows, hidden,
        E=experts, S=parts, PART=part, NORM=norm is not None, BN=16, BE=16,
        BC=min(128, triton.next_power_of_2(part)), num_warps=2, num_stages=1, **options(x_NC.device),
    )  # fmt: skip
    return Logits(logits, squares)


def row_logits(
    x_NC: Tensor, router_EC: Tensor, norm: tuple[Tensor, float] | None = None
) -> tuple[Logits, Tensor]:
    """Logits of a few rows, each by a program of its own and in one part, and the rows themselves, after ``norm``."""
    rows, hidden = x_NC.shape
    experts = router_EC.shape[0]
    logits = torch.empty(rows, 1, experts, device=x_NC.device, dtype=torch.float32)
    out = x_NC if norm is None else torch.empty_like(x_NC)
    scale, eps = norm or (None, 0.0)
    block, own = min(2048, triton.next_power_of_2(hidden)), triton.cdiv(hidden, experts)
    _row_logits_kernel[(rows, experts)](
        x_NC, router_EC, scale, logits, out, hidden, eps,
        E=experts, NORM=norm is not None, OWN=own, BO=triton.next_power_of_2(own), BC=block,
        num_warps=max(1, block // 1024), **options(x_NC.device),
    )  # fmt: skip
    return Logits(logits, None), out


@triton.jit
def shrink(squares, n, hidden, eps, S: tl.constexpr, SP: tl.constexpr):
    """The factor of row n's RMSNorm."""
    s = tl.arange(0, SP)
    parts = tl.load(squares + n * S + s, mask=s < S, other=0.0, cache_modifier=".cg")
    return 1 / tl.sqrt(tl.sum(parts, 0) / hidden + eps)


@triton.jit
def choose(
    logits, squares, shift, n, hidden, eps,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    NORMALISE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The experts of row n and their gates, ``[KP]``: top-k of probability plus bias (``shift [EP]``), of equals the
    first."""
    e = tl.arange(0, EP)
    s = tl.arange(0, SP)
    scores = tl.load(logits + (n * S + s[:, None]) * E + e[None, :], mask=(s < S)[:, None] & (e < E)[None, :],
                     other=0.0, cache_modifier=".cg")  # fmt: skip
    scores = tl.sum(scores, 0)
    if NORM:
        scores *= shrink(squares, n, hidden, eps, S, SP)
    scores = tl.where(e < E, scores, float("-inf"))
    scores = tl.exp(scores - tl.max(scores, 0))
    p = scores / tl.sum(scores, 0)
    left = tl.where(e < E, p + shift, float("-inf"))
    k = tl.arange(0, KP)
    chosen = tl.zeros((KP,), dtype=tl.int32)
    gates = tl.zeros((KP,), dtype=tl.float32)
    for i in tl.static_range(K):
        # Of NaN, argmax may say any column, of the padding too: an expert that does not exist would read anywhere.
        best = tl.minimum(tl.argmax(left, 0).to(tl.int32), E - 1)
        chosen = tl.where(k == i, best, chosen)
        gates = tl.where(k == i, tl.sum(tl.where(e == best, p, 0.0), 0), gates)
        left = tl.where(e == best, float("-inf"), left)
    if NORMALISE:
        gates = gates / tl.sum(gates, 0)
    return chosen, gates


@triton.jit
def _choose_kernel(
    x, scale, bias, logits, squares, expert, gate, out, hidden, eps,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    NORMALISE: tl.constexpr, NORM: tl.constexpr, BC: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    begin(CHAIN)
    n = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EP)
    shift = tl.load(bias + e, mask=e < E, other=0.0)
    wait(CHAIN)
    chosen, gates = choose(logits, squares, shift, n, hidden, eps, E, EP, K, KP, S, SP, NORMALISE, NORM)
    k = tl.arange(0, KP)
    tl.store(expert + n * K + k, chosen, mask=k < K)
    tl.store(gate + n * K + k, gates, mask=k < K)
    if NORM:
        factor = shrink(squares, n, hidden, eps, S, SP)
        for start in range(0, hidden, BC):
            c = start + tl.arange(0, BC)
            v = tl.load(x + n * hidden + c, mask=c < hidden, other=0.0).to(tl.float32) * factor
            v *= tl.load(scale + c, mask=c < hidden, other=0.0).to(tl.float32)
            tl.store(out + n * hidden + c, v.to(out.dtype.element_ty), mask=c < hidden)


def sizes(logits: Logits, top_k: int) -> dict[str, int]:
    """The constants of ``choose`` that say how much there is of what, and as a power of two."""
    _, parts, experts = logits.parts.shape
    pad = triton.next_power_of_2
    return {
        "E": experts, "EP": pad(experts), "K": top_k, "KP": pad(top_k), "S": parts, "SP": pad(parts),
    }  # fmt: skip


def route_rows(
    x_NC: Tensor,
    router_EC: Tensor,
    bias_E: Tensor,
    top_k: int,
    normalise: bool,
    norm: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every row's experts ``[N, K]`` (int32) and gates ``[N, K]`` (fp32), and the rows themselves, after ``norm``.

    Args:
        norm: the weight ``[C]`` and epsilon of an RMSNorm that ``x`` goes through first.
    """
    rows, hidden = x_NC.shape
    logits = router_logits(x_NC, router_EC, norm)
    expert = torch.empty(rows, top_k, device=x_NC.device, dtype=torch.int32)
    gate = torch.empty(rows, top_k, device=x_NC.device, dtype=torch.float32)
    out = x_NC if norm is None else torch.empty_like(x_NC)
    scale, eps = norm or (None, 0.0)
    constants = sizes(logits, top_k)
    warps = max(1, min(8, constants["SP"] * constants["EP"] // 1024))
    _choose_kernel[(rows,)](
        x_NC, scale, bias_E, logits.parts, logits.squares, expert, gate, out, hidden, eps,
        **constants, NORMALISE=normalise, NORM=norm is not None,
        BC=min(512 * warps, triton.next_power_of_2(hidden)), num_warps=warps, **options(x_NC.device),
    )  # fmt: skip
    return expert, gate, out
