"""Triton kernels, each registered or called over a plain-torch reference. Optional: the extra ``kernels``.

Nothing here is imported before a kernel is needed. ``TRITON_INTERPRET=1`` runs them on CPU tensors, for tests.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  #: that kernels of training take; their sums are fp32


@cache
def available() -> bool:
    """Whether kernels can run: Triton is installed and the GPU is an SM80 or newer."""
    return (
        find_spec("triton") is not None
        and torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() >= (8, 0)
    )


def fuses(x: Tensor) -> bool:
    """Whether fused operations of training are meant for ``x``. Compilers trace this: it asks the tensor, not the
    machine."""
    return x.is_cuda and x.dtype in DTYPES


_interpreted = False  #: set by tests: serving takes the kernels on a CPU too, in Triton's interpreter


def runs_on(device: torch.device) -> bool:
    """Whether kernels are how to compute on ``device``."""
    return _interpreted or (device.type == "cuda" and available())


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors; a CPU that interprets kernels counts as four."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def kernels(name: str) -> ModuleType:
    """The module of kernels called ``name``."""
    return import_module(f"deepseek.ops.triton.{name}")
