"""AdamW (arXiv 1711.05101) that never waits for the device: clip factor, betas and the finite-step flag are tensors.

Plain fp32 parameters go through torch's fused step, those with an fp32 master through ``deepseek.ops.adamw``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deepseek.ops.adamw import adamw_
from deepseek.train.part import Part, Shape


class AdamW(Part):
    """Adam with decoupled weight decay.

    Args:
        moving: betas change from step to step. The bias correction is then by the product of the betas so far, kept in
            the state as ``product``; a constant beta's is ``beta ** step``.
    """

    HYPER: ClassVar[tuple[str, ...]] = ("lr", "beta1", "beta2")

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, ...] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        masters: Mapping[nn.Parameter, Tensor] | None = None,
        moving: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay,
            "moving_betas": moving,
        }  # fmt: skip
        super().__init__(groups, defaults, masters)
        self.moving = moving

    def new_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        weight = self.weight(p)
        state = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
        state |= {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
        return state | ({"product": torch.ones(2, device=p.device)} if self.moving else {})

    def state_shapes(self, p: nn.Parameter) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
        return shapes | ({"product": (2,)} if self.moving else {})

    @torch.no_grad()
    def update(self, scale: Tensor | None = None, apply: Tensor | None = None) -> None:
        for number, group in enumerate(self.param_groups):
            params = self.ready(group)
            counts = [self.state[p]["step"] for p in params]
            if params:
                one = torch.ones_like(counts[0]) if apply is None else apply.float()
                torch._foreach_add_(counts, [one] * len(counts))  # a bare tensor would be read by the host
            apart = [p for p in params if self.moving or p in self.masters]
            fused = [p for p in params if not (self.moving or p in self.masters)]
            if fused:
                self._fused(fused, number, scale, apply)
            if apart:
                self._one_by_one(apart, number, scale, apply)

    def _fused(
        self, params: list[nn.Parameter], number: int, scale: Tensor | None, apply: Tensor | None
    ) -> None:
        """All of them in torch's one kernel, which divides gradients by ``grad_scale`` and skips on ``found_inf``."""
        group, states = self.param_groups[number], [self.state[p] for p in params]
        cuda = self.device.type == "cuda"
        torch._fused_adamw_(
            [p.data for p in params], [self.gradient(p) for p in params],
            [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states],
            lr=self.scalars[number]["lr"].float() if cuda else group["lr"], beta1=group["beta1"],
            beta2=group["beta2"], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
            grad_scale=None if scale is None else scale.float().reciprocal(),
            found_inf=None if apply is None else (~apply).float(),
        )  # fmt: skip

    def _one_by_one(
        self, params: list[nn.Parameter], number: int, scale: Tensor | None, apply: Tensor | None
    ) -> None:
        rows = self._scalars(params, number, scale, apply)
        for p, row in zip(params, rows):
            state = self.state[p]
            adamw_(p.data, self.weight(p), state["exp_avg"], state["exp_avg_sq"], self.gradient(p), row)

    def _scalars(
        self, params: list[nn.Parameter], number: int, scale: Tensor | None, apply: Tensor | None
    ) -> list[Tensor]:
        """``deepseek.ops.adamw.SCALARS`` of every parameter, computed for all of them at once."""
        group, lr = self.param_groups[number], self.scalars[number]["lr"]
        beta1, beta2 = self.scalars[number]["beta1"], self.scalars[number]["beta2"]
        one = torch.ones_like(lr)
        applied = one if apply is None else apply.to(lr.dtype)
        kept1, kept2 = self._bias(params, beta1, beta2, applied)
        columns = [
            beta1, 1 - beta1, beta2, 1 - beta2, one * group["eps"], 1 - lr * group["weight_decay"],
            lr / (1 - kept1), (1 - kept2).rsqrt(), one if scale is None else scale.to(lr.dtype), applied,
        ]  # fmt: skip
        table = torch.stack([c.expand(len(params)) for c in columns], 1)
        return list(table.to(self.weight(params[0]).dtype).unbind())

    def _bias(
        self, params: list[nn.Parameter], beta1: Tensor, beta2: Tensor, applied: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Πβ₁ and Πβ₂ of each parameter ``[n]``: the share of the moments that is still zero. Never 1."""
        if not self.moving:
            steps = torch.stack([self.state[p]["step"] for p in params]).to(beta1.dtype).clamp(min=1)
            return beta1**steps, beta2**steps
        products = [self.state[p]["product"] for p in params]
        factor = torch.where(applied > 0, torch.stack([beta1, beta2]), 1.0).float()
        torch._foreach_mul_(products, [factor] * len(products))
        kept = torch.stack(products).to(beta1.dtype)
        kept1, kept2 = torch.where(kept < 1, kept, 0.0).unbind(1)
        return kept1, kept2
