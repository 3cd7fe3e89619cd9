"""Sparse mixture of experts (F12, S1 §2): fp32 router, top-k experts, four ways of keeping experts alive.

* **entropy loss** ``α (Σ p̄ log p̄ + log E)`` on the mean router probability: the source's balance term,
  differentiable;
* **bias** added to the probabilities for the selection only, moved after every step, outside autograd,
  against each expert's load error (auxiliary-loss-free balancing, arXiv 2408.15664). Its step there is the
  sign of the error; ours is proportional up to a limit, so that a balanced router comes to rest (LOG.md). Other
  steps and the response to drift are in ``deepseek.nn.balance``;
* **token floor**: while training, an expert that was chosen by fewer than ``floor · T·K/E`` tokens also gets
  the tokens that like it best, each with its own small probability as weight. (It looks at the whole batch,
  like expert choice; evaluation and generation never use it.)
* **default outputs**: an exponential average of each expert's output stands in for the experts that were not
  chosen, in the router's gradient only (straight-through form of Default MoE, arXiv 2504.12463). The average is
  taken over the inner activations of a sample of rows and projected once a step: the projection is linear.

``forward`` is pure: what the step learnt about routing is returned as ``RoutingStats`` and applied by
``update`` once per optimizer step, after the micro-batches and ranks were added up.

Shape letters: N tokens, E experts, K experts per token, C hidden size, F expert size, A assignments, R rows, S rescue
slots (see ``deepseek.ops.experts``).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.config import configclass
from deepseek.errors import ConfigError
from deepseek.nn.balance import BiasStep, DriftResponse, bias_step, dual_gap, input_moments, keep
from deepseek.nn.layers import SwiGLU, to_compute_dtype
from deepseek.ops.experts import (
    Backend,
    Dispatch,
    dispatch,
    gates,
    rescued_pairs,
    route,
    run_experts,
    sample_hidden,
)

DEFAULT_SAMPLE = 64  #: rows of an expert that its average output is taken over, per forward pass


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
    bias_step: BiasStep = "proportional"  # 'sign' is the published rule, 'dual' solves for the load
    drift_response: bool = (
        False  # move the bias faster for a while after the experts' inputs have changed abruptly
    )
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
        if self.drift_response and self.bias_rate <= 0:
            raise ConfigError(
                f"drift_response raises the bias rate, which is {self.bias_rate}; "
                "set bias_rate above 0 or drift_response to false"
            )


class RoutingStats(NamedTuple):
    """What one forward pass learnt about one layer's routing; micro-batches add up tensor by tensor."""

    balance_loss: Tensor  #: scalar, already weighted
    chosen_E: Tensor  #: how many tokens chose each expert (top-k only)
    served_E: Tensor  #: how many tokens each expert worked on (with the floor's)
    sampled_E: Tensor  #: how many of those took part in ``hidden_sum_EF``
    hidden_sum_EF: Tensor  #: sum of each expert's inner activations over these, for the default outputs
    entropy: Tensor  #: mean entropy of the router's distribution, nats
    gap_E: Tensor  #: ``dual_gap`` times the tokens counted; empty unless bias_step is 'dual'
    moments_ED: Tensor  #: ``input_moments``; empty without drift_response


class Routing(NamedTuple):
    """Which token goes where, and what the choice was made from."""

    expert_NK: Tensor
    probs_NE: Tensor
    gate_A: Tensor
    where: Dispatch


def coverage(load_E: Tensor) -> Tensor:
    """Σ min(fᵢ, 1/E) of shares that sum to one: 1 when all are equal, 1/E when one expert has everything."""
    return load_E.clamp(max=1 / load_E.numel()).sum()


def max_violation(load_E: Tensor) -> Tensor:
    """MaxVio of arXiv 2408.15664: (largest load − mean load) / mean load."""
    return load_E.max() * load_E.numel() - 1


