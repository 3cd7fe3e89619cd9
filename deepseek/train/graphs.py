"""Steps replayed as CUDA graphs: the host says "again" instead of launching thousands of kernels.

Graphs are captured after a few ordinary steps: of the first micro-batch, of the second, of a further one (they add up
gradients differently: see ``Accumulator``), and of the update. They read batches from buffers of fixed address and
write sums, gradients and results to such. What changes from step to step and is a number on the host (learning rates,
betas, how many targets a batch has) is copied into tensors before a replay. A batch of another shape goes through the
ordinary step, which shares weights and state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from deepseek.batch import Batch
from deepseek.dist import comm
from deepseek.errors import ConfigError, TrainingError
from deepseek.train.step import StepResult, Stopwatch, Sums, TrainStep

T = TypeVar("T")
WARMUP = 3  #: ordinary steps before the capture: kernels are compiled and tuned, optimizer state comes to be


class Recorder(Protocol):
    """Captures ``work`` without doing it: what it returned, whose tensors every replay fills anew, and the replay."""

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]: ...


class CudaRecorder:
    """Captures on a stream of its own, into one memory pool: graphs must be replayed in the order of their capture."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream, self.pool = stream, torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (a loader's) may go on with what is forbidden while capturing.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            found = work()
        return found, graph.replay


class GraphedStep(TrainStep):
    """A ``TrainStep`` whose regular batches are replayed.

    Args:
        step: what is captured; it must not be called any more.
        warmup: ordinary steps before the capture.
        record: who captures, for tests.

    Raises:
        ConfigError: the model is not on a CUDA device, or there is more than one rank.
        TrainingError: at the capture, when something in the step needs the host.
    """

    def __init__(self, step: TrainStep, warmup: int = WARMUP, record: Recorder | None = None) -> None:
        self.__dict__.update(vars(step))
        self._remaining, self._record, self._stream = warmup, record, None
        self._captured: _Captured | None = None
        if record is None:
            check_device(self.device)
            self._stream = torch.cuda.Stream(self.device)
            self._record = CudaRecorder(self._stream)

    def __call__(self, batch: Batch) -> StepResult:
        batch = replace(batch, starts=None)  # as wide as the batch needs, and a graph takes one shape
        if self._captured is None and self._remaining <= 0 and batch.rows % self._rows(batch) == 0:
            self._captured = self._capture(batch)
        if self._captured is not None and self._captured.fits(batch, self._rows(batch)):
            return self._captured(batch)
        self._remaining -= 1
        return self._ordinary(batch)

    def _rows(self, batch: Batch) -> int:
        return min(self.micro_rows or batch.rows, batch.rows)

    def _ordinary(self, batch: Batch) -> StepResult:
        """On the stream of the capture: autograd remembers on which stream a gradient was first accumulated."""
        if self._stream is None:
            return super().__call__(batch)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = super().__call__(batch)
        current.wait_stream(self._stream)
        return result

    def _capture(self, batch: Batch) -> _Captured:
        assert self._record is not None
        try:
            return _Captured(self, batch, self._rows(batch), self._record)
        except (RuntimeError, AssertionError) as error:
            raise TrainingError(
                f"the step cannot be captured as a CUDA graph ({error}); set train.cuda_graph=false"
            ) from error


def check_device(device: torch.device) -> None:
    """Raise ``ConfigError`` where steps cannot be captured: off CUDA, or on several ranks."""
    if device.type != "cuda" or comm.world() > 1:
        raise ConfigError(
            f"train.cuda_graph needs one CUDA device, and this run has {comm.world()} rank(s) on "
            f"{device.type}; set train.cuda_graph=false"
        )


class _Captured:
    """The graphs, and the tensors they read and write."""

    def __init__(self, step: GraphedStep, batch: Batch, rows: int, record: Recorder) -> None:
        self.step, self.micro_batches = step, batch.rows // rows
        step.optimizer.zero_grad()
        step.optimizer.fill()
        first = next(batch.split(rows))
        self.rows, self.shapes = batch.rows, _shapes(first)
        # Losses are means over a number of targets that a graph cannot change: over all positions, then corrected.
        self.targets = batch.targets.numel()
        own: dict[str, Any] = {name: value.clone() for name, value in _tensors(first.to(step.device))}
        self.input = replace(first, n_targets=self.targets, **own)
        self.factor = torch.ones((), device=step.device)
        share = rows / batch.rows
        with step.accumulator.over(self.micro_batches):
            self.sums, replay = record(lambda: step.micro(self.input, share, factor=self.factor))
            further = [self._record_further(share, record) for _ in range(min(self.micro_batches - 1, 2))]
            assert not step.accumulator.waiting, "a parameter has a gradient of one micro-batch only"
        self._micro = [replay, *further]
        self.result, self._finish = record(lambda: step.finish(self.sums))

    def _record_further(self, share: float, record: Recorder) -> Callable[[], None]:
        def further() -> None:
            new = self.step.micro(self.input, share, self.sums, factor=self.factor)
            for old, value in zip(_flat(self.sums), _flat(new), strict=True):
                old.copy_(value)

        return record(further)[1]

    def fits(self, batch: Batch, rows: int) -> bool:
        """Whether this batch has the shapes that were captured."""
        return batch.rows == self.rows and _shapes(next(batch.split(rows))) == self.shapes

    def __call__(self, batch: Batch) -> StepResult:
        watch = Stopwatch(self.step.device)
        self.step.optimizer.fill()
        self.factor.fill_(self.targets / max(batch.n_targets, 1))
        for i, part in enumerate(batch.split(self.input.rows)):
            for (_, static), (_, value) in zip(_tensors(self.input), _tensors(part), strict=True):
                static.copy_(value, non_blocking=True)
            self._micro[min(i, len(self._micro) - 1)]()
        self._finish()
        watch.lap("step")
        # Copies: the next replay overwrites what this one found, and events are read later.
        found = _copy(self.result)
        assert isinstance(found, StepResult)
        return replace(found, tokens=batch.n_targets, n_bytes=batch.n_bytes, seconds=watch.seconds)


def _tensors(batch: Batch) -> list[tuple[str, Tensor]]:
    return [(f.name, v) for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)]


def _shapes(part: Batch) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, value.shape, value.dtype) for name, value in _tensors(part)]


def _flat(value: Any) -> Iterator[Tensor]:
    """Every tensor inside tuples and lists, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _flat(inner)


def _copy(value: Any) -> Any:
    """``value`` with copies of its tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, StepResult):
        return replace(value, **{f.name: _copy(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, list):
        return [_copy(v) for v in value]
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


__all__ = ["CudaRecorder", "GraphedStep", "Recorder", "Sums", "check_device"]
