"""Experts: route, sort by expert, one grouped matmul per projection, sum back (F12, F15).

The whole path is four custom operations without a data-dependent shape and without a host synchronisation, so that a
block compiles as one graph and can be captured. On CUDA their row work is done by Triton kernels, elsewhere by plain
torch (``expert_rows``). Two choices make backward cheap: the gate is folded into the expert's inner activation, so
that the outputs of the experts need not be kept; and only the first projection's output is kept, the gathered rows
and the inner activation are made again.

``grouped_linear`` has the backends ``grouped_mm`` (one call, CUDA and CPU), ``tiles`` (batched matmuls, CUDA in fp32:
``expert_tiles``) and ``loop`` (one matmul per expert: the reference, which waits for the device). Routing may be as
skewed as it likes and experts may be empty.

Shape letters: N tokens, K experts per token, E experts, A = N·K + S assignments, S rescue slots, R = A rows, D hidden
size, F expert size.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops import expert_rows, expert_tiles, fused_experts, fused_products
from deepseek.ops.triton import available, kernels
from deepseek.registry import get_op, register_op

Backend = Literal["auto", "grouped_mm", "tiles", "loop"]
FUSED = "fused"  #: in place of a backend: the whole path is ``fused_experts``


class Dispatch(NamedTuple):
    """Which row each assignment has and the reverse; all int32, all of static size.

    Attributes:
        row_A: the row of each assignment, -1 for a rescue slot that is not used.
        token_R: the token of each row. assignment_R: the assignment of each row. Rows from ``ends[-1]`` on are unused.
        ends_E: where each expert's rows end. chosen_E: how many tokens chose each expert by top-k.
        rescued_S: the token in each rescue slot (``floor`` slots an expert), -1 where none was needed.
    """

    row_A: Tensor
    token_R: Tensor
    assignment_R: Tensor
    ends_E: Tensor
    chosen_E: Tensor
    rescued_S: Tensor


def _rows(x: Tensor) -> ModuleType:
    """The kernels for ``x``'s device; they add up in fp32, so wider tensors go to plain torch."""
    fused = x.is_cuda and x.dtype != torch.float64 and available()
    return kernels("experts") if fused else expert_rows


# --- grouped matmul -------------------------------------------------------------------------------------------------


