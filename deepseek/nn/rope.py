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


_tables: dict[tuple[int, int, float, torch.device], tuple[Tensor, Tensor]] = {}


def counted_rope_table(
    length: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``rope_table`` of positions ``0 … length − 1``; the last few are kept, as every training step asks for one."""
    if torch.compiler.is_compiling() or device.type == "meta":
        return rope_table(torch.arange(length, device=device), head_dim, theta)
    key = length, head_dim, theta, device
    if key not in _tables:
        while len(_tables) >= 8:
            del _tables[next(iter(_tables))]
        with torch.inference_mode(False):  # a table made in inference mode could not be used in training
            _tables[key] = rope_table(torch.arange(length, device=device), head_dim, theta)
    return _tables[key]


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate ``x [B, H, T, D]`` by a table ``[T, D/2]`` or ``[B, 1, T, D/2]``, computed in fp32 at least.

    The result lies in memory as ``[B, T, H, D]``, the layout of the projections: attention kernels answer in the layout
    of the query, and nothing has to be copied on the way in or out.
    """
    cos, sin = (t.movedim(-2, -3) if t.dim() == 4 else t[:, None] for t in table)
    a, b = widen(x).transpose(1, 2).chunk(2, dim=-1)
    y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return y.to(x.dtype).transpose(1, 2)
