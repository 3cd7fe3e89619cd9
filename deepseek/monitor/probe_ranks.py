"""How long each rank works for itself, so that the slow one is seen although all finish together.

In data-parallel training every rank waits for the slowest: all step times look alike. What tells them apart is a rank's
time without the waiting. A few numbers a rank are gathered in the background, at most ten times a second: started after
one step, read after the next, when every rank has long sent its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from deepseek.dist import comm
from deepseek.events import emit
from deepseek.monitor.probe_memory import device_memory
from deepseek.train.step import TrainStep

PERIOD = 0.1  #: seconds between two gatherings, at least; a step longer than that is told by itself
ALONE = 1.0  #: the same for a single rank, whose steps say it all
SELDOM = 1000  #: steps between them, at most


class RankProbe:
    """Emits 'ranks' events: ``seconds``, ``data`` and ``memory`` of every rank, lists ``[R]``.

    Call it on every rank after every step. Steps between two gatherings are averaged; how many there are, rank 0 says.

    Attributes:
        ask: a step number, set on rank 0, that all ranks shall hear of. ``heard``: that number, on every rank at the
            same step, once; 0 otherwise.
    """

    def __init__(self, step: TrainStep) -> None:
        self.step, self.every = step, 1
        self.period = PERIOD if comm.world() > 1 else ALONE
        self._own: list[float] = []
        self._data: list[float] = []
        self._whole: list[float] = []
        self._sent: tuple[int, comm.Gathering] | None = None
        self._marks: Any = None
        self.ask = self.heard = 0

    def __call__(self, step: int, seconds: Mapping[str, float]) -> None:
        """``seconds``: where the step's time went, as the 'train' event says."""
        self.flush()
        waited = seconds.get("communication", 0.0) + self._waited_on_device()
        whole = sum(seconds.values())
        self._whole.append(whole)
        self._own.append(max(0.0, whole - waited))
        self._data.append(seconds.get("data", 0.0))
        if step % self.every == 0:
            self._send(step)

    def _send(self, step: int) -> None:
        every = max(1, math.ceil(self.period / max(_mean(self._whole), 1e-6)))
        row = [_mean(self._own), _mean(self._data), device_memory(self.step.device)]
        row += [min(every, SELDOM), self.ask]
        self.ask = 0
        for values in (self._own, self._data, self._whole):
            values.clear()
        self._sent = step, comm.gather_later(torch.tensor(row, dtype=torch.float64))
        if comm.world() == 1:
            self.flush()

    def flush(self) -> None:
        """Tell what was gathered; every rank must have sent, or this waits for it."""
        self.heard = 0
        if self._sent is None:
            return
        (step, gathering), self._sent = self._sent, None
        own, data, memory, every, asked = torch.stack(gathering.read()).T.tolist()
        self.every, self.heard = int(every[0]), int(asked[0])
        emit("ranks", step, seconds=own, data=data, memory=memory)

    def _waited_on_device(self) -> float:
        """Seconds that the queue of an accelerator waited for other ranks in the step before this one."""
        before, self._marks = self._marks, self.step.waited
        if before is None or not before[1].query():
            return 0.0
        return float(before[0].elapsed_time(before[1])) / 1e3


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
