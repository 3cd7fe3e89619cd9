"""The experts of a serving step on a CPU: rows sorted by expert on the host, two products for every chosen expert.

Everything between the products is done once for all rows, whose order is worked out in NumPy: its calls cost a third of
torch's. In int8 every group of rows that share an expert ends with the row that pins the range of FBGEMM's quantization
(``deepseek.ops.int8_linear``), so that rows are scaled once for all experts instead of once for each.

Shape letters: N rows, E experts, K experts per row, A = N·K assignments, P places (A and the limiting rows), C hidden
size, F expert size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek.ops.exact import exact_swiglu
from deepseek.ops.experts import swiglu
from deepseek.ops.int8_linear import FbgemmLinear, largest
from deepseek.ops.packed_linear import DTYPES, PackedLinear, pack_linear


class Groups(NamedTuple):
    """The rows of a step by expert.

    Attributes:
        chosen, sizes: the experts in use and how many places each has; they add up to P.
        source_P: the row of ``x`` at each place, N for a limiting row. assignment_P: its assignment, A for such a row.
        place_A: where each assignment is.
        last: the place of each group's last row.
    """

    chosen: list[int]
    sizes: list[int]
    source_P: Tensor
    assignment_P: Tensor
    place_A: Tensor
    last: Tensor


def group(expert_NK: Tensor, *, limits: bool = False) -> Groups:
    """Sort assignments by expert, stably.

    Args:
        expert_NK: int64, on the CPU.
        limits: every group ends with a limiting row.
    """
    top_k = expert_NK.shape[1]
    expert = expert_NK.numpy().reshape(-1)
    order = expert.argsort(kind="stable")
    counts = np.bincount(expert)
    chosen = counts.nonzero()[0]
    sizes = counts[chosen]
    place = np.arange(len(order))
    if limits:
        place += np.repeat(np.arange(len(chosen)), sizes)
        sizes = sizes + 1
        assignment = np.full(len(order) + len(chosen), len(order))
        assignment[place] = order
    else:
        assignment = order
    place_A = np.empty_like(place)
    place_A[order] = place
    return Groups(
        chosen.tolist(), sizes.tolist(), torch.from_numpy(assignment // top_k), torch.from_numpy(assignment),
        torch.from_numpy(place_A), torch.from_numpy(sizes.cumsum() - 1),
    )  # fmt: skip


class HostExperts:
    """Router and experts as ``PackedLinear``s; arguments as of ``deepseek.ops.decode_experts.PackedExperts``."""

    def __init__(
        self, router_EC: Tensor, bias_E: Tensor, gate_up_ECF2: Tensor, down_EFC: Tensor, top_k: int, normalise: bool,
        format: str, device: torch.device | str, exact: bool,
    ) -> None:  # fmt: skip
        self.top_k, self.normalise, self.exact = top_k, normalise, exact
        self.bias = bias_E.detach().float()
        self.router = pack_linear(router_EC, None, "fp32", device, exact=exact)
        self.gate_up: list[PackedLinear] = [
            pack_linear(w.T, None, format, device, exact=exact) for w in gate_up_ECF2
        ]
        self.down: list[PackedLinear] = [
            pack_linear(w.T, None, format, device, exact=exact) for w in down_EFC
        ]
        self.swiglu = exact_swiglu if exact else swiglu
        self.run, self.dtype = self.many, DTYPES.get(format, torch.float32)
        linears = [[w for w in group if isinstance(w, FbgemmLinear)] for group in (self.gate_up, self.down)]
        self.int8 = bool(linears[0])
        if self.int8:
            self.run = self.many_int8
            self.packed = [[w.packed for w in group] for group in linears]
            self.limits = [group[0].limits for group in linears]
            self.product = linears[0][0].product
        self.router_nbytes = self.router.nbytes
        self.experts_nbytes = sum(w.nbytes for w in (*self.gate_up, *self.down))

    def __call__(self, x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        expert_NK, gate_NK = self.route(x_NC)
        run = self.one if x_NC.shape[0] == 1 and not (self.exact and self.int8) else self.run
        return run(x_NC, expert_NK, gate_NK), expert_NK, gate_NK

    def route(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and gates ``[N, K]``: ``deepseek.ops.experts.route`` with the packed router."""
        probs = self.router(x_NC.float()).softmax(-1)
        expert = (probs + self.bias).topk(self.top_k, dim=-1).indices
        gate = probs.gather(1, expert)
        return expert, gate / gate.sum(-1, keepdim=True) if self.normalise else gate

    def one(self, x_1C: Tensor, expert_1K: Tensor, gate_1K: Tensor) -> Tensor:
        """A single row: nothing to sort."""
        chosen, dtype = expert_1K[0].tolist(), x_1C.dtype
        x_1C = x_1C.to(self.dtype)
        inner = self.swiglu(torch.cat([self.gate_up[e](x_1C) for e in chosen])).mul_(gate_1K.T)
        y = torch.cat([self.down[e](row) for e, row in zip(chosen, inner.split(1))])
        return y.view(1, self.top_k, -1).sum(1, dtype=torch.float32).to(dtype)

    def many(self, x_NC: Tensor, expert_NK: Tensor, gate_NK: Tensor) -> Tensor:
        """Any number of rows, by ``group``."""
        g = group(expert_NK)
        rows = x_NC.to(self.dtype).index_select(0, g.source_P).split(g.sizes)
        inner = self.swiglu(torch.cat([self.gate_up[e](part) for e, part in zip(g.chosen, rows)]))
        inner.mul_(gate_NK.flatten().index_select(0, g.assignment_P)[:, None])
        y = torch.cat([self.down[e](part) for e, part in zip(g.chosen, inner.split(g.sizes))])
        return self.add_up(y, g, x_NC)

    def add_up(self, y_PC: Tensor, g: Groups, x_NC: Tensor) -> Tensor:
        """The sum over each row's experts, in the order of its choice."""
        parts = y_PC.index_select(0, g.place_A).view(x_NC.shape[0], self.top_k, -1)
        return parts.sum(1, dtype=torch.float32).to(x_NC.dtype)

    def many_int8(self, x_NC: Tensor, expert_NK: Tensor, gate_NK: Tensor) -> Tensor:
        """The same with FBGEMM: activations are scaled once, and each expert's product is a single call."""
        g = group(expert_NK, limits=True)
        x, product = x_NC.float(), self.product
        scale = largest(x)
        rows = torch.cat((x / scale, self.limits[0])).index_select(0, g.source_P).split(g.sizes)
        h = torch.cat([product(part, self.packed[0][e]) for e, part in zip(g.chosen, rows)])
        h *= torch.cat((scale, scale.new_zeros(1, 1))).index_select(0, g.source_P)
        inner = self.swiglu(h)
        gate = torch.cat((gate_NK.flatten(), gate_NK.new_zeros(1))).index_select(0, g.assignment_P)[:, None]
        scale = largest(inner)
        inner = (inner / scale).index_copy_(0, g.last, self.limits[1].expand(len(g.last), -1))
        y = torch.cat([product(part, self.packed[1][e]) for e, part in zip(g.chosen, inner.split(g.sizes))])
        return self.add_up(y.mul_(scale.mul_(gate)), g, x_NC)
