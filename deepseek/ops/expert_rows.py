"""The row operations of the expert path in plain torch: the reference, and what CPUs run.

``deepseek.ops.triton.experts`` holds the same functions as kernels. Assignments are numbered token by token
(``a = n·K + k``), rescue slots after them; rows are sorted by expert, and rows from ``ends[-1]`` on are unused.

Shape letters: N tokens, K experts per token, E experts, A = N·K + S assignments, S rescue slots, R = A rows, D hidden
size, F expert size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def router(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities ``[N, E]``, the chosen experts (int32) and their gates ``[N, K]``; fp32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    probs = F.linear(x.to(wide), weight.to(wide)).softmax(-1)
    expert = (probs + bias).topk(top_k, dim=-1).indices
    gate = probs.gather(1, expert)
    if normalise:
        gate = gate / gate.sum(-1, keepdim=True)
    return probs, expert.to(torch.int32), gate


def dispatch(
    expert_NK: Tensor, probs_NE: Tensor, valid_N: Tensor | None, floor: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``deepseek.ops.experts.dispatch``."""
    top_k = expert_NK.shape[1]
    experts, n, device = probs_NE.shape[1], expert_NK.numel(), expert_NK.device
    expert_A = expert_NK.flatten().long()
    chosen = torch.bincount(expert_A, minlength=experts)
    missing = (floor - chosen).clamp(min=0)
    ends = (chosen + missing).cumsum(0)
    start = ends - chosen - missing
    order = torch.argsort(expert_A, stable=True)
    sorted_expert = expert_A[order]
    rank = torch.arange(n, device=device) - (chosen.cumsum(0) - chosen)[sorted_expert]
    place = start[sorted_expert] + rank
    row = torch.full((n + experts * floor,), -1, device=device, dtype=torch.int64)
    row[order] = place
    rescued = torch.full((experts * floor,), -1, device=device, dtype=torch.int64)
    assignment, token = torch.zeros_like(row), torch.zeros_like(row)
    assignment[place], token[place] = order, order // top_k
    if floor and bool(missing.any()):
        eager = _liking(expert_NK, probs_NE, valid_N).topk(floor, dim=0).indices.T  # [E, floor]
        i = torch.arange(floor, device=device).expand(experts, -1)
        taken = i < missing[:, None]
        slot = (torch.arange(experts, device=device)[:, None] * floor + i)[taken]
        place = ((start + chosen)[:, None] + i)[taken]
        rescued[slot], row[n + slot], assignment[place], token[place] = (
            eager[taken],
            place,
            n + slot,
            eager[taken],
        )
    row, token, assignment, ends, chosen, rescued = (
        t.to(torch.int32) for t in (row, token, assignment, ends, chosen, rescued)
    )
    return row, token, assignment, ends, chosen, rescued


def _liking(expert_NK: Tensor, probs_NE: Tensor, valid_N: Tensor | None) -> Tensor:
    """How much each token likes each expert: padding below every real token, above those that chose the expert."""
    liking = probs_NE if valid_N is None else probs_NE - 1.0 * ~valid_N.bool()[:, None]
    return liking.scatter(1, expert_NK.long(), -2.0)


def gather(x_ND: Tensor, token_R: Tensor, ends_E: Tensor) -> Tensor:
    """``x[token_R]``."""
    return x_ND.index_select(0, token_R)


def sum_rows(
    y_RD: Tensor, row_A: Tensor, rescued_S: Tensor, tokens: int, top_k: int, gate_A: Tensor | None = None
) -> Tensor:
    """``out[n] = Σ gate · y[row]`` over token n's assignments, added up in fp32 at least; without gates as if 1."""
    wide, chosen = torch.promote_types(y_RD.dtype, torch.float32), tokens * top_k
    y = y_RD.index_select(0, row_A[:chosen])
    if gate_A is not None:
        y = y.to(wide) * gate_A[:chosen, None].to(wide)
    out = y.view(tokens, top_k, -1).sum(1, dtype=wide)
    used = rescued_S >= 0
    if bool(used.any()):
        y = y_RD.index_select(0, row_A[chosen:][used]).to(wide)
        out.index_add_(0, rescued_S[used], y if gate_A is None else y * gate_A[chosen:][used, None].to(wide))
    return out.to(y_RD.dtype)


def swiglu(h_RF2: Tensor, gate_A: Tensor, assignment_R: Tensor, ends_E: Tensor) -> Tensor:
    """``gate · silu(a) · b`` of ``[a, b] = h [R, 2F]``."""
    a, b = h_RF2.chunk(2, -1)
    return (F.silu(a) * b).mul_(gate_A.index_select(0, assignment_R)[:, None].to(a.dtype))


def swiglu_backward(
    h_RF2: Tensor, gate_A: Tensor, assignment_R: Tensor, ends_E: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``swiglu`` for ``h`` and the gates, and its value again."""
    a, b = h_RF2.chunk(2, -1)
    gate = gate_A.index_select(0, assignment_R)[:, None].to(a.dtype)
    s = a.sigmoid()
    silu = a * s
    y = silu * b
    slope = (d_out * y).sum(-1, dtype=gate_A.dtype)
    used = int(ends_E[-1])
    d_gate = torch.zeros_like(gate_A)
    d_gate[assignment_R[:used]] = slope[:used]
    d = d_out * gate
    d_h = torch.cat((d * b * (s + silu * (1 - s)), d * silu), dim=-1)
    return d_h, y.mul_(gate), d_gate


def sample_hidden(hidden: Tensor, ends_E: Tensor, sample: int) -> Tensor:
    """Sum of ``silu(a)·b`` over at most ``sample`` evenly spaced rows of every expert: fp32 (or wider) ``[E, F]``.

    ``hidden``: ``[a, b]`` side by side ``[R, 2F]``, or as neighbours ``[R, F, 2]``.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    sums, start = [], 0
    for end in ends_E.tolist():
        count, taken = end - start, min(end - start, sample)
        rows = start + torch.arange(taken, device=hidden.device) * count // max(taken, 1)
        h = hidden.index_select(0, rows)
        a, b = h.unbind(-1) if h.dim() == 3 else h.chunk(2, -1)
        sums.append((F.silu(a) * b).sum(0, dtype=wide))
        start = end
    return torch.stack(sums)


def pair(w: Tensor) -> Tensor:
    """``[…, 2F]``, halves side by side → the same numbers with those of one place as neighbours."""
    return w.unflatten(-1, (2, -1)).mT.flatten(-2)


def unpair(w: Tensor) -> Tensor:
    """The reverse of ``pair``."""
    return w.unflatten(-1, (-1, 2)).mT.flatten(-2)
