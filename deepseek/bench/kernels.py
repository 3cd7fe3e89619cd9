"""Where the time of a step goes: kernels by name and by kind, and how long the device had none to run.

Read from the profiler's trace. Idle is what no kernel covers between the first and the last one: launches that
come too late, or a host that waits. On a CPU, operators stand for kernels and nothing is said about idleness.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from deepseek.bench.timing import synchronize

#: Kind -> what a kernel's name contains; the first that matches wins.
KINDS = (
    ("communication", r"nccl"),
    ("copy", r"^mem(cpy|set)"),
    ("attention", r"flash|fmha|sdpa|attention|flex|softmax_warp|_attn|attn_|^_(forward|queries|keys)_kernel"),
    ("optimizer", r"multi_tensor|multi_tensor_apply|fused_?adam|adamw|muon|adafactor|newton"),
    ("grouped matmul", r"grouped|GroupProblemShape|group_gemm|ptr_?array"),
    ("matmul", r"gemm|nvjet|cublas|cutlass|xmma|triton_(tem|mm)|splitk|addmm|\bmm\b|bmm|aten::linear"),
    (
        "routing and indexing",
        r"sort|radix|histogram|scatter|gather|index|topk|bincount|scan|permute|router|combine|dispatch|embedding|^_(count|offsets|place|liking|near|rescue|sum|sum_rescued|sample)_kernel",
    ),
)
REST = "memory-bound"


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, words in KINDS if re.search(words, name, re.I)), REST)


@dataclass(frozen=True)
class Kernel:
    """All calls of one kernel."""

    name: str
    kind: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class KernelProfile:
    """Kernels, most time first; the seconds from the first start to the last end, and those with a kernel running."""

    kernels: list[Kernel]
    span: float | None
    busy: float

    @property
    def idle_share(self) -> float | None:
        """The share of the span in which no kernel ran."""
        return None if not self.span else 1 - self.busy / self.span

    @property
    def total(self) -> float:
        return sum(k.seconds for k in self.kernels)

    def by_kind(self) -> list[dict[str, Any]]:
        """Milliseconds, share and calls of each kind, for a table."""
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        for k in self.kernels:
            sums[k.kind][0] += k.seconds
            sums[k.kind][1] += k.calls
        order = sorted(sums.items(), key=lambda item: -item[1][0])
        return [
            {"kind": kind, "ms": s * 1e3, "share %": 100 * s / (self.total or 1), "kernels": int(n)}
            for kind, (s, n) in order
        ]

    def top(self, n: int = 15) -> list[dict[str, Any]]:
        """The ``n`` that take most time, for a table."""
        return [
            {"kernel": k.name[:100], "kind": k.kind, "ms": k.seconds * 1e3, "share %": 100 * k.seconds / self.total,
             "calls": k.calls}
            for k in self.kernels[:n]
        ]  # fmt: skip


def profile(call: Callable[[], object], device: torch.device, calls: int = 1) -> KernelProfile:
    """Run ``call`` once to warm up and ``calls`` times under the profiler; times are those of all calls together."""
    call()
    synchronize(device)
    gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(calls):
            call()
        synchronize(device)
    if not gpu:
        return _operators(seen)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return from_trace(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def from_trace(events: Iterable[Mapping[str, Any]]) -> KernelProfile:
    """Kernels, copies and fills of a Chrome trace (times in microseconds); streams that overlap count once."""
    spans = defaultdict(list)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            spans[event["name"]].append((event["ts"] / 1e6, event["dur"] / 1e6))
    kernels = [Kernel(n, kind_of(n), len(s), sum(d for _, d in s)) for n, s in spans.items()]
    covered = sorted((start, start + d) for s in spans.values() for start, d in s)
    if not covered:
        return KernelProfile([], None, 0.0)
    busy, end = 0.0, covered[0][0]
    for start, stop in covered:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return KernelProfile(sorted(kernels, key=lambda k: -k.seconds), end - covered[0][0], busy)


def _operators(seen: Any) -> KernelProfile:
    """On a CPU: operators by the time spent in themselves."""
    kernels = [
        Kernel(e.key, kind_of(e.key), e.count, e.self_cpu_time_total / 1e6)
        for e in seen.key_averages()
        if e.self_cpu_time_total > 0
    ]
    return KernelProfile(sorted(kernels, key=lambda k: -k.seconds), None, sum(k.seconds for k in kernels))
