"""Gradient clipping that reads nothing back from the device: by the norm, by its history, or unit by unit (F30).

Clipping answers explosions. It does nothing for vanishing gradients, and a threshold below the usual norm only makes
every step smaller: hence ``ZClip``, which knows what is usual.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["norm", "zclip", "agc"]
Pairs = Sequence[tuple[nn.Parameter, Tensor]]  #: parameters with their gradients


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The joint L2 norm, a scalar tensor, accumulated in fp32 (fp64 for fp64) without a wider copy of any gradient."""
    return torch.linalg.vector_norm(each_norm(gradients))


def each_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each tensor, ``[P]`` in their order: fp32, or fp64 where one of them is."""
    if not tensors:
        return torch.zeros(0)
    norms: dict[int, Tensor] = {}
    for dtype, places in _by_dtype(tensors).items():
        wide = torch.promote_types(dtype, torch.float32)
        norms |= zip(places, torch._foreach_norm([tensors[i] for i in places], 2, dtype=wide))
    return torch.stack([norms[i] for i in range(len(tensors))])


def _by_dtype(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[int]]:
    """The places of the tensors of each dtype."""
    found: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(tensors):
        found.setdefault(tensor.dtype, []).append(place)
    return found


def clip_factor(norm: Tensor, threshold: float) -> Tensor:
    """What gradients of this norm are multiplied by so that it is at most ``threshold`` (0: 1, always)."""
    if threshold <= 0:
        return torch.ones_like(norm)
    return (threshold / (norm + 1e-6)).clamp(max=1.0)


def clip_gradients(parameters: Iterable[nn.Parameter], threshold: float) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most ``threshold`` (0: only measure).

    Returns:
        The norm before clipping, a scalar tensor on the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(gradients)
    if threshold > 0 and gradients:
        torch._foreach_mul_(gradients, clip_factor(norm, threshold))
    return norm


class Clip(ABC):
    """``clip(pairs, norm, apply) -> (factor, clipped)``, scalars on the device.

    The factor is for the optimizer to multiply gradients by. ``state`` is kept in checkpoints and changes in place, and
    only where ``apply``, a bool scalar, is true.
    """

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    @abstractmethod
    def __call__(
        self, pairs: Pairs, norm: Tensor, apply: Tensor, loss_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """``norm`` is that of the gradients without ``loss_scale``, which those in ``pairs`` still have."""


class NormClip(Clip):
    """Joint L2 norm of at most ``threshold``; 0: no clipping."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def __call__(
        self, pairs: Pairs, norm: Tensor, apply: Tensor, loss_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        clipped = norm > self.threshold if self.threshold > 0 else torch.zeros_like(norm, dtype=torch.bool)
        return clip_factor(norm, self.threshold), clipped


class ZClip(Clip):
    """Clip what is unusual for this run: a norm more than ``z`` standard deviations above its running mean.

    As ZClip (arXiv 2504.02507), a norm of z-score s > z is brought down to the mean plus z²/s deviations, and that
    value is what enters the statistics, so that spikes do not become usual. Unlike there, mean and deviation are those
    of the norm's *logarithm*: norms are positive and skewed, and on raw ones 1–5% of the steps of an undisturbed run
    would be clipped. Values below twice the limit enter the statistics as they are, else the variance would shrink
    step by step.

    For the first ``warmup`` finite steps, which only make up the statistics, gradients are clipped at ``threshold``.
    """

    FLOOR = 0.05  #: the least deviation: a norm 13% above the mean is no spike, however calm the run

    def __init__(
        self,
        threshold: float,
        z: float = 2.5,
        alpha: float = 0.97,
        warmup: int = 25,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.threshold, self.z, self.alpha, self.warmup = threshold, z, alpha, warmup
        self.state = {key: torch.zeros((), device=device) for key in ("count", "mean", "variance")}

    def __call__(
        self, pairs: Pairs, norm: Tensor, apply: Tensor, loss_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        count, mean, variance = self.state["count"], self.state["mean"], self.state["variance"]
        early = count < self.warmup
        x = norm.float().clamp(min=1e-30).log()
        deviation = variance.sqrt().clamp(min=self.FLOOR)
        score = (x - mean) / deviation
        target = mean + self.z**2 / score.clamp(min=self.z) * deviation
        spike = (score > self.z) & ~early
        self._learn(torch.where((score > 2 * self.z) & ~early, target, x), early, apply)
        factor = torch.where(spike, (target - x).exp(), 1.0).to(norm.dtype)
        fixed = clip_factor(norm, self.threshold)
        return torch.where(early, fixed, factor), torch.where(early, fixed < 1, spike)

    def _learn(self, x: Tensor, early: Tensor, apply: Tensor) -> None:
        """Plain averages at first, exponential ones of decay ``alpha`` later."""
        count, mean, variance = self.state["count"], self.state["mean"], self.state["variance"]
        share = torch.where(early, 1 / (count + 1), 1 - self.alpha)
        off = x - mean
        new = {
            "count": count + 1,
            "mean": mean + share * off,
            "variance": torch.where(early, (1 - share) * (variance + share * off**2), variance.lerp(off**2, share)),
        }  # fmt: skip
        for key, value in new.items():
            self.state[key].copy_(torch.where(apply, value, self.state[key]))


class AGC(Clip):
    """Adaptive gradient clipping (arXiv 2102.06171): a unit's gradient is at most ``ratio`` times its weight's norm.

    A unit is what makes one output: a row of a linear layer, a column of an expert's ``[in, out]`` matrix, a whole
    vector. Weights of a norm below ``floor`` count as of that norm, so that what starts at zero can move. Gradients are
    scaled in place. The embedding and the head are left alone: give them here as ``except_for``.
    """

    def __init__(
        self, ratio: float = 0.01, floor: float = 1e-3, except_for: Iterable[nn.Parameter] = ()
    ) -> None:
        super().__init__()
        self.ratio, self.floor, self.except_for = ratio, floor, set(except_for)

    def __call__(
        self, pairs: Pairs, norm: Tensor, apply: Tensor, loss_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        clipped = torch.zeros_like(norm, dtype=torch.bool)
        for p, gradient in pairs:
            if p not in self.except_for:
                limit = unit_norm(p.detach()).clamp(min=self.floor) * (self.ratio * loss_scale)
                factor = limit / unit_norm(gradient).clamp(min=1e-30)
                gradient.mul_(factor.clamp(max=1.0))
                clipped |= (factor < 1).any()
        return torch.ones_like(norm), clipped


def unit_norm(x: Tensor) -> Tensor:
    """L2 norm of every unit in fp32 (fp64 for fp64), kept as a dimension: ``[out, 1]``, ``[E, 1, out]``, ``[1]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dim() < 2:
        return torch.linalg.vector_norm(x, dtype=wide).expand(1)
    return torch.linalg.vector_norm(x, dim=-1 if x.dim() == 2 else -2, keepdim=True, dtype=wide)


def build_clip(kind: Kind, threshold: float, model: nn.Module) -> Clip:
    """The clipping called ``kind``; ``threshold`` is ``train.grad_clip_threshold``."""
    if kind == "zclip":
        return ZClip(threshold, device=next(model.parameters()).device)
    if kind == "agc":
        named = model.named_parameters()
        return AGC(except_for=[p for name, p in named if name.startswith(("embedding", "head"))])
    return NormClip(threshold)
