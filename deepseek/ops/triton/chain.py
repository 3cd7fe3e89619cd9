"""A chain of short kernels, each begun before the one before it has ended (programmatic dependent launch, Hopper on).

Between two kernels of a decoding step the GPU is idle for about a microsecond: blocks start, read their arguments, wait
for memory. With this, the blocks of the next kernel start as soon as all of this one's have, fetch what does not depend
on it (weights, above all), and wait for it only then. Rules, for every kernel launched with ``options``:

- ``begin(CHAIN)`` first, ``wait(CHAIN)`` before anything that an earlier kernel of the step wrote is read, and before
  anything is written. All programs wait, those with nothing to do too: the kernel after this one relies on this one's
  end meaning the end of everything before.
- Only what never changes while steps run may be read before ``wait``.
- A kernel that calls ``wait`` first and ``begin`` after it lets the next one begin only when everything before itself
  has ended: that next one may read what those wrote before its own ``wait`` (``decode_experts``), past the L1 cache.

Kernels of others (cuBLAS, torch) may stand between: they begin when all before them has ended, as ever.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def begin(CHAIN: tl.constexpr):
    """Let the next kernel's blocks start when they find room."""
    if CHAIN:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(CHAIN: tl.constexpr):
    """Wait until everything before this kernel has ended."""
    if CHAIN:
        tl.extra.cuda.gdc_wait()


def options(device: torch.device) -> dict[str, Any]:
    """Launch options: ``CHAIN`` for the kernel, and what the launch itself takes."""
    return {"CHAIN": True, "launch_pdl": True} if _chains(device) else {"CHAIN": False}


@cache
def _chains(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
