"""Sparse mixture of experts (F12, S1 §2): fp32 router, top-k experts, four ways of keeping experts alive.

* **entropy loss** ``α (Σ p̄ log p̄ + log E)`` on the mean router probability: the source's balance term,
  differentiable;
* **bias** added to the probabilities for the selection only, moved after every step, outside autograd,
  against each expert's load error (auxiliary-loss-free balancing, arXiv 2408.15664). Its step there is the
  sign of the error; ours is proportional up to a limit, so that a balanced router comes to rest (LOG.md);
* **token floor**: while training, an expert that was chosen by fewer than ``floor · T·K/E`` tokens also gets
  the tokens that like it best, each with its own small probability as weight. (It looks at the whole batch,
  like expert choice; evaluation and generation never use it.)
* **default outputs**: an exponential average of each expert's output stands in for the experts that were not
  chosen, in the router's gradient only (straight-through form of Default MoE, arXiv 2504.12463).

``forward`` is pure: what the step learnt about routing is returned as ``RoutingStats`` and applied by
``update`` once per optimizer step, after the micro-batches and ranks were added up.

Shape letters: N tokens, E experts, K experts per token, C hidden size, F expert size, R assignments.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.config import configclass
from deepseek.errors import ConfigError
from deepseek.nn.layers import SwiGLU, to_compute_dtype, widen
from deepseek.ops.experts import Backend, combine, run_experts


@configclass
class MoEConfig:
    """A sparse feed-forward layer. ``experts=0`` means a dense one."""

    experts: int = 0
    top_k: int = 2
    expert_ffn: int = 256
    shared_experts: int = 0  # always-on experts, as one SwiGLU of shared_experts × expert_ffn
    normalise_gates: bool = True  # the k gates of a token sum to one
    entropy_weight: float = 0.01  # α of the balance loss
    bias_rate: float = 2e-3  # largest step of the selection bias; 0 = off
    bias_step: Literal["proportional", "sign"] = "proportional"  # 'sign' is the published rule
    token_floor: float = 0.1  # share of the mean load every expert is guaranteed while training; 0 = off
    default_decay: float = 0.99  # horizon of the default outputs; 0 = off
    backend: Backend = "auto"

    def check(self) -> None:
        if self.expert_ffn < 1 or self.shared_experts < 0 or self.experts < 0:
            raise ConfigError(
                f"expert_ffn={self.expert_ffn} must be at least 1, experts={self.experts} and "
                f"shared_experts={self.shared_experts} not negative"
            )
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"top_k={self.top_k} must lie between 1 and experts={self.experts}")
        if not 0 <= self.token_floor <= 1 or not 0 <= self.default_decay < 1:
            raise ConfigError(
                f"token_floor={self.token_floor} must lie in [0, 1] "
                f"and default_decay={self.default_decay} in [0, 1)"
            )


class RoutingStats(NamedTuple):
    """What one forward pass learnt about one layer's routing; micro-batches add up tensor by tensor."""

    balance_loss: Tensor  #: scalar, already weighted
    chosen_E: Tensor  #: how many tokens chose each expert (top-k only)
    served_E: Tensor  #: how many tokens each expert worked on (with the floor's)
    output_sum_EC: Tensor  #: sum of each expert's outputs, for the default outputs
    entropy: Tensor  #: mean entropy of the router's distribution, nats


class Routing(NamedTuple):
    """Which token goes where: ``token_R``, ``expert_R``, ``gate_R``, and what the choice was made from."""

    token_R: Tensor
    expert_R: Tensor
    gate_R: Tensor
    chosen_NE: Tensor
    probs_NE: Tensor


def coverage(load_E: Tensor) -> Tensor:
    """Σ min(fᵢ, 1/E) of shares that sum to one: 1 when all are equal, 1/E when one expert has everything."""
    return load_E.clamp(max=1 / load_E.numel()).sum()


def max_violation(load_E: Tensor) -> Tensor:
    """MaxVio of arXiv 2408.15664: (largest load − mean load) / mean load."""
    return load_E.max() * load_E.numel() - 1


class Router(nn.Module):
    """Softmax router in fp32; the bias takes part in the selection only."""

    bias: Tensor

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, hidden))
        self.register_buffer("bias", torch.zeros(config.experts))

    def forward(self, x_NC: Tensor, valid_N: Tensor | None = None) -> Routing:
        c = self.config
        with torch.autocast(x_NC.device.type, enabled=False):
            wide = widen(x_NC)
            probs = F.linear(wide, self.weight.to(wide.dtype)).softmax(-1)
        expert_NK = (probs.detach() + self.bias).topk(c.top_k, dim=-1).indices
        gate_NK = probs.gather(1, expert_NK)
        if c.normalise_gates:
            gate_NK = gate_NK / gate_NK.sum(-1, keepdim=True)
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(1, expert_NK, True)
        token = torch.arange(probs.shape[0], device=probs.device).repeat_interleave(c.top_k)
        routing = Routing(token, expert_NK.flatten(), gate_NK.flatten(), chosen, probs)
        return self._rescue(routing, valid_N) if self.training and c.token_floor > 0 else routing

    def _rescue(self, routing: Routing, valid_N: Tensor | None) -> Routing:
        """Give every expert at least ``ceil(token_floor · N·K/E)`` tokens (at most N), padding last."""
        N, E = routing.probs_NE.shape
        floor = min(N, math.ceil(self.config.token_floor * N * self.config.top_k / E))
        missing_E = (floor - routing.chosen_NE.sum(0)).clamp(min=0)
        liking = routing.probs_NE.detach()
        if valid_N is not None:  # padding: below every real token, above those that chose the expert
            liking = liking - 1.0 * ~valid_N[:, None]
        eager = liking.masked_fill(routing.chosen_NE, -2.0).topk(floor, dim=0).indices
        taken = torch.arange(floor, device=eager.device)[:, None] < missing_E
        token = eager[taken]
        expert = torch.arange(E, device=eager.device).expand_as(eager)[taken]
        return routing._replace(
            token_R=torch.cat((routing.token_R, token)),
            expert_R=torch.cat((routing.expert_R, expert)),
            gate_R=torch.cat((routing.gate_R, routing.probs_NE[token, expert])),
        )


