"""Activation memory: what a training step keeps, and ways of keeping less (F07)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deepseek.parallel.saved import SavedBytes


class MemoryReport(NamedTuple):
    """What one training step costs.

    Attributes:
        saved_bytes: kept on the device from forward to backward, weights aside.
        offloaded_bytes: kept on the host instead.
        flops: of the matrix products and attention of forward and backward, recomputation included. Compiled blocks
            run eagerly while FLOPs are counted, so what a compiler recomputes is not in it.
        seconds: of one step that nothing else observes.
        peak: largest allocation during that step, bytes, weights and gradients included; ``None`` on a CPU.
    """

    saved_bytes: int
    offloaded_bytes: int
    flops: int
    seconds: float
    peak: int | None


def measure(step: Callable[[], Tensor], *, weights: Iterable[Tensor] = ()) -> MemoryReport:
    """Bytes, FLOPs, seconds and peak of ``step`` and the backward pass of the loss it returns.

    Runs it three times: bytes are counted (and compiled blocks compile), FLOPs are counted, time is taken. Gradients
    add up in the parameters.

    Args:
        step: a forward pass that returns the scalar to call ``backward`` on.
        weights: tensors that do not count as saved, beside parameters (for compiled blocks: ``model.parameters()``).
    """
    with SavedBytes(weights) as saved:
        loss = step()
    loss.backward()
    device = loss.device
    del loss
    with FlopCounterMode(display=False) as flops:
        step().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    step().backward()
    peak = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    seconds = time.perf_counter() - began
    return MemoryReport(saved.total, saved.offloaded, int(flops.get_total_flops()), seconds, peak)
