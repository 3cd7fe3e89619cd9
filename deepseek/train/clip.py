"""Gradient clipping by the global norm, without reading anything back from the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def clip_gradients(parameters: Iterable[nn.Parameter], threshold: float) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most ``threshold`` (0: only measure).

    Returns:
        The norm before clipping, a scalar tensor on the device.
    """
    params = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if threshold > 0:
        torch.nn.utils.clip_grads_with_norm_(params, threshold, norm)
    return norm
