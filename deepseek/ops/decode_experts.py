"""The expert layer of a serving step: route, run only the chosen experts, add up.

A step has few rows, so time goes into reading weights and into calls. On a CPU the rows are sorted by expert on the
host (waiting for a CPU costs nothing), every chosen expert runs as two ``PackedLinear`` products over the rows that
chose it, and everything between the products is done once for all rows. No weight is copied. On CUDA the same is a
handful of kernels without a wait (``deepseek.ops.triton.decode_experts``).

Shape letters: N rows, E experts, K experts per row, A = N·K assignments, C hidden size, F expert size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops import expert_rows
from deepseek.ops.exact import exact_swiglu
from deepseek.ops.experts import swiglu
from deepseek.ops.packed_linear import PackedLinear, PackedSwiGLU, pack_linear


class PackedExperts:
    """A sparse feed-forward layer, laid out once for serving.

    Args:
        router_EC, bias_E: the router's weight and selection bias.
        gate_up_ECF2, down_EFC: as in ``deepseek.nn.moe.MoE``: inputs before outputs.
        top_k, normalise: experts per row; whether the gates of a row sum to one.
        format, device, exact: as in ``pack_linear``; the router is always fp32.
        shared: the always-on expert, or ``None``.
    """

    def __init__(
        self,
        router_EC: Tensor,
        bias_E: Tensor,
        gate_up_ECF2: Tensor,
        down_EFC: Tensor,
        top_k: int,
        normalise: bool,
        format: str,
        device: torch.device | str,
        *,
        shared: PackedSwiGLU | None = None,
        exact: bool = False,
    ) -> None:
        self.experts, self.top_k, self.normalise, self.exact = len(gate_up_ECF2), top_k, normalise, exact
        self.bias = bias_E.detach().to(device, torch.float32)
        self.router = pack_linear(router_EC, None, "fp32", device, exact=exact)
        self.gate_up: list[PackedLinear] = [
            pack_linear(w.T, None, format, device, exact=exact) for w in gate_up_ECF2
        ]
        self.down: list[PackedLinear] = [
            pack_linear(w.T, None, format, device, exact=exact) for w in down_EFC
        ]
        self.shared = shared
        self._swiglu = exact_swiglu if exact else swiglu

    def __call__(self, x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows through their experts.

        Args:
            x_NC: in the engine's compute dtype.

        Returns:
            ``out [N, C]`` in the dtype of ``x``, the experts ``[N, K]`` (integer, likeliest first by probability
            plus bias) and their gates ``[N, K]`` (fp32).
        """
        expert_NK, gate_NK = self.route(x_NC)
        out = self._one(x_NC, expert_NK, gate_NK) if len(x_NC) == 1 else self._many(x_NC, expert_NK, gate_NK)
        if self.shared is not None:
            out = out + self.shared(x_NC)
        return out, expert_NK, gate_NK

    def route(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and gates ``[N, K]``: ``deepseek.ops.experts.route`` with the packed router."""
        probs = self.router(x_NC.float()).softmax(-1)
        expert = (probs + self.bias).topk(self.top_k, dim=-1).indices
        gate = probs.gather(1, expert)
        return expert, gate / gate.sum(-1, keepdim=True) if self.normalise else gate

    def _one(self, x_1C: Tensor, expert_1K: Tensor, gate_1K: Tensor) -> Tensor:
        chosen = expert_1K[0].tolist()
        inner = self._swiglu(torch.cat([self.gate_up[e](x_1C) for e in chosen])).mul_(gate_1K.T)
        parts = [self.down[e](row) for e, row in zip(chosen, inner.split(1))]
        return torch.cat(parts).sum(0, keepdim=True, dtype=torch.float32).to(x_1C.dtype)

    def _many(self, x_NC: Tensor, expert_NK: Tensor, gate_NK: Tensor) -> Tensor:
        expert_A = expert_NK.flatten()
        order = expert_A.argsort(stable=True)
        counts = torch.bincount(expert_A, minlength=self.experts).tolist()
        chosen = [e for e, count in enumerate(counts) if count]
        sizes = [counts[e] for e in chosen]
        rows = x_NC.index_select(0, order // self.top_k).split(sizes)
        inner = self._swiglu(torch.cat([self.gate_up[e](part) for e, part in zip(chosen, rows)]))
        inner.mul_(gate_NK.flatten().index_select(0, order)[:, None])
        y = torch.cat([self.down[e](part) for e, part in zip(chosen, inner.split(sizes))])
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        out = y.index_select(0, place).view(len(x_NC), self.top_k, -1).sum(1, dtype=torch.float32)
        return out.to(x_NC.dtype)


def experts_reference(
    x_NC: Tensor,
    router_EC: Tensor,
    bias_E: Tensor,
    gate_up_ECF2: Tensor,
    down_EFC: Tensor,
    top_k: int,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``PackedExperts`` computes (without the shared expert), one assignment at a time."""
    _, expert, gate = expert_rows.router(x_NC, router_EC, bias_E, top_k, normalise)
    out = torch.zeros_like(x_NC, dtype=gate.dtype)
    for n, k in torch.cartesian_prod(torch.arange(len(x_NC)), torch.arange(top_k)).tolist():
        e = int(expert[n, k])
        inner = swiglu(x_NC[n] @ gate_up_ECF2[e].to(x_NC.dtype)) * gate[n, k].to(x_NC.dtype)
        out[n] += F.linear(inner, down_EFC[e].to(x_NC.dtype).T)
    return out.to(x_NC.dtype), expert, gate
