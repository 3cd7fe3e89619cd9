"""How long a step takes when the host does not wait for it, and what it found, one step late.

An accelerator works through a queue; the host that filled it is done long before. So a step is timed by marks in the
queue, which are read when the next step has been put behind it: the host is never more than one step ahead, the
device never idle in between, and figures reach the events one step late. A CPU does what it is told at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor


class Pace:
    """Seconds per step, in steady state. ``start`` before the batch is fetched, ``stop`` after the step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.queued = device, device.type != "cpu"
        self._began, self._seconds = 0.0, 0.0
        self._marks: tuple[torch.Event, torch.Event] | None = None
        self._start: torch.Event | None = None

    def start(self) -> None:
        self._began = time.perf_counter()
        if self.queued:
            self._start = self._mark()

    def stop(self) -> float:
        """Seconds from ``start`` to here on a CPU; on an accelerator those of the step *before*, which it waits for.

        The first step of all is waited for itself, so that there is a figure.
        """
        if not self.queued:
            return time.perf_counter() - self._began
        assert self._start is not None
        before, self._marks = self._marks, (self._start, self._mark())
        begin, end = before or self._marks
        end.synchronize()
        return max(begin.elapsed_time(end) / 1e3, 1e-9)

    def _mark(self) -> torch.Event:
        mark = torch.Event(self.device, enable_timing=True)
        mark.record()
        return mark


class Readback:
    """A few scalars on their way to the host.

    The copy is queued behind the work that makes them; ``read`` waits for that work and not for what was queued
    afterwards, as ``.item()`` would.
    """

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        found = torch.stack([s.detach().to(torch.float32) for s in scalars])
        self._mark: torch.Event | None = None
        if found.device.type == "cuda":
            self._host = torch.empty_like(found, device="cpu", pin_memory=True)
            self._host.copy_(found, non_blocking=True)
            self._mark = torch.Event(found.device)
            self._mark.record()
        else:
            self._host = found

    @property
    def waiting(self) -> bool:
        """Whether ``read`` may have to wait."""
        return self._host.device.type != "cpu" or self._mark is not None

    def read(self) -> list[float]:
        if self._mark is not None:
            self._mark.synchronize()
        return [float(x) for x in self._host.tolist()]
