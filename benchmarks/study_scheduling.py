"""Does it pay to forecast arrivals? Static, feedback and forecast policies on the same traces, judged by goodput.

A simulation at the level of steps: ``serve.scheduler.Scheduler`` and ``serve.pages.Pages`` as they ship decide every
step; only the model is replaced, by a step time fitted from the real engine (``fit_step_time.py``). A request counts
when its time to first token and its mean time per further token both keep the objective; goodput is how many of those
per second of trace. The 'oracle' is the forecasting policy with the coming arrivals known exactly: what it does not
gain, a better forecast does not gain in that policy.

    python benchmarks/study_scheduling.py [--profile cpu] [--seeds 3] [--requests 400] [--trace FILE] [--out FILE]

Prints Markdown tables; with ``--out`` writes every single result as JSON lines. Deterministic for equal arguments.
"""

from __future__ import annotations

import argparse
import bisect
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fit_step_time import features
from scheduling_policies import (
    Account,
    Cap,
    Coming,
    Everybody,
    Feedback,
    Forecasting,
    ForecastWait,
    Slo,
    Static,
    Wait,
    Whole,
)

from deepseek.serve.arrivals import Arrival, Forecast, TraceConfig, read_trace, synthetic
from deepseek.serve.backlog import Backlog
from deepseek.serve.pages import PageLayout, Pages
from deepseek.serve.request import Request
from deepseek.serve.sampling_config import SamplingConfig
from deepseek.serve.scheduler import Scheduled, Scheduler


@dataclass(frozen=True)
class Profile:
    """A machine and a model: what a step costs, what is asked of it, and what the requests look like."""

    seconds: tuple[float, ...]  # fixed, per decoding row, per prompt row, per position read by either
    slo: Slo
    prompt: int
    output: int
    pages: int
    static: tuple[int, ...]  # rows per step of the static policies
    running: tuple[int, int]  # sequences at once, of the static policies; the others have the second

    @property
    def max_running(self) -> int:
        return self.running[-1]


PROFILES = {
    # fit_step_time.py SmolLM2-135M-Instruct.Q4_1.gguf --steps 400: bf16, one thread; median error 3.5%, p90 8.5%.
    "cpu": Profile(
        (4.25e-2, 2.30e-3, 1.39e-3, 1.10e-5, 1.18e-6),
        Slo(3.0, 0.15),
        256,
        64,
        4096,
        (32, 64, 128, 256, 512),
        (8, 64),
    ),
    # Not measured: 8e9 parameters in bf16 at 3.35 TB/s and 500 TFLOP/s, 131 KB of cache a position.
    "accelerator": Profile(
        (5.5e-3, 3.2e-5, 3.2e-5, 4e-8, 4e-8),
        Slo(0.5, 0.025),
        1024,
        192,
        40_000,
        (128, 256, 512, 1024, 2048),
        (64, 256),
    ),
}
SAMPLING = SamplingConfig(max_tokens=1 << 20)
CAPS = (4, 16, 64, 256)


@dataclass
class Life:
    """What became of a request."""

    arrival: Arrival
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    refused: bool = False

    def kept(self, slo: Slo) -> bool:
        if self.first is None or self.tokens < self.arrival.output:
            return False
        return self.first - self.arrival.time <= slo.ttft and self.tpot <= slo.tpot

    @property
    def tpot(self) -> float:
        return (self.last - (self.first or 0.0)) / max(1, self.tokens - 1)


class Future:
    """What an oracle knows: prompt tokens that arrive within the next seconds."""

    def __init__(self, trace: list[Arrival], now: Callable[[], float]) -> None:
        self.times, self.now = [a.time for a in trace], now
        self.sums = [0]
        for a in trace:
            self.sums.append(self.sums[-1] + a.prompt)

    def __call__(self, seconds: float) -> float:
        now = self.now()
        first, last = bisect.bisect_right(self.times, now), bisect.bisect_right(self.times, now + seconds)
        return self.sums[last] - self.sums[first]


