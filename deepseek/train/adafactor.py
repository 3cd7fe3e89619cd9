"""Adafactor (arXiv 1804.04235) with an optional small first moment: AdamW's behaviour at a fraction of its state (F29).

The second moment of an m × n matrix is kept as its row and column means: m + n numbers for m·n, per matrix of a bank of
experts. The first moment, which the original does without, costs two bytes a weight in bf16 or one in int8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.train.part import Part, Shape, cleaned

Moment = Literal["none", "bf16", "int8"]
BLOCK = 256  #: int8 values that share one fp32 scale
TINY = 1e-30


class DSAdafactor(Part):
    """``p ← p·(1 − lr·wd) − rate · u / max(1, rms(u))``, ``u`` the gradient over the root of its factored mean square.

    The mean squares have β₂ = 1 − t^−0.8; ``rms`` is that of one matrix. ``rate`` is ``lr``, or with ``relative`` the
    original's ``max(1e-3, rms(p)) · min(lr, 1/√t)``. With a ``moment``, the running average (decay β₁) of the clipped
    ``u`` takes its place.
    """

    HYPER: ClassVar[tuple[str, ...]] = ("lr", "beta1")

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        beta1: float = 0.9,
        weight_decay: float = 0.0,
        moment: Moment = "none",
        relative: bool = False,
        masters: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        super().__init__(groups, {"lr": lr, "beta1": beta1, "weight_decay": weight_decay}, masters)
        self.moment, self.relative = moment, relative

    def state_shapes(self, p: nn.Parameter) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {"step": ()}
        if p.dim() >= 2:
            shapes |= {"row": p.shape[:-1], "column": (*p.shape[:-2], p.shape[-1])}
        else:
            shapes |= {"square": p.shape}
        blocks = -(-p.numel() // BLOCK)
        if self.moment == "int8":
            shapes |= {"moment": (blocks, BLOCK), "moment_scale": (blocks,)}
        return shapes | ({"moment": p.shape} if self.moment == "bf16" else {})

    def new_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        small = {"int8": torch.int8, "bf16": torch.bfloat16, "none": None}[self.moment]
        dtypes = {"moment": small, "step": torch.float32}
        default = self.weight(p).dtype
        return {
            key: torch.zeros(shape, dtype=dtypes.get(key) or default, device=p.device)
            for key, shape in self.state_shapes(p).items()
        }

    @torch.no_grad()
    def update(self, scale: Tensor | None = None, apply: Tensor | None = None) -> None:
        for group, scalars in zip(self.param_groups, self.scalars, strict=True):
            for p in self.ready(group):
                ok = torch.ones((), dtype=torch.bool, device=p.device) if apply is None else apply
                self._one(p, group["weight_decay"], scalars, scale, ok)

    def _one(
        self, p: nn.Parameter, decay: float, scalars: dict[str, Tensor], scale: Tensor | None, apply: Tensor
    ) -> None:
        """Where the step does not apply, the gradient, every share of something new and ``lr`` are zero."""
        state, weight = self.state[p], self.weight(p)
        lr = scalars["lr"] * apply
        state["step"].add_(apply)
        t = state["step"].to(lr.dtype).clamp(min=1)
        grad = cleaned(self.gradient(p), weight.dtype, scale, apply)
        direction = _clipped(self._scaled(grad, state, (t**-0.8 * apply).to(weight.dtype)))
        if self.moment != "none":
            direction = self._averaged(direction, state, scalars["beta1"].to(weight.dtype), apply)
        rate = torch.minimum(lr, t.rsqrt() * apply) if self.relative else lr
        size = _rms(weight).clamp(min=1e-3) if self.relative else torch.ones_like(lr)
        weight.mul_((1 - lr * decay).to(weight.dtype)).sub_(direction.mul_((rate * size).to(weight.dtype)))
        if p in self.masters:
            p.copy_(weight)

    def _scaled(self, grad: Tensor, state: dict[str, Tensor], fresh: Tensor) -> Tensor:
        """The gradient over the root of its mean square, which is brought up to date by the share ``fresh``."""
        if "square" in state:
            state["square"].lerp_(grad.square(), fresh)
            return grad * state["square"].clamp(min=TINY).rsqrt()
        for key, dim in (("row", -1), ("column", -2)):
            mean = torch.linalg.vector_norm(grad, dim=dim).square() / grad.shape[dim]
            state[key].lerp_(mean, fresh)
        row = state["row"] / state["row"].mean(-1, keepdim=True).clamp(min=TINY)
        root_row, root_column = (x.clamp(min=TINY).rsqrt() for x in (row, state["column"]))
        return (grad * root_row[..., :, None]).mul_(root_column[..., None, :])

    def _averaged(self, direction: Tensor, state: dict[str, Tensor], beta: Tensor, apply: Tensor) -> Tensor:
        """The running average of directions, computed wide and kept narrow."""
        if self.moment == "bf16":
            wide = direction.lerp(state["moment"].to(direction.dtype), beta)
            state["moment"].copy_(torch.where(apply, wide, state["moment"].to(wide.dtype)))
            return wide
        old = dequantize(state["moment"], state["moment_scale"], direction)
        wide = direction.lerp(old, beta)
        values, scales = quantize(wide)
        state["moment"].copy_(torch.where(apply, values, state["moment"]))
        state["moment_scale"].copy_(torch.where(apply, scales, state["moment_scale"]))
        return wide


def _rms(x: Tensor) -> Tensor:
    """Root mean square of every matrix (of a vector, one), kept as dimensions."""
    dims = (-2, -1) if x.dim() >= 2 else (-1,) if x.dim() else ()
    count = x.shape[-1] * x.shape[-2] if x.dim() >= 2 else x.numel()
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True) / count**0.5 if dims else x.abs()


def _clipped(direction: Tensor) -> Tensor:
    """``direction`` with a root mean square of at most one, in place."""
    return direction.div_(_rms(direction).clamp(min=1.0))


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 ``[blocks, 256]`` and one scale ``[blocks]`` per block: its largest magnitude is 127."""
    blocks = F.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1) / 127
    return (blocks / scale.clamp(min=TINY)[:, None]).round().to(torch.int8), scale


def dequantize(values: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """Inverse of ``quantize``, in the shape and dtype of ``like``."""
    wide = values.to(like.dtype) * scale.to(like.dtype)[:, None]
    return wide.flatten()[: like.numel()].view_as(like)
