"""Norm, feed-forward and initialisation: the small layers every block is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.ops.experts import swiglu
from deepseek.ops.swiglu import fuses, swiglu_linear


def widen(x: Tensor) -> Tensor:
    """``x`` in fp32, or as it is when it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In what tensors of ``dtype`` are multiplied: autocast's dtype where autocast is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def to_compute_dtype(x: Tensor) -> Tensor:
    """``x`` in autocast's dtype where autocast is on: here once, not once in every layer that reads it."""
    return x.to(compute_dtype(x.device, x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32 at least (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """Gated feed-forward ``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202); gate and up are one matrix."""

    def __init__(self, hidden: int, size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * size, bias=bias)
        self.down = nn.Linear(size, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.gate_up(x)
        if fuses(hidden) and _is_plain(self.down):
            return swiglu_linear(hidden, self.down.weight, self.down.bias)
        return self.down(swiglu(hidden))


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling ``linear`` is nothing but its product: no subclass, nobody who listens."""
    hooks = (
        linear._forward_hooks,
        linear._forward_pre_hooks,
        linear._backward_hooks,
        linear._backward_pre_hooks,
    )
    return type(linear) is nn.Linear and not any(hooks)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int] | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.layer_norm`` that takes the last dimension when no shape is given (S4 §1 calls it so)."""
    shape = list(normalized_shape) if normalized_shape is not None else [x.shape[-1]]
    return F.layer_norm(x, shape, weight, bias, eps)
