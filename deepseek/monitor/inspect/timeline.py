"""A recorded step as intervals: who ran what, when, and where the time went.

Read from the Chrome trace that ``torch.profiler`` writes. Host ranges nest, device kernels lie in streams; the phases
of a step (data, forward, backward, optimizer, communication) are ranges that ``TraceCapture`` adds by name.

All times are microseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PHASE = "deepseek::phase::"  #: prefix of the ranges that name a phase
STEP = "deepseek::step::"  #: prefix of the ranges of whole steps
PHASES = ("data", "forward", "backward", "optimizer", "communication", "other")
MATRIX = (
    "mm", "matmul", "bmm", "addmm", "baddbmm", "linear", "conv", "gemm", "einsum", "grouped_mm", "attention",
    "flash", "cutlass", "wgmma", "mkldnn", "cublas", "experts", "sgemm",
)  # fmt: skip
COMMUNICATION = (
    "nccl",
    "c10d::",
    "gloo:",
    "all_reduce",
    "allreduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
)


class Span(NamedTuple):
    """An interval of one thread or stream: ``[start, end)``; of a kernel also when the host launched it."""

    name: str
    start: float
    end: float
    launched: float = 0.0

    @property
    def length(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """What was recorded.

    Attributes:
        host: operators of each thread, outermost and nested, sorted by start. device: kernels of each stream.
        phases: the named ranges. steps: the steps' ranges, in order.
    """

    host: dict[str, list[Span]]
    device: dict[str, list[Span]]
    phases: list[Span]
    steps: list[Span] = field(default_factory=list)

    def during(self, step: Span) -> Timeline:
        """What happened in one step.

        Where nothing ended the wait for data (a replayed CUDA graph calls none of the parts that are watched), how long
        it was is not known, and it is left out.
        """
        a, b = step.start, step.end
        host, device = (
            {name: clip(spans, a, b) for name, spans in x.items()} for x in (self.host, self.device)
        )
        phases = clip(self.phases, a, b)
        return Timeline(host, device, phases if any(p.name != "data" for p in phases) else [], [step])

    @property
    def on_device(self) -> bool:
        return any(self.device.values())


def read_trace(trace: Mapping[str, Any]) -> Timeline:
    """A Chrome trace (parsed JSON with ``traceEvents``) as a ``Timeline``."""
    host: dict[str, list[Span]] = {}
    device: dict[str, list[Span]] = {}
    phases, steps, launches = [], [], _launches(trace)
    for event in trace.get("traceEvents", []):
        if event.get("ph") != "X" or "dur" not in event:
            continue
        start = float(event["ts"])
        span = Span(str(event["name"]), start, start + float(event["dur"]))
        kind = str(event.get("cat", ""))
        if span.name.startswith(PHASE):
            if kind != "gpu_user_annotation":
                phases.append(span._replace(name=span.name.removeprefix(PHASE)))
        elif span.name.startswith(STEP):
            if kind != "gpu_user_annotation":
                steps.append(span)
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            span = span._replace(launched=launches.get(event.get("args", {}).get("correlation"), start))
            device.setdefault(f"stream {event.get('tid')}", []).append(span)
        elif kind in ("cpu_op", "user_annotation"):
            host.setdefault(f"thread {event.get('tid')}", []).append(span)
    for spans in (*host.values(), *device.values(), phases, steps):
        spans.sort(key=lambda s: (s.start, -s.end))
    return Timeline(host, device, phases, steps)


def _launches(trace: Mapping[str, Any]) -> dict[Any, float]:
    """When the host launched each kernel, by correlation id."""
    events = (e for e in trace.get("traceEvents", []) if e.get("cat") in ("cuda_runtime", "cuda_driver"))
    return {e["args"]["correlation"]: float(e["ts"]) for e in events if "correlation" in e.get("args", {})}


def union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """The intervals covered by at least one span, disjoint and in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((s.start, s.end) for s in spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def measure(intervals: Sequence[tuple[float, float]]) -> float:
    """The length of disjoint intervals together."""
    return sum(end - start for start, end in intervals)


def without(
    intervals: Sequence[tuple[float, float]], holes: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """What of ``intervals`` lies outside of ``holes``; both disjoint and in order."""
    left: list[tuple[float, float]] = []
    for start, end in intervals:
        for a, b in holes:
            if b <= start or a >= end:
                continue
            if a > start:
                left.append((start, a))
            start = max(start, b)
        if start < end:
            left.append((start, end))
    return left


def clip(spans: Iterable[Span], start: float, end: float) -> list[Span]:
    """The spans' parts inside ``[start, end)``."""
    return [
        s if start <= s.start and s.end <= end else s._replace(start=max(s.start, start), end=min(s.end, end))
        for s in spans
        if s.start < end and s.end > start
    ]


def own_times(spans: Sequence[Span]) -> list[tuple[str, float]]:
    """Each nested span's time less that of the spans inside it; ``spans`` of one thread, sorted by start."""
    result: list[tuple[str, float]] = []
    stack: list[list[Any]] = []  # [span, time of its children]

    def close() -> None:
        span, inner = stack.pop()
        result.append((span.name, max(0.0, span.length - inner)))
        if stack:
            stack[-1][1] += span.length

    for span in spans:
        while stack and span.start >= stack[-1][0].end - 1e-9:
            close()
        if stack and span.end > stack[-1][0].end:  # clocks round: a child never outlives its parent
            span = span._replace(end=stack[-1][0].end)
        stack.append([span, 0.0])
    while stack:
        close()
    return result


@functools.lru_cache(maxsize=4096)
def kind_of(name: str) -> str:
    """'communication', 'matrix' (limited by arithmetic) or 'memory' (limited by moving bytes) work, by name."""
    low = name.lower()
    if any(word in low for word in COMMUNICATION):
        return "communication"
    return "matrix" if any(word in low for word in MATRIX) else "memory"