@register_op("grouped_linear", "loop")
def grouped_linear_loop(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Rows ``ends[e-1]:ends[e]`` of ``x`` times ``weight[e]``: one matmul per expert, the reference."""
    sizes = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
    parts = [rows @ w for rows, w in zip(x_RD[: sum(sizes)].split(sizes), weight_EDF)]
    return torch.cat([*parts, x_RD.new_zeros(x_RD.shape[0] - sum(sizes), weight_EDF.shape[2])])


@register_op("grouped_linear", "grouped_mm")
def grouped_linear_grouped_mm(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """The same in one ``F.grouped_mm`` call.

    The kernel wants rows of a multiple of 16 bytes; other sizes are padded with zeros here (correct, with a
    copy of the weights each time: choose expert sizes that are multiples of 8).
    """
    unit = 16 // x_RD.element_size()
    inner, outer = -x_RD.shape[1] % unit, -weight_EDF.shape[2] % unit
    if inner or outer:
        x_RD, weight_EDF = F.pad(x_RD, (0, inner)), F.pad(weight_EDF, (0, outer, 0, inner))
    y = F.grouped_mm(x_RD.contiguous(), weight_EDF, offs=ends_E)
    # The kernels of the other steps, and what compile is told, take rows that lie next to each other.
    return _ContiguousGrad.apply(y[:, : y.shape[1] - outer].contiguous() if outer else y)


@register_op("grouped_linear", "tiles")
def grouped_linear_tiles(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """The same in one batched matmul over tiles of rows: any dtype, nothing asked of the host."""
    return expert_tiles.linear(x_RD, weight_EDF, ends_E)


def grouped_linear(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor, backend: str = "auto") -> Tensor:
    """``y[r] = x[r] @ weight[e]`` for the rows r of expert e.

    Args:
        x_RD: rows sorted by expert. weight_EDF: one matrix per expert.
        ends_E: int32, where each expert's rows end; what rows beyond the last end hold afterwards is undefined.
        backend: 'auto', 'grouped_mm', 'tiles', 'loop', or one an extension registered.

    Returns:
        ``[R, F]`` in the dtype of ``x``.
    """
    return get_op("grouped_linear", pick_backend(x_RD, backend))(x_RD, weight_EDF, ends_E)


def grouped_outer(x_RD: Tensor, y_RF: Tensor, ends_E: Tensor, backend: str = "auto") -> Tensor:
    """``w[e] = x[rows of e]ᵀ @ y[rows of e]``: the weight gradient of ``grouped_linear``, ``[E, D, F]``."""
    unit, chosen = 16 // x_RD.element_size(), pick_backend(x_RD, backend)
    if chosen == "grouped_mm" and (x_RD.shape[1] % unit or y_RF.shape[1] % unit):
        chosen = "tiles" if x_RD.is_cuda else "loop"
    if chosen == "tiles":
        return expert_tiles.outer(x_RD, y_RF, ends_E)
    if chosen != "grouped_mm":
        sizes = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
        used = sum(sizes)
        return torch.stack([x.T @ y for x, y in zip(x_RD[:used].split(sizes), y_RF[:used].split(sizes))])
    return F.grouped_mm(x_RD.T, y_RF, offs=ends_E)


def pick_backend(x: Tensor, backend: str = "auto") -> str:
    """What 'auto' means for ``x``.

    The grouped kernel of a CPU takes all but fp64, CUDA's bf16 only; other dtypes go by tiles there, and other devices
    by a loop.
    """
    if backend != "auto":
        return backend
    if x.is_cuda:
        return "grouped_mm" if x.dtype == torch.bfloat16 else "tiles"
    return "grouped_mm" if x.is_cpu and x.dtype != torch.float64 else "loop"


def swiglu(x: Tensor) -> Tensor:
    """``silu(a) * b`` for ``x = [a, b]`` along the last dimension (arXiv 2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


# --- router ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("deepseek::router", mutates_args=())
def _router(
    x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor, top_k: int, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _rows(x_ND).router(x_ND.contiguous(), weight_ED, bias_E, top_k, normalise)


@_router.register_fake
def _(x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, ...]:
    n, wide = x_ND.shape[0], torch.promote_types(x_ND.dtype, torch.float32)
    return (
        x_ND.new_empty(n, weight_ED.shape[0], dtype=wide),
        x_ND.new_empty(n, top_k, dtype=torch.int32),
        x_ND.new_empty(n, top_k, dtype=wide),
    )


def _router_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, ctx.normalise = inputs
    ctx.save_for_backward(x, weight, *output)


def _router_backward(ctx: Any, d_probs: Tensor, _: Tensor, d_gate: Tensor) -> tuple[Any, ...]:
    x, weight, probs, expert, gate = ctx.saved_tensors
    if ctx.normalise:
        total = probs.gather(1, expert.long()).sum(-1, keepdim=True)
        d_gate = (d_gate - (d_gate * gate).sum(-1, keepdim=True)) / total
    d_probs = d_probs.scatter_add(1, expert.long(), d_gate)
    d_scores = (d_probs - (d_probs * probs).sum(-1, keepdim=True)) * probs
    # The tokens' gradient has the input's precision anyway; the router's own adds up in fp32.
    narrow = d_scores.to(x.dtype)
    return narrow @ weight.to(x.dtype), _wide_product(narrow.T, x, weight.dtype), None, None, None


_router.register_autograd(_router_backward, setup_context=_router_context)


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in ``dtype``, without rounding the result to the operands' dtype first where the device allows."""
    if a.dtype == dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else (a.to(dtype) @ b.to(dtype))


def route(
    x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor, top_k: int, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax router: logits in fp32 at least, top-k of ``p + bias``.

    Args:
        x_ND: tokens, any float dtype. weight_ED: fp32. bias_E: takes part in the selection only.
        normalise: the K gates of a token sum to one.

    Returns:
        ``probs [N, E]``, ``expert [N, K]`` int32, ``gate [N, K]``; differentiable through probs and gates.
    """
    return _router(x_ND, weight_ED, bias_E, top_k, normalise)


# --- dispatch -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("deepseek::dispatch", mutates_args=())
def _dispatch(
    expert_NK: Tensor, probs_NE: Tensor, valid_N: Tensor | None, floor: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _rows(expert_NK).dispatch(expert_NK, probs_NE, valid_N, floor)


@_dispatch.register_fake
def _(expert_NK: Tensor, probs_NE: Tensor, valid_N: Tensor | None, floor: int) -> tuple[Tensor, ...]:
    experts = probs_NE.shape[1]
    rows, slots = expert_NK.numel() + experts * floor, experts * floor
    return tuple(expert_NK.new_empty(n) for n in (rows, rows, rows, experts, experts, slots))


def dispatch(expert_NK: Tensor, probs_NE: Tensor, valid_N: Tensor | None = None, floor: int = 0) -> Dispatch:
    """Sort assignments by expert, stably, and give every expert at least ``floor`` tokens.

    An expert that fewer tokens chose also gets those that like it best (largest ``probs``) and did not choose it;
    padding (not ``valid``) comes last.

    Args:
        expert_NK: int32. probs_NE: fp32 or fp64 in [0, 1]. valid_N: bool. floor: at most N.
    """
    valid = None if valid_N is None else valid_N.contiguous()
    return Dispatch(*_dispatch(expert_NK, probs_NE.detach(), valid, floor))


def gates(gate_NK: Tensor, probs_NE: Tensor, where: Dispatch) -> Tensor:
    """The gate of every assignment ``[A]``: a rescued token's is its own small probability, an unused slot's is 0."""
    if not where.rescued_S.numel():
        return gate_NK.flatten()
    place = rescued_pairs(where, *probs_NE.shape)
    return torch.cat((gate_NK.flatten(), _gather_pairs(probs_NE, place)))


def rescued_pairs(where: Dispatch, tokens: int, experts: int) -> Tensor:
    """``token · E + expert`` of every rescue slot (int64 ``[S]``), N·E for one that is not used."""
    rescued = where.rescued_S.view(experts, -1)
    expert = torch.arange(experts, device=rescued.device)[:, None]
    return torch.where(rescued >= 0, rescued.long() * experts + expert, tokens * experts).flatten()


@torch.library.custom_op("deepseek::gather_pairs", mutates_args=())
def _gather_pairs(probs_NE: Tensor, place_S: Tensor) -> Tensor:
    """``probs.flatten()[place]``, 0 beyond its end."""
    return torch.where(
        place_S < probs_NE.numel(), probs_NE.flatten()[place_S.clamp(max=probs_NE.numel() - 1)], 0.0
    )


@_gather_pairs.register_fake
def _(probs_NE: Tensor, place_S: Tensor) -> Tensor:
    return probs_NE.new_empty(place_S.shape)


def _pairs_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.shape = inputs[0].shape


def _pairs_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (place,) = ctx.saved_tensors
    tokens, experts = ctx.shape
    spread = grad.new_zeros(tokens * experts + 1).scatter(0, place, grad)  # pairs are unique
    return spread[:-1].view(tokens, experts), None


_gather_pairs.register_autograd(_pairs_backward, setup_context=_pairs_context)


# --- experts --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("deepseek::experts", mutates_args=())
def _experts(
    x_ND: Tensor, gate_A: Tensor, row_A: Tensor, token_R: Tensor, assignment_R: Tensor, ends_E: Tensor,
    rescued_S: Tensor, w_in_EDF2: Tensor, w_out_EFD: Tensor, top_k: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = _rows(x_ND)
    if backend == FUSED:
        return fused_experts.forward(
            rows, x_ND, gate_A, row_A, token_R, ends_E, rescued_S, w_in_EDF2, w_out_EFD, top_k
        )
    hidden = grouped_linear(rows.gather(x_ND, token_R, ends_E), w_in_EDF2, ends_E, backend)
    inner = rows.swiglu(hidden, gate_A, assignment_R, ends_E)
    y = grouped_linear(inner, w_out_EFD, ends_E, backend)
    return rows.sum_rows(y, row_A, rescued_S, x_ND.shape[0], top_k), hidden


@_experts.register_fake
def _(
    x_ND: Tensor, gate_A: Tensor, row_A: Tensor, token_R: Tensor, assignment_R: Tensor, ends_E: Tensor,
    rescued_S: Tensor, w_in_EDF2: Tensor, w_out_EFD: Tensor, top_k: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = w_in_EDF2.shape[2]
    shape = (wide // 2, 2) if backend == FUSED else (wide,)
    return torch.empty_like(x_ND), x_ND.new_empty(token_R.shape[0], *shape)


@torch.library.custom_op("deepseek::experts_backward", mutates_args=())
def _experts_backward(
    d_out: Tensor, x_ND: Tensor, gate_A: Tensor, row_A: Tensor, token_R: Tensor, assignment_R: Tensor,
    ends_E: Tensor, rescued_S: Tensor, w_in_EDF2: Tensor, w_out_EFD: Tensor, hidden_RF2: Tensor,
    top_k: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = _rows(x_ND)
    if backend == FUSED:
        return fused_experts.backward(
            rows, d_out.contiguous(), x_ND, gate_A, row_A, token_R, assignment_R, ends_E, rescued_S, w_in_EDF2,
            w_out_EFD, hidden_RF2, top_k,
        )  # fmt: skip
    d_y = rows.gather(d_out.contiguous(), token_R, ends_E)
    d_inner = grouped_linear(d_y, w_out_EFD.mT, ends_E, backend)
    d_hidden, inner, d_gate = rows.swiglu_backward(hidden_RF2, gate_A, assignment_R, ends_E, d_inner)
    d_w_out = grouped_outer(inner, d_y, ends_E, backend)
    del inner, d_inner, d_y
    d_w_in = grouped_outer(rows.gather(x_ND, token_R, ends_E), d_hidden, ends_E, backend)
    d_rows = grouped_linear(d_hidden, w_in_EDF2.mT, ends_E, backend)
    return rows.sum_rows(d_rows, row_A, rescued_S, x_ND.shape[0], top_k), d_gate, d_w_in, d_w_out


@_experts_backward.register_fake
def _(
    d_out: Tensor, x_ND: Tensor, gate_A: Tensor, row_A: Tensor, token_R: Tensor, assignment_R: Tensor,
    ends_E: Tensor, rescued_S: Tensor, w_in_EDF2: Tensor, w_out_EFD: Tensor, hidden_RF2: Tensor,
    top_k: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format)
                 for t in (x_ND, gate_A, w_in_EDF2, w_out_EFD))  # type: ignore[return-value]  # fmt: skip


def _experts_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:9], output[1])
    ctx.options = inputs[9:]


def _experts_gradient(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    d_x, d_gate, d_in, d_out_weight = _experts_backward(d_out, *ctx.saved_tensors, *ctx.options)
    return d_x, d_gate, None, None, None, None, None, d_in, d_out_weight, None, None


_experts.register_autograd(_experts_gradient, setup_context=_experts_context)


def run_experts(
    x_ND: Tensor,
    gate_A: Tensor,
    where: Dispatch,
    weight_in_EDF2: Tensor,
    weight_out_EFD: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``out[n] = Σ gate · expert(x[n])`` over the assignments of token n, each expert a SwiGLU network.

    Args:
        x_ND: tokens. gate_A: what ``gates`` returns, fp32 at least.
        weight_in_EDF2: ``[E, D, 2F]`` gate and up projections side by side. weight_out_EFD: ``[E, F, D]``.
        backend: of the grouped matmuls. 'auto' in training is ``fused_experts``, where they are usable.

    Returns:
        ``out [N, D]`` in the dtype of ``x``, and the first projection's output (for ``sample_hidden``): ``[R, 2F]``, of
        fused experts ``[R, F, 2]``.
    """
    if backend == "auto" and torch.is_grad_enabled():
        sizes = weight_out_EFD.shape[2], weight_out_EFD.shape[1]
        backend = FUSED if fused_products.usable(x_ND.device, x_ND.dtype, True, *sizes) else backend
    top_k = (where.row_A.shape[0] - where.rescued_S.shape[0]) // x_ND.shape[0]
    out, hidden = _experts(
        x_ND.contiguous(), gate_A, where.row_A, where.token_R, where.assignment_R, where.ends_E, where.rescued_S,
        weight_in_EDF2.to(x_ND.dtype), weight_out_EFD.to(x_ND.dtype), top_k, backend,
    )  # fmt: skip
    return out, hidden.detach()


@torch.library.custom_op("deepseek::sample_hidden", mutates_args=())
def sample_hidden(hidden: Tensor, ends_E: Tensor, sample: int) -> Tensor:
    """Sum of ``silu(a)·b`` over at most ``sample`` evenly spaced rows of every expert: ``[E, F]``, fp32 at least.

    ``hidden``: as ``run_experts`` returns it.
    """
    return _rows(hidden).sample_hidden(hidden, ends_E, sample)


@sample_hidden.register_fake
def _(hidden: Tensor, ends_E: Tensor, sample: int) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    inner = hidden.shape[1] if hidden.dim() == 3 else hidden.shape[1] // 2
    return hidden.new_empty(ends_E.shape[0], inner, dtype=wide)


class _ContiguousGrad(torch.autograd.Function):
    """Identity with a contiguous gradient: ``grouped_mm`` refuses the stride-0 gradient of ``sum()``."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.contiguous()