class Router(nn.Module):
    """Softmax router in fp32; the bias takes part in the selection only.

    ``force_balance`` sends token n to experts ``n·K … n·K + K − 1`` (mod E) whatever the router says: a yardstick for
    benchmarks, never for training.
    """

    bias: Tensor

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.force_balance = False
        self.weight = nn.Parameter(torch.empty(config.experts, hidden))
        self.register_buffer("bias", torch.zeros(config.experts))

    def forward(self, x_NC: Tensor, valid_N: Tensor | None = None) -> Routing:
        c, tokens = self.config, x_NC.shape[0]
        with torch.autocast(x_NC.device.type, enabled=False):
            probs, expert_NK, gate_NK = route(x_NC, self.weight, self.bias, c.top_k, c.normalise_gates)
            if self.force_balance:
                turn = torch.arange(tokens * c.top_k, device=x_NC.device, dtype=torch.int32) % c.experts
                expert_NK = turn.view(tokens, c.top_k)
            where = dispatch(expert_NK, probs, valid_N, self.floor(tokens))
            return Routing(expert_NK, probs, gates(gate_NK, probs, where), where)

    def floor(self, tokens: int) -> int:
        """How many tokens every expert is guaranteed: ``ceil(token_floor · N·K/E)``, at most N; 0 in evaluation."""
        c = self.config
        share = c.token_floor * tokens * c.top_k / c.experts if self.training else 0.0
        return min(tokens, math.ceil(share))


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
        self.drift = DriftResponse(c.experts, hidden) if c.drift_response else None

    def forward(
        self, x_BTC: Tensor, valid_BT: Tensor | None = None, again_BTC: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats]:
        """``[B, T, C]`` → ``[B, T, C]`` and what routing was; padding (not ``valid``) is not counted.

        Args:
            again_BTC: ``x_BTC`` once more, for the router, if what made it wants the two gradients and not their sum.
        """
        c, x = self.config, to_compute_dtype(x_BTC).flatten(0, 1)
        valid = None if valid_BT is None else valid_BT.flatten()
        routing = self.router((x_BTC if again_BTC is None else again_BTC).flatten(0, 1), valid)
        out, hidden = run_experts(x, routing.gate_A, routing.where, self.gate_up, self.down, c.backend)
        if self.training and c.default_decay > 0:
            # A copy: ``update`` moves the averages in place, perhaps before this graph's backward.
            out = _DefaultGradient.apply(
                out, routing.probs_NE, self._absent(routing), self.default_EC.clone()
            )
        out = out.to(x_BTC.dtype).view_as(x_BTC)
        if self.shared is not None:
            out = out + self.shared(x_BTC)
        return out, self._stats(routing, x, hidden, valid)

    def _absent(self, routing: Routing) -> Tensor:
        """bool ``[N, E]``: the experts that did not work on a token."""
        tokens, experts = routing.probs_NE.shape
        absent = ~chosen_mask(routing.expert_NK, experts)
        if not routing.where.rescued_S.numel():
            return absent
        place = rescued_pairs(routing.where, tokens, experts)
        return F.pad(absent.flatten(), (0, 1)).scatter(0, place, False)[:-1].view(tokens, experts)

    def _stats(
        self, routing: Routing, x_NC: Tensor, hidden_RF2: Tensor, valid_N: Tensor | None
    ) -> RoutingStats:
        probs, c, where = routing.probs_NE, self.config, routing.where
        counted = torch.ones_like(probs[:, 0]) if valid_N is None else valid_N.to(probs.dtype)
        mean_E = (probs * counted[:, None]).sum(0) / counted.sum().clamp(min=1)
        loss = c.entropy_weight * (torch.xlogy(mean_E, mean_E).sum() + math.log(c.experts))
        with torch.no_grad():
            served = torch.diff(where.ends_E, prepend=where.ends_E.new_zeros(1))
            sampled = served.clamp(max=DEFAULT_SAMPLE)
            if self.training and c.default_decay > 0:
                sums = sample_hidden(hidden_RF2, where.ends_E, DEFAULT_SAMPLE)
            else:
                sums, sampled = probs.new_zeros(c.experts, c.expert_ffn), torch.zeros_like(sampled)
            entropy = -(torch.xlogy(probs, probs).sum(-1) * counted).sum() / counted.sum().clamp(min=1)
            chosen = where.chosen_E.to(probs.dtype)
            if valid_N is not None:
                chosen = (chosen_mask(routing.expert_NK, c.experts) * counted[:, None]).sum(0)
            gap = moments = probs.new_zeros(0)
            if self.training and c.bias_step == "dual" and c.bias_rate > 0:
                gap = dual_gap(probs, self.router.bias, c.top_k, valid_N) * counted.sum()
            if self.training and c.drift_response:
                moments = input_moments(x_NC, where.token_R, where.ends_E, valid_N)
        return RoutingStats(
            loss, chosen, served.to(probs.dtype), sampled.to(probs.dtype), sums, entropy, gap, moments
        )

    @torch.no_grad()
    def update(self, stats: RoutingStats, apply: Tensor | None = None) -> None:
        """Apply a whole step's routing statistics: move the selection bias and the default outputs.

        ``apply``: a bool scalar on the device; where it is false nothing moves.
        """
        c = self.config
        if c.bias_rate > 0:
            choices = stats.chosen_E.sum().clamp(min=1)
            load, gap = stats.chosen_E / choices, stats.gap_E * (c.top_k / choices)
            boost = 1.0 if self.drift is None else self.drift.update(stats.moments_ED, apply)
            moved = self.router.bias + bias_step(c.bias_step, c.bias_rate, load, gap, boost)
            keep(self.router.bias, moved - moved.mean(), apply)
        if c.default_decay > 0:
            sampled = stats.sampled_E[:, None]
            inner = (stats.hidden_sum_EF / sampled.clamp(min=1)).to(self.down.dtype)
            mean = torch.where(sampled > 0, torch.bmm(inner[:, None], self.down)[:, 0], self.default_EC)
            moved = self.default_EC.lerp(mean.to(self.default_EC.dtype), 1 - c.default_decay)
            keep(self.default_EC, moved, apply)


def chosen_mask(expert_NK: Tensor, experts: int) -> Tensor:
    """bool ``[N, E]``: which experts a token chose."""
    return (expert_NK[:, :, None] == torch.arange(experts, device=expert_NK.device)).any(1)


class _DefaultGradient(torch.autograd.Function):
    """Identity in value; in gradient, what the experts a token did not reach answer on average.

    As if ``Σ_absent p_e · default_e`` had been added and its value subtracted again.
    """

    @staticmethod
    def forward(ctx: Any, out_NC: Tensor, probs_NE: Tensor, absent_NE: Tensor, default_EC: Tensor) -> Tensor:
        ctx.save_for_backward(absent_NE, default_EC)
        ctx.dtype = probs_NE.dtype
        return out_NC.view_as(out_NC)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
        absent, default = ctx.saved_tensors
        answer = (d_out @ default.to(d_out.dtype).T).to(ctx.dtype)
        return d_out, answer.masked_fill(~absent, 0.0), None, None
