"""Rotary position embedding (arXiv 2104.09864), in the half-split layout that Llama and its kin use."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.nn.layers import widen


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines for ``positions [..., T]``: two fp32 tensors ``[..., T, head_dim / 2]``."""
    half = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / theta ** (half / head_dim)  # rounds as public checkpoints' code does
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate ``x [B, H, T, D]`` by a table ``[T, D/2]`` or ``[B, 1, T, D/2]``, computed in fp32 at least."""
    cos, sin = table
    a, b = widen(x).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
