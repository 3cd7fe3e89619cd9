"""What all optimizers here share: they are told on the device whether a step counts, and hold fp32 masters.

``step(scale, apply)`` multiplies gradients by ``scale`` (clipping, loss scaling) and changes nothing where ``apply`` is
false; neither is read by the host. Learning rates and betas are copied to the device by ``fill``, so that a captured
step can be replayed with others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Shape = torch.Size | tuple[int, ...]


class Part(torch.optim.Optimizer):
    """An optimizer of some of a model's parameters.

    Attributes:
        masters: fp32 weights of parameters that are stored in a lower precision.
        gradients: accumulated gradients that take the place of ``p.grad``.
        scalars: per group, on the device, the hyperparameters named in ``HYPER``, each a scalar of the widest dtype.
    """

    HYPER: ClassVar[tuple[str, ...]] = ("lr",)  #: keys of a group that may change from step to step

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        defaults: dict[str, Any],
        masters: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        super().__init__(groups, defaults)
        params = {p for group in self.param_groups for p in group["params"]}
        self.masters = {p: master for p, master in (masters or {}).items() if p in params}
        self.gradients: Mapping[nn.Parameter, Tensor] = {}
        self.scalars: list[dict[str, Tensor]] = []

    @property
    def device(self) -> torch.device:
        return next(p.device for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def fill(self) -> None:
        """Copy every group's hyperparameters to the device, without waiting for it."""
        device = self.device
        rows = [[float(group[key]) for key in self.HYPER] for group in self.param_groups]
        # Page-locked and new in every step: the copy before may still be on its way.
        values = torch.tensor(rows, dtype=widest(device), pin_memory=device.type == "cuda")
        if not self.scalars:
            self._table = torch.empty(values.shape, dtype=values.dtype, device=device)
            self.scalars = [dict(zip(self.HYPER, row.unbind())) for row in self._table]
        self._table.copy_(values, non_blocking=True)

    def gradient(self, p: nn.Parameter) -> Tensor:
        """What ``p`` is updated with; it must have one."""
        found = self.gradients.get(p, p.grad)
        assert found is not None
        return found

    def weight(self, p: nn.Parameter) -> Tensor:
        """What the update is added to: the master, or the parameter itself."""
        return self.masters.get(p, p.data)

    def ready(self, group: dict[str, Any]) -> list[nn.Parameter]:
        """The group's parameters that have a gradient, with their state in place."""
        found = [p for p in group["params"] if p in self.gradients or p.grad is not None]
        for p in found:
            if not self.state[p]:
                self.state[p] = self.new_state(p)
        return found

    def new_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        """What is remembered of ``p`` before its first step."""
        raise NotImplementedError

    def state_shapes(self, p: nn.Parameter) -> dict[str, Shape]:
        """The names and shapes of what is remembered of ``p``, to check a checkpoint against."""
        raise NotImplementedError

    def step(self, scale: Tensor | None = None, apply: Tensor | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            scale: a scalar that multiplies all gradients; ``None``: 1.
            apply: a bool scalar; where it is false nothing changes, whatever the gradients are. ``None``: true.
        """
        self.fill()
        self.update(scale, apply)

    def update(self, scale: Tensor | None = None, apply: Tensor | None = None) -> None:
        """``step`` with the hyperparameters last filled in: what a CUDA graph captures."""
        raise NotImplementedError


def widest(device: torch.device) -> torch.dtype:
    """The dtype for scalars: fp64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def cleaned(grad: Tensor, dtype: torch.dtype, scale: Tensor | None, apply: Tensor | None) -> Tensor:
    """``grad · scale`` in ``dtype``, zero where the step does not apply (its gradient may be NaN)."""
    wide = grad.to(dtype)
    if scale is not None:
        wide = wide * scale.to(dtype)
    return wide if apply is None else torch.where(apply, wide, 0.0)
