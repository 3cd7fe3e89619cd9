"""Small tensors between host and device, without either waiting for the other.

A copy to or from ordinary memory may wait for all that is queued on the device; from pinned memory it is queued too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def put(values: npt.NDArray[Any] | Sequence[float], device: torch.device, dtype: Any = np.int64) -> Tensor:
    """On the device; a list becomes ``dtype``, an array keeps its own.

    The pinned memory is torch's own, which is not used again before the copy has happened.
    """
    host = torch.from_numpy(values if isinstance(values, np.ndarray) else np.array(values, dtype))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class Readback:
    """Brings tensors to the host: queues the copy at a call, and gives a function that waits for it.

    Two buffers take turns, so what a wait gives holds until the second call after its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._buffers = [_Pinned(), _Pinned()] if self._cuda else []

    def __call__(self, x: Tensor) -> Callable[[], npt.NDArray[Any]]:
        """``x`` on the host, as a function that waits for it."""
        if not self._cuda:
            return x.cpu().numpy
        self._buffers.reverse()
        return self._buffers[0].fetch(x)


class _Pinned:
    """Memory of the host, and when it was last copied to; seen in the shape of what was last copied."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._host = self._memory
        self._array = self._host.numpy()
        self._copied = torch.cuda.Event()

    def fetch(self, x: Tensor) -> Callable[[], npt.NDArray[Any]]:
        if self._host.shape != x.shape or self._host.dtype != x.dtype:
            if self._memory.numel() < x.numel() or self._memory.dtype != x.dtype:
                self._memory = torch.empty(max(1024, 2 * x.numel()), dtype=x.dtype, pin_memory=True)
            self._host = self._memory[: x.numel()].view(x.shape)
            self._array = self._host.numpy()
        self._host.copy_(x, non_blocking=True)
        self._copied.record()
        return self._wait

    def _wait(self) -> npt.NDArray[Any]:
        self._copied.synchronize()
        return self._array
