"""Balance as the dual of an assignment problem, and the response to drift (F13, S3 §1.1).

Routing with even loads is a linear program: choose ``x_ne`` in [0, 1] that maximise ``Σ p_ne x_ne`` with K experts for
every token and at most ``N·K/E`` tokens for every expert. For given prices of the capacities its solution is top-k of
``p − price``: the selection bias is the negative price. Three ways to find it, one step at a time:

* **sign**: ``± rate`` against the load error, the published rule (arXiv 2408.15664), a sub-gradient step;
* **proportional**: the same step, smaller near balance, so that it comes to rest;
* **dual**: what the bias would have to be, given all the others', for the expert to get its share exactly: an order
  statistic of what the expert offers a token above the token's K-th best other choice (the idea of arXiv 2502.15451).
  All experts move at once, hence damped. It costs a sort of a sample of tokens.

``DriftResponse`` watches each expert's input: an abrupt change of its distribution lets the bias move faster for a
while. ``LoadBalancer`` and ``DynamicGate`` are the source's dense gate with a definite meaning.

Shape letters: N tokens, E experts, K experts per token, C hidden size, D = 1 + 2C.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.errors import ConfigError

BiasStep = Literal["proportional", "sign", "dual"]

DUAL_SAMPLE = 4096  #: tokens at most that the order statistics are taken over, per forward pass
DUAL_DAMPING = 0.2  #: share of the way to the solution that one step goes
DUAL_REACH = (
    10.0  #: its largest step, in units of ``bias_rate``: it knows how far to go, the others feel their way
)
DRIFT_SAMPLE = 64  #: rows of an expert that its input's moments are taken over, per forward pass
DRIFT_DECAY = 0.99  #: of the moments' running sums
DRIFT_WARM_UP = 50  #: steps without an alarm, while the statistic's own mean and spread are learnt
DRIFT_CONFIRM = 2  #: steps in a row that an alarm takes
DRIFT_STEPS = 50  #: steps that the response lasts
DRIFT_BOOST = 5.0  #: factor of the bias rate meanwhile


def dual_gap(probs_NE: Tensor, bias_E: Tensor, top_k: int, valid_N: Tensor | None = None) -> Tensor:
    """How far each bias is from the one with which, all others fixed, K/E of the tokens would choose the expert.

    Args:
        probs_NE: what the router says, floating point. bias_E: what was added to it for the choice.
        valid_N: bool; other tokens are not counted.

    Returns:
        ``[E]``, to be added to the bias, in the dtype of ``probs``; zero where there is nothing to choose.
    """
    experts = probs_NE.shape[1]
    stride = -(-probs_NE.shape[0] // DUAL_SAMPLE)
    probs = probs_NE[::stride]
    if top_k >= experts:
        return torch.zeros_like(bias_E, dtype=probs.dtype)
    biased = probs + bias_E
    best = biased.topk(top_k + 1, dim=-1).values
    other = torch.where(biased >= best[:, top_k - 1 : top_k], best[:, top_k:], best[:, top_k - 1 : top_k])
    lead = (probs - other).T  # the expert is chosen where lead + bias > 0
    most = max(1, probs.shape[0] * top_k // experts)
    if valid_N is None:
        top = lead.topk(min(most + 1, lead.shape[1]), dim=-1).values[:, -2:].mean(-1)
        return -top - bias_E
    valid = valid_N[::stride]
    share = (valid.sum() * top_k // experts).clamp(min=1)
    ranked = lead.masked_fill(~valid, -2.0).topk(min(most + 1, lead.shape[1]), dim=-1).values
    top = (ranked.index_select(1, share[None] - 1) + ranked.index_select(1, share[None]))[:, 0] / 2
    return torch.where(valid.sum() > top_k, -top - bias_E, 0.0)


def bias_step(
    rule: BiasStep, rate: float, load_E: Tensor, gap_E: Tensor, boost: Tensor | float = 1.0
) -> Tensor:
    """How the selection bias moves: ``[E]``, not yet centred.

    Args:
        rate: the largest step; ``DUAL_REACH`` times that for 'dual'.
        load_E: each expert's share of the choices; sums to one.
        gap_E: mean of ``dual_gap``; only 'dual' looks at it.
        boost: factor of the rate, and of the damping up to a half.
    """
    fastest = rate * boost
    if rule == "dual":
        damping = DUAL_DAMPING * boost if isinstance(boost, float) else (DUAL_DAMPING * boost).clamp(max=0.5)
        reach = DUAL_REACH * fastest
        return reach * (damping * gap_E / reach).clamp(-1, 1)
    lack = 1 - load_E * load_E.numel()  # 1 for an idle expert, -1 at twice the share
    return fastest * (lack.sign() if rule == "sign" else lack.clamp(-1, 1))


# --- drift ----------------------------------------------------------------------------------------------------------


def input_moments(x_NC: Tensor, token_R: Tensor, ends_E: Tensor, valid_N: Tensor | None = None) -> Tensor:
    """Count, sum and sum of squares of at most ``DRIFT_SAMPLE`` evenly spaced rows of every expert's input.

    Args:
        x_NC: tokens. token_R, ends_E: see ``deepseek.ops.experts.Dispatch``. valid_N: bool; others do not count.

    Returns:
        ``[E, 1 + 2C]``, fp32 at least.
    """
    count = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    taken = count.clamp(max=DRIFT_SAMPLE)
    i = torch.arange(DRIFT_SAMPLE, device=x_NC.device, dtype=torch.int32)
    row = (ends_E - count)[:, None] + i * count[:, None] // taken.clamp(min=1)[:, None]
    there = i < taken[:, None]
    token = token_R.index_select(0, torch.where(there, row, 0).flatten())
    if valid_N is not None:
        there = there & valid_N.index_select(0, token).view_as(there)
    wide = torch.promote_types(x_NC.dtype, torch.float32)
    x = x_NC.index_select(0, token).view(*there.shape, -1).to(wide) * there[..., None]
    return torch.cat((there.sum(1, keepdim=True).to(wide), x.sum(1), x.square().sum(1)), dim=1)


def shift_statistic(now_ED: Tensor, past_ED: Tensor) -> Tensor:
    """How much better the inputs' own Gaussians explain them than the past's: a scalar.

    ``Σ_e n_e · KL(now_e ‖ past_e) / C`` of diagonal Gaussians: the log-likelihood ratio, whose mean hardly depends on
    how many tokens an expert happened to get. The present variance, of few tokens, is drawn towards the past one.

    Args:
        now_ED, past_ED: count, sum and sum of squares, as ``input_moments`` returns them.
    """
    (n, mean, variance), (seen, mean_0, variance_0) = _gaussian(now_ED), _gaussian(past_ED)
    variance_0 = variance_0 + 1e-6 * (mean_0.square() + variance_0).mean() + 1e-12
    ratio = (n * variance / variance_0 + PRIOR) / (n + PRIOR)
    kl = 0.5 * (ratio - 1 - ratio.log() + (mean - mean_0).square() / variance_0)
    return (torch.where(seen > 0, n, 0.0) * kl).sum() / mean.shape[1]


PRIOR = 8.0  #: tokens that the past variance counts for in the present one


def _gaussian(moments_ED: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count ``[E, 1]``, mean and variance ``[E, C]``."""
    size = moments_ED.shape[1] // 2
    count, total, square = moments_ED.split((1, size, size), dim=1)
    mean = total / count.clamp(min=1e-6)
    return count, mean, (square / count.clamp(min=1e-6) - mean.square()).clamp(min=0)