Gate: TypeAlias = Everybody | Cap | Wait  #: says whether a request may come in


class Simulation:
    """One trace through the real scheduler under one policy, in simulated time."""

    def __init__(self, profile: Profile, trace: list[Arrival], budget: str, admission: str) -> None:
        self.profile, self.trace, self.now = profile, trace, 0.0
        self.forecast = Forecast(width=profile.slo.ttft / 4)
        comings: dict[str, Coming] = {
            "forecast": lambda s: self.forecast.rate(self.now, s / 2) * s,
            "oracle": Future(trace, lambda: self.now),
        }
        self.running = profile.max_running
        self.budget = self._budget(budget, comings)
        self.backlog = Backlog(profile.slo.ttft / 20)
        self.whole = Whole(profile.slo, lambda: self.now)
        self.told = 0.0  # when the engine last said what it had done: at the end of a step
        self.gate = self._gate(admission, comings)
        shared = any(a.hash_ids for a in trace)
        self.scheduler = Scheduler(
            Pages(PageLayout(32, 0, 1, 0), profile.pages, 0, prefix_cache=shared),
            max_running=self.running, budget=self.budget, clock=lambda: self.now,
        )  # fmt: skip
        self.lives = [Life(a) for a in trace]
        self.speed, self.hits = 0.0, 0

    def run(self) -> dict[str, Any]:
        index, scheduler = 0, self.scheduler
        while index < len(self.trace) or scheduler.has_work:
            if not scheduler.has_work:
                self.now = max(self.now, self.trace[index].time)
            while index < len(self.trace) and self.trace[index].time <= self.now:
                self._arrive(index)
                index += 1
            if scheduler.has_work:
                self._step()
        return self._result()

    def _arrive(self, index: int) -> None:
        arrival, scheduler = self.trace[index], self.scheduler
        self.forecast.add(arrival.time, arrival.prompt)
        backlog = sum(
            len(s.tokens) - s.computed for s in (*scheduler.running, *scheduler.waiting) if not s.decoding
        )
        if self.gate.admits(arrival.prompt, len(scheduler.waiting), backlog, self.speed):
            tokens = arrival.tokens((1 << 31) + index)
            request = Request(str(index), tokens, SAMPLING)
            self.whole.enter(arrival.prompt)
            scheduler.add(Scheduled(request, list(tokens), arrival=arrival.time, engine=self.lives[index]))
        else:
            self.lives[index].refused = True

    def _step(self) -> None:
        plan = self.scheduler.plan()
        assert plan.work or plan.preempted
        found = features(plan)
        seconds = sum(a * b for a, b in zip(self.profile.seconds, found))
        self.now += seconds
        hits, self.hits = self.scheduler.prefix_hits - self.hits, self.scheduler.prefix_hits
        if self.scheduler.waiting or not all(
            w.samples for w in plan.work
        ):  # as fast as it goes: prompts are left
            rate = (found[1] + found[2] + hits) / seconds  # what the prefix cache had counts as done
            self.speed = self.budget.speed = 0.9 * (self.speed or rate) + 0.1 * rate
        for w in plan.work:
            sequence, life = w.sequence, w.sequence.engine
            if not w.samples:
                self.scheduler.advance(w, w.rows)
                continue
            sequence.tokens.append((1 << 30) + life.tokens)
            self.scheduler.advance(w, w.rows)
            life.tokens, life.last = life.tokens + 1, self.now
            if life.first is None:
                life.first = self.now
                self.whole.begin(life.arrival.prompt)
            if life.tokens >= life.arrival.output:
                self.scheduler.remove(sequence)
        self.budget.observe(seconds, int(found[1]), int(found[2]))
        self.told = self.now
        self._look()

    def _look(self) -> None:
        """As the front end looks: when a request comes, when an answer begins, and four times a second."""
        self.backlog.look(self.told, self.scheduler.prompt_rows, self.scheduler.rows)

    def _result(self) -> dict[str, Any]:
        slo, lives = self.profile.slo, self.lives
        served = [x for x in lives if not x.refused]
        kept = sum(x.kept(slo) for x in lives)
        ttft = sorted((x.first or 0.0) - x.arrival.time for x in served)
        tpot = sorted(x.tpot for x in served if x.tokens > 1)
        return {"goodput": kept / self.trace[-1].time, "kept": kept / len(lives),
                "refused": 1 - len(served) / len(lives), "ttft_p99": ttft[int(0.99 * (len(ttft) - 1))],
                "tpot_p99": tpot[int(0.99 * (len(tpot) - 1))], "preemptions": self.scheduler.preemptions}  # fmt: skip

    def _budget(self, name: str, comings: dict[str, Coming]) -> Static | Feedback:
        if name.startswith("static"):
            rows, _, running = name.split()[1].partition("/")
            self.running = int(running or self.running)
            return Static(int(rows))
        if name == "feedback":
            return Feedback(self.profile.slo)
        kind, _, bend = name.partition(" ")
        floor, most = {"": (0.25, 4.0), "low": (0.25, 1.0), "high": (1.0, 4.0)}[bend]
        return Forecasting(self.profile.slo, comings[kind], floor, most)

    def _gate(self, name: str, comings: dict[str, Coming]) -> Gate:
        if name.startswith("cap"):
            return Cap(int(name.split()[1]))
        slo = self.profile.slo
        kinds: dict[str, Callable[[], Gate]] = {
            "all": Everybody, "wait": lambda: Wait(slo), "lenient wait": lambda: Wait(slo, lenient=True),
            "account": lambda: Account(slo, self.backlog, self._look, lenient=True),
            "strict account": lambda: Account(slo, self.backlog, self._look, lenient=False),
            "whole": lambda: self.whole,
        }  # fmt: skip
        return kinds[name]() if name in kinds else ForecastWait(slo, comings[name])


