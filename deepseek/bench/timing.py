"""Timing: CUDA events (the wall clock on a CPU), warm-up, medians, competitors taking turns.

Competitors are measured round after round, one burst each, so that a clock that drifts with temperature drifts
for all of them. A burst repeats the call until it lasts some milliseconds: the launch of the first kernel on an
idle device then weighs little, and the calls queue up as they do in training.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from deepseek.errors import DeepseekError

T = TypeVar("T")
Call = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over bursts, the fastest and the slowest burst."""

    median: float
    best: float
    worst: float
    calls: int

    @property
    def ms(self) -> float:
        return self.median * 1e3


class Timer:
    """Seconds between ``start`` and ``stop`` on the device's own clock; read them after ``synchronize``."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if _cuda(device) else None
        self._times = [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def _mark(self, index: int) -> None:
        if self._events:
            self._events[index].record()
        else:
            self._times[index] = time.perf_counter()

    @property
    def seconds(self) -> float:
        if self._events:
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._times[1] - self._times[0]


def _cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def race(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int = 10,
    warmup: int = 3,
    burst_seconds: float = 0.01,
) -> dict[str, Timing]:
    """Time every call, taking turns.

    Args:
        rounds: bursts per call. warmup: calls before the first.
        burst_seconds: how long a burst should last at least.
    """
    bursts = {name: _burst(call, device, warmup, burst_seconds) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        timers = {name: Timer(device) for name in calls}
        for name, call in calls.items():
            timers[name].start()
            for _ in range(bursts[name]):
                call()
            timers[name].stop()
        synchronize(device)
        for name, timer in timers.items():
            seconds[name].append(timer.seconds / bursts[name])
    return {n: Timing(statistics.median(s), min(s), max(s), bursts[n] * rounds) for n, s in seconds.items()}


def measure(call: Call, device: torch.device, *, rounds: int = 10, warmup: int = 3) -> Timing:
    """``race`` of one."""
    return race({"": call}, device, rounds=rounds, warmup=warmup)[""]


def graph_seconds(call: Call, *, repeats: int, replays: int = 5, warmup: int = 2) -> list[float]:
    """Seconds of one call, in each replay of a CUDA graph of ``repeats``: the GPU's work, not Python's launches."""
    call()  # on the stream of its tensors: what autograd and cuBLAS set up there cannot be captured
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(warmup):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    seconds = []
    for _ in range(replays):
        timer = Timer(torch.device("cuda"))
        timer.start()
        graph.replay()
        timer.stop()
        torch.cuda.synchronize()
        seconds.append(timer.seconds / repeats)
    return seconds


def _burst(call: Call, device: torch.device, warmup: int, seconds: float) -> int:
    """How many calls last ``seconds``, judged by the last of the warm-up calls."""
    timer = Timer(device)
    for _ in range(max(1, warmup)):
        timer = Timer(device)
        timer.start()
        call()
        timer.stop()
        synchronize(device)
    return max(1, min(1000, round(seconds / max(timer.seconds, 1e-7))))


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What ``attempt`` got: a value, or why there is none."""

    value: T | None
    problem: str = ""
    out_of_memory: bool = False


def attempt(call: Callable[[], T], device: torch.device) -> Outcome[T]:
    """``call()``, with an error turned into text and the memory it held given back.

    A benchmark goes on when one competitor fails; what went wrong is printed in full on stderr.
    """
    try:
        return Outcome(call())
    except Exception as error:
        memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, DeepseekError) else f"{type(error).__name__}: "
        problem = "out of memory" if memory else f"{kind}{lines[0][:300]}"
        if not memory and not isinstance(error, DeepseekError):
            traceback.print_exc(file=sys.stderr)
        traceback.clear_frames(error.__traceback__)
    free(device)  # only here, outside the handler, do the frames of the failed call let go of their tensors
    return Outcome(None, problem, memory)


def free(device: torch.device) -> None:
    """Give memory back between competitors, compiled graphs included, and count the peak anew."""
    if _cuda(device):
        torch._dynamo.reset()
        gc.collect()
        synchronize(device)
        torch.cuda.empty_cache()
        reset_peak(device)


def reset_peak(device: torch.device) -> None:
    """Count the peak anew from what is allocated now."""
    if _cuda(device):
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """The most that tensors held since ``reset_peak``, GiB; ``None`` where nobody counts (CPU)."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if _cuda(device) else None


def random_like(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, *, grad: bool = False
) -> torch.Tensor:
    """Normal random numbers: a matmul of zeros uses less power, hence runs at a higher clock, than one of data."""
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype).requires_grad_(grad)