class MoE(nn.Module):
    """Router, experts, weighted sum; drop-in for a feed-forward layer."""

    default_EC: Tensor

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        c = self.config = config
        self.router = Router(hidden, c)
        self.gate_up = nn.Parameter(torch.empty(c.experts, hidden, 2 * c.expert_ffn))
        self.down = nn.Parameter(torch.empty(c.experts, c.expert_ffn, hidden))
        self.shared = SwiGLU(hidden, c.shared_experts * c.expert_ffn) if c.shared_experts else None
        self.register_buffer("default_EC", torch.zeros(c.experts, hidden), persistent=c.default_decay > 0)

    # Under torch.compile routing and experts stay eager: the rows of an expert depend on the data, Dynamo's fake
    # grouped_mm knows bf16 only, and torch 2.11 stumbles over named tuples.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x_BTC: Tensor, valid_BT: Tensor | None = None) -> tuple[Tensor, RoutingStats]:
        """``[B, T, C]`` → ``[B, T, C]`` and what routing was; padding (not ``valid``) is not counted."""
        x = x_BTC.flatten(0, 1)
        routing = self.router(x, None if valid_BT is None else valid_BT.flatten())
        y_RC, order, ends_E = run_experts(
            to_compute_dtype(x),
            routing.token_R,
            routing.expert_R,
            self.gate_up,
            self.down,
            self.config.backend,
        )
        out = combine(y_RC, routing.gate_R[order], routing.token_R[order], x.shape[0])
        if self.training and self.config.default_decay > 0:
            out = out + self._default_gradient(routing)
        out = out.to(x.dtype).view_as(x_BTC)
        if self.shared is not None:
            out = out + self.shared(x_BTC)
        return out, self._stats(routing, y_RC, ends_E, valid_BT)

    def _default_gradient(self, routing: Routing) -> Tensor:
        """Zero in value; in gradient, what the experts a token did not reach answer on average."""
        probs = routing.probs_NE
        served = torch.zeros_like(routing.chosen_NE).index_put(
            (routing.token_R, routing.expert_R), torch.ones_like(routing.token_R, dtype=torch.bool)
        )
        # A copy: ``update`` moves the averages in place, perhaps before this graph's backward.
        absent = probs.masked_fill(served, 0.0) @ self.default_EC.to(probs.dtype, copy=True)
        return absent - absent.detach()

    def _stats(self, routing: Routing, y_RC: Tensor, ends_E: Tensor, valid_BT: Tensor | None) -> RoutingStats:
        probs, c = routing.probs_NE, self.config
        counted = torch.ones_like(probs[:, 0]) if valid_BT is None else valid_BT.flatten().to(probs.dtype)
        mean_E = (probs * counted[:, None]).sum(0) / counted.sum().clamp(min=1)
        loss = c.entropy_weight * (torch.xlogy(mean_E, mean_E).sum() + math.log(c.experts))
        with torch.no_grad():
            served = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).to(probs.dtype)
            sums = probs.new_zeros(c.experts, y_RC.shape[1])
            if self.training and c.default_decay > 0:
                rows = torch.repeat_interleave(
                    torch.arange(c.experts, device=probs.device), served.long(), output_size=y_RC.shape[0]
                )
                sums = sums.index_add(0, rows, y_RC.detach().to(sums.dtype))
            entropy = -(torch.xlogy(probs, probs).sum(-1) * counted).sum() / counted.sum().clamp(min=1)
            chosen = (routing.chosen_NE * counted[:, None]).sum(0)
        return RoutingStats(loss, chosen, served, sums, entropy)

    @torch.no_grad()
    def update(self, stats: RoutingStats) -> None:
        """Apply a whole step's routing statistics: move the selection bias and the default outputs."""
        c = self.config
        if c.bias_rate > 0:
            load = stats.chosen_E / stats.chosen_E.sum().clamp(min=1)
            lack = 1 - load * c.experts  # 1 for an idle expert, -1 at twice the share
            self.router.bias += c.bias_rate * (lack.sign() if c.bias_step == "sign" else lack.clamp(-1, 1))
            self.router.bias -= self.router.bias.mean()
        if c.default_decay > 0:
            served = stats.served_E[:, None]
            mean = torch.where(served > 0, stats.output_sum_EC / served.clamp(min=1), self.default_EC)
            self.default_EC.lerp_(mean.to(self.default_EC.dtype), 1 - c.default_decay)