class DriftResponse(nn.Module):
    """Watches the input of one layer's experts and says how much faster the bias should move.

    An alarm is given when ``shift_statistic`` exceeds its own running mean + 3 σ for ``DRIFT_CONFIRM`` steps in a row.
    For ``DRIFT_STEPS`` steps it halves the horizon of the running moments and multiplies the bias rate by
    ``DRIFT_BOOST``. All state is in two buffers; nothing is read by the host.
    """

    moments_ED: Tensor  #: running count, sum, sum of squares
    watch: Tensor  #: of the statistic: running weight, sum, sum of squares; steps in a row above; steps of boost left

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("moments_ED", torch.zeros(experts, 1 + 2 * hidden))
        self.register_buffer("watch", torch.zeros(5))

    @torch.no_grad()
    def update(self, now_ED: Tensor, apply: Tensor | None = None) -> Tensor:
        """Take in a step's ``input_moments``; returns the factor of the bias rate, a scalar.

        ``apply``: a bool scalar on the device; where it is false nothing moves.
        """
        weight, total, square, above, left = self.watch.unbind()
        shift = shift_statistic(now_ED, self.moments_ED).to(self.watch.dtype)
        mean = total / weight.clamp(min=1)
        limit = mean + 3 * (square / weight.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        known = weight > (1 - DRIFT_DECAY**DRIFT_WARM_UP) / (1 - DRIFT_DECAY)
        above = torch.where(known & (shift > limit), above + 1, 0.0)
        left = (left - 1).clamp(min=0)
        alarm = (above >= DRIFT_CONFIRM) & (left == 0)
        left = torch.where(alarm, float(DRIFT_STEPS), left)
        # What is far out moves the limit as little as what lies on it.
        shift = torch.where(known, torch.minimum(shift, limit), shift)
        sums = torch.stack((torch.ones_like(shift), shift, shift.square()))
        watch = torch.cat((DRIFT_DECAY * self.watch[:3] + sums, torch.stack((above, left))))
        decay = torch.where(left > 0, DRIFT_DECAY**2, DRIFT_DECAY)
        keep(self.moments_ED, self.moments_ED * decay + now_ED.to(self.moments_ED.dtype), apply)
        keep(self.watch, watch, apply)
        return torch.where(left > 0, DRIFT_BOOST, 1.0)


def keep(old: Tensor, new: Tensor, apply: Tensor | None) -> None:
    """``old`` becomes ``new``, in place; where ``apply`` is false it stays."""
    old.copy_(new if apply is None else torch.where(apply, new, old))


# --- the source's dense gate ----------------------------------------------------------------------------------------


class LoadBalancer(nn.Module):
    """Probabilities → probabilities that use every expert alike: ``p'_e ∝ p_e · exp(b_e)``.

    ``b`` is learnt outside autograd, in training only: after a batch an expert that had more than its share of the load
    loses up to ``rate``, one that had less gains as much (S3 §1.1). The load is the mean of the adjusted probabilities
    or, with ``top_k``, the share of tokens that would choose the expert. ``b`` works from the next batch on, so that a
    batch's result does not depend on its own load. Unlike ``MoE``'s bias, which only selects, ``b`` changes the weights
    and the gradient passes through it. With several processes, each learns from its own tokens.

    Args:
        num_experts: E, at least 1.
        rate: the largest step of ``b``, a logit.
        top_k: measure the load by choices instead of probabilities; 0 does not.
    """

    bias: Tensor

    def __init__(self, num_experts: int, *, rate: float = 0.01, top_k: int = 0) -> None:
        super().__init__()
        if num_experts < 1 or not 0 <= top_k <= num_experts or rate < 0:
            raise ConfigError(
                f"num_experts={num_experts} must be at least 1, top_k={top_k} between 0 and num_experts, "
                f"rate={rate} not negative"
            )
        self.rate, self.top_k = rate, top_k
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, probs: Tensor) -> Tensor:
        """``[..., E]`` that sum to one → the same, adjusted, in the dtype of ``probs``."""
        if probs.shape[-1:] != self.bias.shape:
            raise ConfigError(
                f"probabilities of {probs.shape[-1]} experts, but the balancer has {len(self.bias)}"
            )
        wide = probs.to(torch.promote_types(probs.dtype, self.bias.dtype))
        weighted = wide * self.bias.exp()
        adjusted = weighted / weighted.sum(-1, keepdim=True)
        if self.training:
            self._learn(adjusted.detach().reshape(-1, self.bias.shape[0]))
        return adjusted.to(probs.dtype)

    @torch.no_grad()
    def _learn(self, probs_NE: Tensor) -> None:
        if self.top_k:
            chosen = probs_NE.topk(self.top_k, dim=-1).indices
            load = torch.zeros_like(probs_NE).scatter(1, chosen, 1.0 / self.top_k).mean(0)
        else:
            load = probs_NE.mean(0)
        moved = self.bias + bias_step("proportional", self.rate, load, load)
        self.bias.copy_(moved - moved.mean())


class DynamicGate(nn.Module):
    """The source's gate (S3 §1.1): linear, softmax, ``LoadBalancer``.

    Args:
        num_experts: E.
        input_dim: features of a token.
        rate, top_k: as in ``LoadBalancer``.
    """

    def __init__(self, num_experts: int, input_dim: int, *, rate: float = 0.01, top_k: int = 0) -> None:
        super().__init__()
        self.gate = nn.Linear(input_dim, num_experts)
        self.load_balancer = LoadBalancer(num_experts, rate=rate, top_k=top_k)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., input_dim]`` → probabilities ``[..., num_experts]`` that sum to one; fp32 at least."""
        logits = self.gate(x)
        probs = F.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        adjusted: Tensor = self.load_balancer(probs)
        return adjusted