def capacity(profile: Profile) -> float:
    """Requests per second that the best static budget completes when they are all there from the start."""
    config = TraceConfig(rate=1e9, requests=300, prompt=profile.prompt, output=profile.output)
    best = 0.0
    for rows in profile.static:
        simulation = Simulation(profile, synthetic(config, 99), f"static {rows}", "all")
        simulation.run()
        best = max(best, 300 / simulation.now)
    return best


def traces(
    profile: Profile, rate: float, requests: int, seed: int, file: Path | None
) -> dict[str, list[Arrival]]:
    """The same mean rate and lengths in every form."""
    t = profile.slo.ttft
    config = TraceConfig(rate=rate, requests=requests, prompt=profile.prompt, output=profile.output)
    found = {
        "poisson": synthetic(config, seed),
        "bursty": synthetic(replace(config, kind="bursty", busy=5 * t, calm=20 * t), seed),
        "gamma": synthetic(replace(config, kind="gamma"), seed),
        "sessions": sessions(profile, rate, requests, seed),
    }
    if file is not None:
        whole = read_trace(file, limit=requests)
        found["file"] = read_trace(file, scale=rate / (len(whole) / whole[-1].time), limit=requests)
    return found


def sessions(profile: Profile, rate: float, requests: int, seed: int) -> list[Arrival]:
    """In Mooncake's form: conversations whose every turn repeats the one before it; turns come in a bursty order."""
    t = profile.slo.ttft
    config = TraceConfig(
        kind="bursty", rate=rate, requests=requests, prompt=profile.prompt, output=profile.output,
        busy=5 * t, calm=20 * t,
    )  # fmt: skip
    base = synthetic(config, seed)
    found, open_, key = list[Arrival](), list[tuple[int, tuple[int, ...]]](), 1
    for number, a in enumerate(base):
        length, ids = open_.pop(0) if len(open_) > 8 and number % 3 else (0, ())
        length = min(6000, length + a.prompt)
        whole = length // 512
        ids = (*ids, *range(key, key + whole - len(ids)))
        key += whole
        found.append(Arrival(a.time, length, a.output, ids))
        if length < 6000:
            open_.append((length + a.output, ids))
    return found


