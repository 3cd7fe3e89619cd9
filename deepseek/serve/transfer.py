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
        self._buffers: list[Tensor | None] = [None, None]
        self._turn = 0

    def __call__(self, x: Tensor) -> Callable[[], Tensor]:
        """``x`` on the host, as a function that waits for it."""
        if not self._cuda:
            return x.cpu
        self._turn ^= 1
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.numel() < x.numel() or buffer.dtype != x.dtype:
            buffer = torch.empty(max(1024, 2 * x.numel()), dtype=x.dtype, pin_memory=True)
            self._buffers[self._turn] = buffer
        host = buffer[: x.numel()].view(x.shape)
        host.copy_(x, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def wait() -> Tensor:
            event.synchronize()
            return host

        return wait
