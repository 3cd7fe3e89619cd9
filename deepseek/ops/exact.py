"""Elementwise functions whose result for an element does not depend on how many others there are.

On a CPU torch computes ``exp``, ``sigmoid`` and their like by vectors, and what is left over by another routine; the
two differ in the last bit, and where the left-over begins depends on the tensor's size and on how threads share it.
``exact_map`` fills up to whole vectors and takes pieces that one thread does alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

VECTORS = 64  #: elements; a multiple of what any CPU's vector loop takes at once in fp32
PIECE = 32_768  #: elements that torch gives to one thread


def exact_map(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` for an elementwise function, bit-identical for equal elements; contiguous."""
    flat = x.reshape(-1)
    short = -flat.numel() % VECTORS
    if short:
        flat = F.pad(flat, (0, short))
    pieces = [function(piece) for piece in flat.split(PIECE)]
    y = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return y[: x.numel()].view(x.shape)


def exact_swiglu(x: Tensor) -> Tensor:
    """``silu(a) * b`` for ``x = [a, b]`` along the last dimension, by ``exact_map``."""
    gate, up = x.chunk(2, dim=-1)
    return exact_map(F.silu, gate) * up
