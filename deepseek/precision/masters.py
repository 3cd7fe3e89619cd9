"""Master weights: matrices are *stored* in the compute format, and the optimizer holds them in fp32.

Autocast converts every fp32 matrix in every forward pass and every gradient back; for a model of a billion parameters
that is more memory traffic than the optimizer's. Stored low, weights and gradients cost half the bytes, and the fp32
masters are touched once a step, by the optimizer. Small vectors stay fp32: norms, router, gates, sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek.nn.moe import MoE
from deepseek.precision.policy import Policy


def lowered(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that ``lower`` converts: those of linear layers and embeddings, and the experts' matrices."""
    chosen: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            chosen.update(module.parameters(recurse=False))
        elif isinstance(module, MoE):
            chosen.update((module.gate_up, module.down))
    return [p for p in model.parameters() if p in chosen]


def lower(model: nn.Module, policy: Policy) -> dict[nn.Parameter, Tensor]:
    """Convert the model's matrices to ``policy.dtype`` in place; the fp32 weights they had, by parameter.

    A tied matrix is one parameter and has one master. Nothing is converted, and the result is empty, unless
    ``policy.masters``.
    """
    masters: dict[nn.Parameter, Tensor] = {}
    for p in lowered(model) if policy.masters else []:
        masters[p] = p.data.to(torch.float32)
        p.data = p.data.to(policy.dtype)
    return masters