def study(profile: Profile, args: argparse.Namespace, policies: list[tuple[str, str]], loads: list[float],
          out: Any) -> dict[tuple[str, float, str, str], list[dict[str, Any]]]:  # fmt: skip
    """Every policy on every trace, load and seed."""
    most = capacity(profile)
    found: dict[tuple[str, float, str, str], list[dict[str, Any]]] = {}
    for load in loads:
        for seed in range(args.seeds):
            for name, trace in traces(profile, load * most, args.requests, seed, args.trace).items():
                for budget, admission in policies:
                    result = Simulation(profile, trace, budget, admission).run()
                    found.setdefault((name, load, budget, admission), []).append(result)
                    row = {
                        "trace": name,
                        "load": load,
                        "seed": seed,
                        "budget": budget,
                        "admission": admission,
                    }
                    print(json.dumps({"profile": args.profile, **row, **result}), file=out, flush=True)
    return found


def table(
    found: dict[tuple[str, float, str, str], list[dict[str, Any]]], column: Literal[2, 3], what: str = "kept"
) -> str:
    """Mean over seeds, in percent: a row per trace and load, a column per policy; the best of each row in bold."""
    policies = list(dict.fromkeys(key[column] for key in found))
    lines = [f"| trace | load | {' | '.join(policies)} |", "|---|---|" + "---|" * len(policies)]
    rows = sorted({key[:2] for key in found}, key=lambda k: (k[1], k[0]))
    means = {key: statistics.fmean(r[what] for r in results) for key, results in found.items()}
    for name, load in rows:
        values = [
            next(v for k, v in means.items() if k[:2] == (name, load) and k[column] == p) for p in policies
        ]
        shown = [f"**{v:.1%}**" if v >= max(values) - 5e-4 else f"{v:.1%}" for v in values]
        lines.append(f"| {name} | {load:g} | {' | '.join(shown)} |")
    mean = [statistics.fmean(v for k, v in means.items() if k[column] == p) for p in policies]
    lines.append(f"| all | | {' | '.join(f'{v:.1%}' for v in mean)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=list(PROFILES), default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument(
        "--trace", type=Path, help="also this trace, in Mooncake's format, at the same mean rates"
    )
    parser.add_argument("--budgets", nargs="+", help="only these, with --admissions")
    parser.add_argument("--admissions", nargs="+", default=["wait"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    profile, began = PROFILES[args.profile], time.monotonic()
    out = (args.out or Path("/dev/null")).open("w", encoding="utf-8")
    print(f"profile {args.profile}: {profile}; capacity {capacity(profile):.2f} requests/s\n")
    settings = [f"static {rows}/{running}" for running in profile.running for rows in profile.static]
    bent = [f"{kind}{bend}" for bend in ("", " low", " high") for kind in ("forecast", "oracle")]
    if args.budgets:
        chosen = [(b, a) for b in args.budgets for a in args.admissions]
        found = study(profile, args, chosen, [0.7, 1.0, 1.3, 2.0], out)
        print(table(found, 3 if len(args.admissions) > 1 else 2))
        return
    budgets = [(b, "wait") for b in (*settings, "feedback", *bent)]
    found = study(profile, args, budgets, [0.5, 0.7, 1.0, 1.3], out)
    print(
        f"Rows per step / sequences at once; share of requests within both objectives:\n\n{table(found, 2)}\n"
    )
    means = {
        s: statistics.fmean(r["kept"] for k, v in found.items() if k[2] == s for r in v) for s in settings
    }
    best = max(settings, key=lambda s: means[s])
    gates = [
        (best, a)
        for a in ("all", *(f"cap {n}" for n in CAPS), "whole", "account", "wait", "forecast", "oracle")
    ]
    found = study(profile, args, gates, [0.7, 1.0, 1.3, 2.0], out)
    print(f"Admission, with {best}; the same share:\n\n{table(found, 3)}\n")
    print(f"({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
