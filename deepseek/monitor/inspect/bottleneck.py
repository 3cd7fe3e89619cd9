"""Where a step's time goes, and what bounds it: read from a recorded ``Timeline``.

The time of a step is divided without remainder. On a CPU: waiting for data, exchanging with other ranks, operators
limited by arithmetic (matrix products, attention), operators limited by moving bytes, and the rest, in which no
operator ran: the host itself. On an accelerator the same, but what counts is the device: kernels, exchanges that no
kernel hides, and idle time, which is put down to the data while the host waited for it, and else to the host.

Operators are told apart by name, not by counters: 'compute' and 'memory' say which kind of work the time went into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from deepseek.monitor.inspect.timeline import (
    PHASES,
    Span,
    Timeline,
    kind_of,
    measure,
    own_times,
    union,
    without,
)

STALL = 0.25  #: share of a step from which waiting is what bounds it
ADVICE = {
    "data": "raise data.prefetch, store the corpus tokenised on a local disk, or use shorter documents per batch",
    "host": "fewer and longer operators: larger micro-batches, train.compile=true, or (on CUDA) train.cuda_graph=true",
    "communication": "larger batches per rank, fewer exchanges (accumulation), or a layout with more local work",
    "compute": "this is what a healthy step looks like; faster means a lower precision, or fewer FLOPs per token",
    "memory": "train.compile=true to fuse element-wise work, larger matrix products (hidden size, micro_rows), "
    "or recompute less",
}  # fmt: skip


@dataclass(frozen=True)
class Bottleneck:
    """What bounds a step.

    Attributes:
        verdict: 'data-bound', 'host-bound', 'communication-bound', 'compute-bound' or 'memory-bound'.
        reason, advice: for people.
        shares: of the step's time, by kind; they sum to one.
        phases: the bars: data, forward, backward, optimizer, communication, other; they sum to one.
        seconds: mean of a recorded step. steps: how many were recorded.
        device: whether the shares are the accelerator's.
        top: the operators (or kernels) with most time of their own: name, seconds per step, share, calls per step.
        flops: achieved floating-point operations per second, ``None`` when the model's are not known; ``peak_share``:
            of the measured peak.
    """

    verdict: str
    reason: str
    advice: str
    shares: dict[str, float]
    phases: dict[str, float]
    seconds: float
    steps: int
    device: bool
    top: list[dict[str, Any]] = field(default_factory=list)
    flops: float | None = None
    peak_share: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bottleneck(
    timeline: Timeline, *, flops_per_step: float | None = None, peak_flops: float | None = None
) -> Bottleneck:
    """Judge the recorded steps together.

    Args:
        flops_per_step: forward and backward of one step of the model. peak_flops: what the device can do a second.
    """
    steps = timeline.steps or [_whole(timeline)]
    wall = sum(step.length for step in steps)
    totals = dict.fromkeys(("data", "host", "communication", "compute", "memory"), 0.0)
    phases = dict.fromkeys(PHASES, 0.0)
    during = [timeline.during(step) for step in steps]
    for step, part in zip(steps, during):
        parts, bars = (_on_device if timeline.on_device else _on_host)(part, step), _phases(part, step)
        totals = {name: totals[name] + parts.get(name, 0.0) for name in totals}
        phases = {name: phases[name] + bars.get(name, 0.0) for name in phases}
    shares = {name: value / wall if wall else 0.0 for name, value in totals.items()}
    bars = {name: value / wall if wall else 0.0 for name, value in phases.items()}
    seconds = wall / len(steps) / 1e6
    flops = flops_per_step / seconds if flops_per_step and seconds else None
    kind = judge(shares)
    return Bottleneck(
        f"{kind}-bound", _reason(kind, shares, seconds, timeline.on_device), ADVICE[kind], shares, bars, seconds,
        len(steps), timeline.on_device, _top(during, wall), flops,
        flops / peak_flops if flops and peak_flops else None,
    )  # fmt: skip


def judge(shares: dict[str, float]) -> str:
    """Waiting first: the largest of data, communication and host from ``STALL`` on; else the larger kind of work."""
    stalls = {name: shares.get(name, 0.0) for name in ("data", "communication", "host")}
    worst = max(stalls, key=lambda name: stalls[name])
    if stalls[worst] >= STALL:
        return worst
    return "compute" if shares.get("compute", 0.0) >= shares.get("memory", 0.0) else "memory"


def _reason(kind: str, shares: dict[str, float], seconds: float, device: bool) -> str:
    told = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda x: -x[1]))
    what = {
        "data": f"the step waits for its batch {shares['data']:.0%} of the time",
        "host": f"no {'kernel' if device else 'operator'} runs {shares['host']:.0%} of the time; the host prepares it",
        "communication": f"{shares['communication']:.0%} of the time goes into exchanges that no computation hides",
        "compute": f"{shares['compute']:.0%} of the time goes into matrix products and attention",
        "memory": f"{shares['memory']:.0%} of the time goes into operators that move bytes: element-wise, norms, "
        "copies, the optimizer",
    }[kind]  # fmt: skip
    return f"{what} ({told}; {seconds:.3g} s a step)"


def _whole(timeline: Timeline) -> Span:
    spans = [s for spans in (*timeline.host.values(), *timeline.device.values()) for s in spans]
    return Span("all", min((s.start for s in spans), default=0.0), max((s.end for s in spans), default=0.0))


def _phase(timeline: Timeline, name: str) -> list[tuple[float, float]]:
    return union(p for p in timeline.phases if p.name == name)


def _exchanges(spans: Sequence[Span]) -> list[Span]:
    return [s for s in spans if kind_of(s.name) == "communication"]


def _on_host(timeline: Timeline, step: Span) -> dict[str, float]:
    """Microseconds of one step by kind, on a CPU."""
    everything = [s for spans in timeline.host.values() for s in spans]
    exchange, data = union(_exchanges(everything)), _phase(timeline, "data")
    worked = without(without(union(everything), exchange), data)
    kinds = {"matrix": 0.0, "memory": 0.0, "communication": 0.0}
    for spans in timeline.host.values():
        for name, own in own_times(spans):
            kinds[kind_of(name)] += own
    work = max(kinds["matrix"] + kinds["memory"], 1e-9)
    busy, waited = measure(worked), measure(without(data, exchange))
    return {
        "data": waited,
        "communication": measure(exchange),
        "compute": busy * kinds["matrix"] / work,
        "memory": busy * kinds["memory"] / work,
        "host": max(0.0, step.length - busy - waited - measure(exchange)),
    }


def _on_device(timeline: Timeline, step: Span) -> dict[str, float]:
    """Microseconds of one step by kind, on an accelerator."""
    spans = [s for stream in timeline.device.values() for s in stream]
    kernels = [s for s in spans if kind_of(s.name) != "communication"]
    busy = union(kernels)
    exposed = without(union(_exchanges(spans)), busy)
    idle = without([(step.start, step.end)], union(spans))
    waited = measure(idle) - measure(without(idle, _phase(timeline, "data")))
    matrix = sum(s.length for s in kernels if kind_of(s.name) == "matrix")
    share = matrix / max(sum(s.length for s in kernels), 1e-9)
    return {
        "data": waited,
        "communication": measure(exposed),
        "compute": measure(busy) * share,
        "memory": measure(busy) * (1 - share),
        "host": max(0.0, measure(idle) - waited),
    }


def _phases(timeline: Timeline, step: Span) -> dict[str, float]:
    """The bars of one step. On an accelerator a kernel belongs to the phase in which the host launched it."""
    found = {name: _phase(timeline, name) for name in ("data", "forward", "backward", "optimizer")}
    found["backward"] = without(
        found["backward"], found["forward"]
    )  # the forward pass lies inside of the micro-batch
    streams = timeline.device if timeline.on_device else timeline.host
    spans = [s for stream in streams.values() for s in stream]
    if timeline.on_device:
        found = {
            name: _launched_in(spans, parts) if name != "data" else parts for name, parts in found.items()
        }
        found["data"] = without(found["data"], union(spans))
    exchange = union(_exchanges(spans))
    bars, taken = {"communication": measure(exchange)}, exchange
    for name in ("data", "optimizer", "backward", "forward"):
        own = without(found[name], taken)
        bars[name] = measure(own)
        taken = union(Span("", a, b) for a, b in (*taken, *own))
    bars["other"] = max(0.0, step.length - measure(taken))
    return bars


def _launched_in(spans: Sequence[Span], parts: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return union(s for s in spans if any(a <= s.launched < b for a, b in parts))


def _top(steps: Sequence[Timeline], wall: float, count: int = 12) -> list[dict[str, Any]]:
    """The operators (or kernels) with most time of their own."""
    times: dict[str, tuple[float, int]] = {}
    for step in steps:
        for spans in (step.device if step.on_device else step.host).values():
            for name, own in own_times(spans):
                before = times.get(name, (0.0, 0))
                times[name] = before[0] + own, before[1] + 1
    ranked = sorted(times.items(), key=lambda item: -item[1][0])[:count]
    return [
        {
            "name": name,
            "kind": {"matrix": "compute"}.get(kind_of(name), kind_of(name)),
            "seconds": own / len(steps) / 1e6,
            "share": own / wall if wall else 0.0,
            "calls": calls / len(steps),
        }
        for name, (own, calls) in ranked
    ]
