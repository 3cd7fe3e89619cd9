"""Triton kernels over the rows of a serving step: what stands between products, each one short kernel of a ``chain``.

A step has few rows, so a kernel's time is its launch and one trip to memory; torch takes two or three kernels for what
is one here, and none of them begins before the last has ended.

Shape letters: N rows, H heads, C features, F features after the activation, V vocabulary, P parts of a row.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek.ops.triton.chain import begin, options, wait

PART = 2048  #: logits that one program looks at


@triton.jit
def _enter_kernel(
    token, position, embedding, cos, sin, x, cos_out, sin_out, features, size,
    BC: tl.constexpr, BD: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    begin(CHAIN)
    wait(CHAIN)
    n = tl.program_id(0).to(tl.int64)
    c, d = tl.arange(0, BC), tl.arange(0, BD)
    t, p = tl.load(token + n), tl.load(position + n)
    row = tl.load(embedding + t * features + c, mask=c < features, other=0.0)
    tl.store(x + n * features + c, row.to(x.dtype.element_ty), mask=c < features)
    tl.store(cos_out + n * size + d, tl.load(cos + p * size + d, mask=d < size, other=0.0), mask=d < size)
    tl.store(sin_out + n * size + d, tl.load(sin + p * size + d, mask=d < size, other=0.0), mask=d < size)


def enter(
    token_N: Tensor, position_N: Tensor, embedding_VC: Tensor, rope: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What the layers begin with: embeddings ``[N, C]`` in ``dtype``, and of both tables ``[L, …]`` the rows' lines."""
    rows, features, (cos, sin) = len(token_N), embedding_VC.shape[1], rope
    x = torch.empty(rows, features, dtype=dtype, device=embedding_VC.device)
    lines = cos.new_empty(rows, *cos.shape[1:]), sin.new_empty(rows, *sin.shape[1:])
    size = cos[0].numel()
    _enter_kernel[(rows,)](
        token_N, position_N, embedding_VC, cos, sin, x, *lines, features, size,
        BC=triton.next_power_of_2(features), BD=triton.next_power_of_2(size),
        num_warps=min(8, max(1, triton.next_power_of_2(features) // 512)), **options(x.device),
    )  # fmt: skip
    return x, *lines


@triton.jit
def _rms_norm_kernel(
    x, weight, out, features, row_stride, head_stride, eps, BC: tl.constexpr, CHAIN: tl.constexpr
):  # fmt: skip
    begin(CHAIN)
    c = tl.arange(0, BC)
    inside = c < features
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    w = tl.load(weight + h * features + c, mask=inside, other=0.0).to(tl.float32)
    wait(CHAIN)
    a = tl.load(x + n * row_stride + h * head_stride + c, mask=inside, other=0.0).to(tl.float32)
    y = a * (1 / tl.sqrt(tl.sum(a * a, 0) / features + eps)) * w
    tl.store(out + (n * tl.num_programs(1) + h) * features + c, y.to(out.dtype.element_ty), mask=inside)


def rms_norm(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · weight`` of each row, fp32 inside; contiguous, in the dtype of ``x``."""
    return head_norm(x_NC[:, None], weight_C, eps)[:, 0]


def head_norm(x_NHC: Tensor, weight_HC: Tensor, eps: float) -> Tensor:
    """The same of each row's heads, each with a weight of its own; ``weight`` is contiguous."""
    x = x_NHC if x_NHC.stride(-1) == 1 else x_NHC.contiguous()
    rows, heads, features = x.shape
    out = x.new_empty(rows, heads, features)
    block = triton.next_power_of_2(features)
    _rms_norm_kernel[(rows, heads)](
        x, weight_HC, out, features, x.stride(0), x.stride(1), eps,
        BC=block, num_warps=min(16, max(1, block // 512)), **options(x.device),
    )  # fmt: skip
    return out


@triton.jit
def _swiglu_kernel(x, out, features, BF: tl.constexpr, CHAIN: tl.constexpr):
    begin(CHAIN)
    wait(CHAIN)
    n = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = f < features
    gate = tl.load(x + n * 2 * features + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + (2 * n + 1) * features + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n * features + f, (up * gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty), mask=inside)


def swiglu(x_N2F: Tensor) -> Tensor:
    """``silu(gate) · up`` of rows with gate before up, fp32 inside: ``[N, F]``."""
    x = x_N2F.contiguous()
    rows, features = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, features)
    block = min(1024, triton.next_power_of_2(features))
    _swiglu_kernel[(rows, triton.cdiv(features, block))](
        x, out, features, BF=block, num_warps=4, **options(x.device)
    )
    return out


# --- the likeliest token --------------------------------------------------------------------------------------------


@triton.jit
def _best_kernel(
    logits, best, at, vocabulary, row_stride, parts, PART: tl.constexpr, CHAIN: tl.constexpr
):  # fmt: skip
    begin(CHAIN)
    wait(CHAIN)
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = part * PART + tl.arange(0, PART)
    x = tl.load(logits + n * row_stride + v, mask=v < vocabulary, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)  # a maximum passes over what is not a number
    top = tl.max(x, 0)
    tl.store(best + n * parts + part, top)
    tl.store(at + n * parts + part, tl.min(tl.where(x == top, v, 2147483647), 0))


@triton.jit
def _token_kernel(best, at, out, parts, PP: tl.constexpr, CHAIN: tl.constexpr):
    begin(CHAIN)
    wait(CHAIN)
    n = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, PP)
    tops = tl.load(best + n * parts + p, mask=p < parts, other=float("-inf"))
    first = tl.load(at + n * parts + p, mask=p < parts, other=2147483647)
    top = tl.max(tops, 0)
    tl.store(out + 2 * n, tl.min(tl.where(tops == top, first, 2147483647), 0).to(tl.int64))
    tl.store(out + 2 * n + 1, tl.where(tl.abs(top) < float("inf"), 0, 1).to(tl.int64))


def likeliest(logits_NV: Tensor) -> Tensor:
    """int64 ``[N, 2]``: the first of each row's largest logits; 0, or 1 if that logit is not finite."""
    logits = logits_NV if logits_NV.stride(-1) == 1 else logits_NV.contiguous()
    rows, vocabulary = logits.shape
    parts = triton.cdiv(vocabulary, PART)
    best = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    at = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, 2, dtype=torch.int64, device=logits.device)
    chain = options(logits.device)
    _best_kernel[(rows, parts)](
        logits, best, at, vocabulary, logits.stride(0), parts, PART=PART, num_warps=4, **chain
    )
    _token_kernel[(rows,)](best, at, out, parts, PP=triton.next_power_of_2(parts), num_warps=1, **chain)
    return out
