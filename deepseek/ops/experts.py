"""Experts: sort tokens by expert, one grouped matmul per projection, unsort and combine (F15).

Backends of ``grouped_linear``: ``grouped_mm`` (one call, CUDA and CPU) and ``loop`` (one matmul per expert:
the reference). Routing may be as skewed as it likes and experts may be empty.

Shape letters: N tokens, R assignments (token, expert), E experts, D hidden size, F expert size, K experts per
token.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.registry import get_op, register_op

Backend = Literal["auto", "grouped_mm", "loop"]


@register_op("grouped_linear", "loop")
def grouped_linear_loop(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Rows ``ends[e-1]:ends[e]`` of ``x`` times ``weight[e]``: one matmul per expert, the reference."""
    sizes = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
    return torch.cat([rows @ w for rows, w in zip(x_RD.split(sizes), weight_EDF)])


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
    return _ContiguousGrad.apply(y[:, : y.shape[1] - outer] if outer else y)


def grouped_linear(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor, backend: str = "auto") -> Tensor:
    """``y[r] = x[r] @ weight[e]`` for the rows r of expert e.

    Args:
        x_RD: rows sorted by expert. weight_EDF: one matrix per expert.
        ends_E: int32, where each expert's rows end.
        backend: 'auto', 'grouped_mm', 'loop', or one an extension registered.

    Returns:
        ``[R, F]`` in the dtype of ``x``.
    """
    return get_op("grouped_linear", pick_backend(x_RD, backend))(x_RD, weight_EDF, ends_E)


def pick_backend(x: Tensor, backend: str = "auto") -> str:
    """What 'auto' means for ``x``: CUDA's grouped kernel takes bf16 only, the CPU's all but fp64; others have none."""
    if backend != "auto":
        return backend
    grouped = x.dtype == torch.bfloat16 if x.is_cuda else x.is_cpu and x.dtype != torch.float64
    return "grouped_mm" if grouped else "loop"


def swiglu(x: Tensor) -> Tensor:
    """``silu(a) * b`` for ``x = [a, b]`` along the last dimension (arXiv 2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def sort_by_expert(expert_R: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The stable order that groups assignments by expert and where each one's rows end (int32 ``[E]``)."""
    order = torch.argsort(expert_R, stable=True)
    counts = torch.bincount(expert_R, minlength=experts)
    return order, counts.cumsum(0).to(torch.int32)


def run_experts(
    x_ND: Tensor,
    token_R: Tensor,
    expert_R: Tensor,
    weight_in_EDF: Tensor,
    weight_out_EFD: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Every assignment through its expert's SwiGLU network.

    Args:
        x_ND: tokens. token_R, expert_R: which token goes to which expert.
        weight_in_EDF: ``[E, D, 2F]`` gate and up projections side by side. weight_out_EFD: ``[E, F, D]``.

    Returns:
        ``y [R, D]`` sorted by expert, the order (``y[i]`` belongs to assignment ``order[i]``), and the ends
        ``[E]``.
    """
    order, ends_E = sort_by_expert(expert_R, weight_in_EDF.shape[0])
    rows = x_ND.index_select(0, token_R[order])
    hidden = swiglu(grouped_linear(rows, weight_in_EDF.to(rows.dtype), ends_E, backend))
    return grouped_linear(hidden, weight_out_EFD.to(rows.dtype), ends_E, backend), order, ends_E


def combine(y_RD: Tensor, gate_R: Tensor, token_R: Tensor, tokens: int) -> Tensor:
    """``out[n] = Σ gate[r] · y[r]`` over the assignments r of token n, summed in the dtype of ``gate``.

    Args:
        y_RD: expert outputs. gate_R: their weights (fp32). token_R: the token of each. tokens: N.

    Returns:
        ``[N, D]``. Autograd keeps ``y`` as it is; plain ``index_add`` would keep two fp32 copies of it.
    """
    return _Combine.apply(y_RD, gate_R, token_R, tokens)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, token: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(y, gate, token)
        return gate.new_zeros(tokens, y.shape[1]).index_add_(0, token, y.to(gate.dtype) * gate[:, None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, gate, token = ctx.saved_tensors
        rows = grad.index_select(0, token)
        return (rows * gate[:, None]).to(y.dtype), (rows * y).sum(-1), None, None


class _ContiguousGrad(torch.autograd.Function):
    """Identity with a contiguous gradient: ``grouped_mm`` refuses the stride-0 gradient of ``sum()``."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.contiguous()
