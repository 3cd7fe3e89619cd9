"""Experts whose products gather their rows and apply SwiGLU by themselves: see ``deepseek.ops.fused_products``.

Four products do what otherwise takes four products and six passes over memory: the first one reads its tokens by index
and answers with ``[gate, up]`` and ``silu(gate) · up`` at once; in backward the product with the output's gradient
gives the gradient of ``[gate, up]``, the activation again, and the gates' gradient; both weight gradients read their
tokens by index as well. The gate of an assignment is multiplied where rows are added up, and in backward where the
activation's gradient is. (Guo et al., SonicMoE, arXiv 2512.14080, have this division of the work.)

Gate and up are neighbours here, ``[R, F, 2]``. Weights are laid so before each use, and their gradient is laid back.

Shape letters: N tokens, K experts per token, E experts, A assignments with rescue slots, R = A rows, D hidden size, F
expert size.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops.fused_products import products


def forward(
    rows: ModuleType, x_ND: Tensor, gate_A: Tensor, row_A: Tensor, token_R: Tensor, ends_E: Tensor,
    rescued_S: Tensor, w_in_EDF2: Tensor, w_out_EFD: Tensor, top_k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What ``experts._experts`` does, and ``[gate, up]`` as ``[R, F, 2]``. ``rows``: the operations on rows."""
    starts = F.pad(ends_E, (1, 0))
    with torch.cuda.device_of(x_ND):
        hidden, inner = products().up(x_ND, rows.pair(w_in_EDF2), starts, token_R)
        y = products().rows(inner, w_out_EFD, starts)
    return rows.sum_rows(y, row_A, rescued_S, x_ND.shape[0], top_k, gate_A), hidden


def backward(
    rows: ModuleType, d_out_ND: Tensor, x_ND: Tensor, gate_A: Tensor, row_A: Tensor, token_R: Tensor,
    assignment_R: Tensor, ends_E: Tensor, rescued_S: Tensor, w_in_EDF2: Tensor, w_out_EFD: Tensor,
    hidden_RF2: Tensor, top_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What ``experts._experts_backward`` does: gradients of tokens, gates and both weights."""
    starts, run = F.pad(ends_E, (1, 0)), products()
    gate_R = gate_A.index_select(0, assignment_R)
    with torch.cuda.device_of(x_ND):
        d_hidden, inner, d_gate_R = run.down_gradient(
            d_out_ND, w_out_EFD, hidden_RF2, gate_R, starts, token_R
        )
        d_hidden = d_hidden.flatten(1)
        d_w_out = run.outer(d_out_ND, inner, starts, token_R, turned=True).mT
        del inner
        d_w_in = rows.unpair(run.outer(x_ND, d_hidden, starts, token_R))
        d_rows = run.rows(d_hidden, rows.pair(w_in_EDF2).mT, starts)
    d_x = rows.sum_rows(d_rows, row_A, rescued_S, x_ND.shape[0], top_k)
    d_gate_A = torch.where(row_A >= 0, d_gate_R.index_select(0, row_A.clamp(min=0)), 0.0)
    return d_x, d_gate_A.to(gate_A.dtype), d_w_in, d_w_out
