"""Norm, feed-forward and initialisation: the small layers every block is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.ops import rms_norm as fused
from deepseek.ops.experts import swiglu
from deepseek.ops.swiglu import fuses_network, swiglu_linear, swiglu_network
from deepseek.ops.triton import fuses


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
    """Root-mean-square norm over the last dimension, computed in fp32 at least (arXiv 1910.07467).

    On a GPU one kernel each way, differentiable once; a compiler fuses a norm that is called with what is around it.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if fused.fuses(x) and not torch.compiler.is_compiling():
            return fused.rms_norm(x, self.weight, self.eps)
        wide = widen(x)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` for the residual stream, and its norm; that ``x`` must not be changed in place."""
        return fused.rms_norm_beside(x, self.weight, self.eps) if self._joins(x) else (x, self(x))

    def after_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """``x + y`` and its norm."""
        if self._joins(x) and (x.dtype, x.shape) == (y.dtype, y.shape):
            return fused.add_rms_norm(x, y, self.weight, self.eps)
        x = x + y
        return x, self(x)

    def after_sum_twice(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``x + y`` and its norm, and that once more where two readers' gradients meet in its kernel."""
        if self._joins(x) and (x.dtype, x.shape) == (y.dtype, y.shape):
            return fused.add_rms_norm_twice(x, y, self.weight, self.eps)
        return *self.after_sum(x, y), None

    def _joins(self, x: Tensor) -> bool:
        """Whether norm and residual stream are one operation; not under autocast, which a compiler fuses with them."""
        return fused.fuses(x) and x.dtype == compute_dtype(x.device, x.dtype) and is_plain(self, RMSNorm)


class SwiGLU(nn.Module):
    """Gated feed-forward ``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202); gate and up are one matrix."""

    def __init__(self, hidden: int, size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * size, bias=bias)
        self.down = nn.Linear(size, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.gate_up, self.down
        plain = is_plain(down, nn.Linear)
        if plain and is_plain(up, nn.Linear) and all(layer.bias is None for layer in (up, down)):
            x = to_compute_dtype(x)
            if fuses_network(x, up.weight, down.weight):
                return swiglu_network(x, up.weight, down.weight)
        hidden = up(x)
        if fuses(hidden) and plain:
            return swiglu_linear(hidden, down.weight, down.bias)
        return down(swiglu(hidden))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` is nothing but what its ``kind`` computes: no subclass, nobody who listens.

    Some libraries put a ``forward`` of their own into a module, to bring its weights; a compiler has no use for those.
    """
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if type(module) is not kind or any(hooks):
        return False
    return torch.compiler.is_compiling() or "forward" not in vars(module)


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
