"""Which number format the arithmetic uses, decided by measurement.

A CPU that lists bfloat16 support may still run it hundreds of times slower than fp32 (no AMX or AVX512-BF16: the
fallback converts element by element), so ``auto`` times one matrix product in each format and takes the faster.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from deepseek.errors import ConfigError

Mode = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Policy:
    """The compute format, the loss scale (fp16 only), and why. Master weights and optimizer state stay fp32.

    ``masters``: matrices are stored in the compute format and the optimizer keeps them in fp32
    (``deepseek.precision.masters``); otherwise the model's weights are fp32 and autocast converts them.
    """

    name: str
    dtype: torch.dtype
    loss_scale: float
    reason: str
    masters: bool = False

    @contextmanager
    def compute(self, device: torch.device) -> Iterator[None]:
        """Matmuls in the compute format; norms, softmax, router and loss stay fp32. Nothing to do with ``masters``."""
        if self.masters or self.dtype == torch.float32:
            yield
            return
        with torch.autocast(device.type, dtype=self.dtype):
            yield


@cache
def matmul_flops(device_type: str, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product, measured now: the ceiling that MFU is relative to."""
    size = 4096 if device_type != "cpu" else 1024
    a, b = (torch.randn(size, size, device=device_type, dtype=torch.float32).to(dtype) for _ in range(2))
    for pilot in (64, 256) if device_type == "cpu" else ():  # a format without hardware must not cost seconds
        small = _pilot(a[:pilot, :pilot].contiguous(), b[:pilot, :pilot].contiguous())
        if 2.0 * (4 * pilot) ** 3 / small > seconds:
            return small
    return _rate(a, b, seconds)


def _pilot(a: torch.Tensor, b: torch.Tensor) -> float:
    """What all threads together would do, from one: on a busy machine threads wait longer for each other than a small
    product takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return threads * _rate(a, b, 0.05)
    finally:
        torch.set_num_threads(threads)


def _rate(a: torch.Tensor, b: torch.Tensor, seconds: float) -> float:
    """The best of several bursts: what the device can do, not what its neighbours left of it just now."""
    a @ b
    _synchronize(a.device)
    began, best, burst = time.perf_counter(), float("inf"), 1 if a.device.type == "cpu" else 8
    while best == float("inf") or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        for _ in range(burst):
            a @ b
        _synchronize(a.device)
        best = min(best, (time.perf_counter() - start) / burst)
    return 2.0 * a.shape[0] * a.shape[1] * b.shape[1] / best


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def choose(
    mode: str, device: torch.device, loss_scaling_factor: float = 128.0, training: bool = False
) -> Policy:
    """The policy for ``mode`` on ``device``; 'auto' measures on a CPU and takes bf16 on an accelerator that has it.

    ``training`` in bf16 on an accelerator comes with ``masters``: the caller lowers the model.

    Raises:
        ConfigError: unknown mode.
    """
    if mode not in ("auto", *DTYPES):
        raise ConfigError(f"precision_mode={mode!r}; choose auto, {', '.join(DTYPES)}")
    reason = "as configured"
    if mode == "auto":
        mode, reason = _auto(device)
    masters = training and mode == "bf16" and device.type != "cpu"
    return Policy(mode, DTYPES[mode], loss_scaling_factor if mode == "fp16" else 1.0, reason, masters)


def _auto(device: torch.device) -> tuple[str, str]:
    if device.type == "cpu":
        fp32, bf16 = (matmul_flops("cpu", DTYPES[name]) / 1e9 for name in ("fp32", "bf16"))
        name = "bf16" if bf16 > 1.2 * fp32 else "fp32"
        return name, f"measured on this CPU: fp32 {fp32:.0f}, bf16 {bf16:.1f} GFLOP/s"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return "fp32", "this GPU has no bfloat16"
    return "bf16", f"{device.type} computes bf16 natively"
