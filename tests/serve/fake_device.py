"""A device that does nothing until somebody waits: what comes before its time shows as a wrong answer.

``attach`` puts it under an engine. Copies to the device, captured steps, sampling and copies to the host are queued,
and run in order when a wait asks for one of them (a fast device then runs all that is queued): a copy to the device
finds what the host's memory holds *then*. All graphs share one memory, so a replay leaves NaN in the others' results.
Steps that are not captured run at once, after the queue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from deepseek.serve import graphs, sampling, ways
from deepseek.serve.engine import Engine
from deepseek.serve.graphs import DecodeGraphs, Run, Size, StepBuffers

GARBAGE = -(2**62)


class Queue:
    """Operations that were launched; ``done`` of them have run; ``depth``: the most that waited at once."""

    def __init__(self, fast: bool) -> None:
        self.fast = fast
        self.operations: list[Callable[[], Any]] = []
        self.done = self.depth = 0
        self.running = False

    def put(self, operation: Callable[[], Any]) -> int:
        """Queue it; its number."""
        self.operations.append(operation)
        return len(self.operations)

    def wait(self, upto: int | None = None) -> None:
        """Run what is queued, up to an operation."""
        if self.running:
            return
        self.running = True
        upto = len(self.operations) if upto is None or self.fast else upto
        self.depth = max(self.depth, len(self.operations) - self.done)
        while self.done < upto:
            self.operations[self.done]()
            self.operations[self.done] = lambda: None
            self.done += 1
        self.running = False


class Event:
    """``torch.cuda.Event`` after a copy; ``waits`` counts those that would have made the host wait."""

    waits, patient = 0, True

    def __init__(self, queue: Queue) -> None:
        self.queue, self.at = queue, 0

    def record(self) -> None:
        self.at = len(self.queue.operations)

    def synchronize(self) -> None:
        if self.at > self.queue.done:
            Event.waits += 1
        if self.patient:
            self.queue.wait(self.at)


class Readback:
    """As ``ahead.Readback``: two buffers in turn, garbage until the copy was waited for."""

    patient = True

    def __init__(self, queue: Queue) -> None:
        self.queue, self.turn = queue, 0
        self.buffers = [torch.full((1 << 14,), GARBAGE) for _ in range(2)]

    def __call__(self, x: Tensor) -> Callable[[], npt.NDArray[Any]]:
        self.turn ^= 1
        host = self.buffers[self.turn][: x.numel()].view(x.shape)
        host.fill_(GARBAGE)
        at = self.queue.put(lambda: host.copy_(x))

        def wait() -> npt.NDArray[Any]:
            if self.patient:
                self.queue.wait(at)
            return host.numpy()

        return wait


class Capture:
    """As ``graphs.CudaCapture``."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.made = queue, list[tuple[Tensor, Tensor]]()

    def __call__(self, run: Run) -> Run:
        self.queue.wait()
        out = tuple(spoil(t.clone()) for t in run())
        self.made.append(out)  # type: ignore[arg-type]

        def execute() -> None:
            found = run()
            for mine in self.made:
                for t in mine:
                    spoil(t)
            for to, x in zip(out, found):
                to.copy_(x)

        def replay() -> tuple[Tensor, Tensor, Tensor]:
            self.queue.put(execute)
            return out  # type: ignore[return-value]

        return replay


def spoil(x: Tensor) -> Tensor:
    """What memory holds that has not been written."""
    return x.fill_(float("nan") if x.is_floating_point() else GARBAGE)


def attach(engine: Engine, patch: pytest.MonkeyPatch, fast: bool = False) -> Queue:
    """Let ``engine`` run on such a device."""
    queue = Queue(fast)
    launch, keep = sampling._launch, sampling._Draw.keep
    take, side = StepBuffers._take, graphs._HostSide.__init__
    hidden = engine.decoder.hidden

    def launched(logits: Tensor, rows: Any, top: int, candidates: int, *more: Any) -> Tensor:
        if candidates != ways.CANDIDATES:  # a second look: somebody is waiting
            queue.wait()
            return launch(logits, rows, top, candidates, *more)
        asked = any(row.state.config.logprobs is not None for row in rows)
        packed = torch.full((len(rows), 4 + 2 * top if asked else 2), GARBAGE)
        queue.put(lambda: packed.copy_(launch(logits, rows, top, candidates, *more)))
        return packed

    def kept(draw: Any) -> None:
        before, wait = draw._logits, draw._wait
        keep(draw)
        if draw._logits is not before:
            copy = draw._logits = torch.full_like(before, float("nan"))
            at = queue.put(lambda: copy.copy_(before))
            draw._wait = lambda: (wait(), queue.wait(at))[0]  # a look at it is queued behind it

    def sent(host: Any, to: Any, tables: bool) -> None:
        part = "ints" if tables else "small"
        queue.put(lambda: getattr(to, part).copy_(getattr(host._side, part)))
        host._copied.record()

    def made(host: Any, size: Size, device: torch.device) -> None:
        side(host, size, device)
        host._copied = Event(queue)

    def at_once(*args: Any) -> Tensor:
        queue.wait()
        return hidden(*args)

    patch.setattr(sampling, "_launch", launched)
    patch.setattr(sampling._Draw, "keep", kept)
    patch.setattr(graphs._HostSide, "__init__", made)
    patch.setattr(graphs._HostSide, "send", sent)
    patch.setattr(StepBuffers, "_take", lambda *args: queue.put(lambda: take(*args)))
    patch.setattr(engine.decoder, "hidden", at_once)
    engine.launcher.readback = Readback(queue)  # type: ignore[assignment]
    most = Size(engine.scheduler.max_running, engine.decoder.tables.width)
    engine.launcher.graphs = DecodeGraphs(engine.decoder, most, engine.vocabulary, Capture(queue))
    return queue
