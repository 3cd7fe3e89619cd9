"""Gradient clipping by the global norm, without reading anything back from the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The joint L2 norm, a scalar tensor, accumulated in fp32 (fp64 for fp64) without a wider copy of any gradient."""
    if not gradients:
        return torch.zeros(())
    norms: list[Tensor] = []
    for same in _by_dtype(gradients).values():
        wide = torch.promote_types(same[0].dtype, torch.float32)
        norms += torch._foreach_norm(same, 2, dtype=wide)
    return torch.linalg.vector_norm(torch.stack(norms))


def _by_dtype(gradients: Sequence[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        found.setdefault(gradient.dtype, []).append(gradient)
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
