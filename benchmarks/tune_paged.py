"""Better tiles and splits for attention over a paged cache on this GPU: what ``bench_paged.py --sweep`` runs.

    python benchmarks/bench_paged.py --sweep                                    # about 100 s with 32 cores
    python benchmarks/bench_paged.py --sweep --cases F64x640,H1x2048,F8x512x512

A case is ``kind`` ``streams`` x ``length``, and x ``rows`` for prefill. Cases of a kind that the same numbers decide (a
decode's are ``short``, ``waves`` and ``least``, a chunk's ``long``) are a group. First all kernels are compiled in
parallel processes (Triton keeps them on disk; one that fails, or wants more shared memory than there is, is left
out); then each candidate is timed with every case of its group, by CUDA graphs over caches that the L2 does not hold.
Decodes go in two rounds: tiles, then the best tiles with other splits. What a group recommends has the least mean
of its times relative to each case's best.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from bench_paged import BLOCK, STRIDE, WINDOW, Case, Layer, gpu_seconds

from deepseek.errors import ConfigError
from deepseek.ops.triton import processors
from deepseek.ops.triton.paged_attention import HALF, Tiles, Tuning, forced_tuning, share_out

CASES = "F1x640,F8x2048,F64x640,F64x2048,H1x2048,H64x1024,L64x1024,F1x2048x2048,F8x512x512,L1x2048x2048,H1x2048x2048"
SHARED = 227 * 1024  #: bytes of shared memory that a program may have
WAVES, LEAST = (0.5, 1.0, 2.0, 3.0, 4.0, 8.0), (64, 128, 256, 512)
DTYPE = torch.bfloat16

Timer = Callable[..., float]


def parse(names: str) -> list[Case]:
    """``F64x640,F8x512x512`` as cases."""
    cases = []
    for name in names.split(","):
        match = re.fullmatch(r"([FLH])(\d+)x(\d+)(?:x(\d+))?", name.strip())
        if match is None:
            raise ConfigError(
                f"case {name!r}: want as F64x640 (kind, streams, length), or F8x512x128 with rows"
            )
        cases.append(Case(match[1], int(match[2]), int(match[3]), int(match[4] or 1)))
    return cases


@dataclass
class Group:
    """Cases that the same numbers decide, and the times found: seconds of each tuning by case."""

    kind: str
    decode: bool
    many: bool
    cases: list[Case]
    base: Tuning
    layers: list[Layer] = field(default_factory=list)
    times: list[dict[Tuning, float]] = field(default_factory=list)
    plans: list[dict[Any, float]] = field(default_factory=list)
    failed: set[Tiles] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"{self.kind} {'many decodes' if self.many else 'decode' if self.decode else 'prefill'}"

    def tiles(self, tuning: Tuning) -> Tiles:
        return tuning.short if self.decode else tuning.long

    def candidates(self, head_dim: int) -> list[Tuning]:
        """The tiles to try, the shipped ones first."""
        if self.decode:
            tiles = [
                Tiles(16, keys, warps, stages)
                for keys, some in ((32, (1, 2, 4)), (64, (2, 4, 8)), (128, (4, 8)))
                for warps in some
                for stages in (2, 3, 4, 5, 6)
            ]
        else:
            tiles = [
                Tiles(rows, keys, warps, stages)
                for rows, some in ((64, (4, 8)), (128, (8,)))
                for keys in (32, 64, 128)
                for warps in some
                for stages in (2, 3, 4)
            ]
        fit = [x for x in tiles if (x.stages - 1) * x.keys * head_dim * 4 + x.rows * head_dim * 2 <= SHARED]
        random.Random(0).shuffle(fit)  # where time runs out, it is not all of one kind that is left out
        found = [replace(self.base, short=x) if self.decode else replace(self.base, long=x) for x in fit]
        return list(dict.fromkeys([self.base, *found]))

    def best(self, count: int) -> list[Tuning]:
        """By the mean over the cases of the logarithm of the time relative to each case's best."""
        every = [t for t in self.times[0] if all(t in times for times in self.times)]
        return sorted(every, key=self.loss)[:count]

    def loss(self, tuning: Tuning) -> float:
        return sum(math.log(times[tuning] / min(times.values())) for times in self.times) / len(self.times)


def groups(cases: list[Case], args: argparse.Namespace) -> list[Group]:
    some: dict[tuple[str, bool, bool], Group] = {}
    for case in cases:
        decode = case.rows == 1
        many = decode and case.streams * args.kv_heads >= processors(torch.device(args.device))
        shipped = HALF[64 if args.head_dim <= 64 else 128][case.kind]
        base = replace((many and shipped.many) or shipped, many=None)
        some.setdefault((case.kind, decode, many), Group(case.kind, decode, many, [], base)).cases.append(
            case
        )
    return list(some.values())


# --- compiling ------------------------------------------------------------------------------------------------------

_held: dict[str, Layer] = {}


def compile_one(args: argparse.Namespace, case: Case, tuning: Tuning) -> str:
    """Launch once; what Triton compiled stays on disk. Returns what went wrong."""
    try:
        with torch.inference_mode(), forced_tuning(tuning):
            if case.name not in _held:
                _held.clear()
                _held[case.name] = Layer(case, args, DTYPE)
            _held[case.name].attend()
            if args.device == "cuda":
                torch.cuda.synchronize()
    except Exception as error:  # whatever a compiler may raise: this candidate is out
        return f"{type(error).__name__}: {str(error)[:100]}"
    return ""


def compile_all(args: argparse.Namespace, some: list[Group], end: float) -> dict[str, Any]:
    """Fill Triton's cache from as many processes as there are cores; note what fails."""
    jobs: list[tuple[Group, Case, Tuning]] = []
    for group in some:
        case = group.cases[0]  # the others take the same kernels
        for tuning in group.candidates(args.head_dim):
            whole, parts = replace(tuning, waves=0.0), replace(tuning, waves=1e9, least=64)
            jobs += [(group, case, whole), (group, case, parts)] if group.decode else [(group, case, tuning)]
        if group.decode:  # what adds the splits up
            jobs += [(group, x, replace(group.base, waves=w, least=64)) for x in group.cases for w in WAVES]
    jobs.sort(key=lambda job: job[0].decode)  # the long ones first
    start, reasons = time.monotonic(), set()
    left = dict(enumerate(jobs))
    for i, wrong in outcomes(args, jobs, end):
        group, _, tuning = left.pop(i)
        if wrong:
            group.failed.add(group.tiles(tuning))
            reasons.add(wrong)
    for group, _, tuning in left.values():  # too late, or lost with a process that died
        group.failed.add(group.tiles(tuning))
    failed = sum(len(group.failed) for group in some)
    return {
        "compiled": len(jobs) - len(left), "of": len(jobs), "seconds": time.monotonic() - start,
        "failed_tiles": failed, "why": sorted(reasons)[:5],
    }  # fmt: skip


def outcomes(
    args: argparse.Namespace, jobs: list[tuple[Group, Case, Tuning]], end: float
) -> Iterator[tuple[int, str]]:
    """Which job is done, and what went wrong; those that are not done at ``end`` are left out."""
    workers = args.jobs if args.jobs is not None else max(1, min(24, (os.cpu_count() or 2) - 4))
    if not workers:
        for i, job in enumerate(jobs):
            yield i, compile_one(args, *job[1:])
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    waiting = {pool.submit(compile_one, args, *job[1:]): i for i, job in enumerate(jobs)}
    try:
        for future in as_completed(waiting, timeout=max(1.0, end - time.monotonic())):
            yield waiting[future], future.result()
    except (TimeoutError, BrokenProcessPool):
        pass
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# --- timing ---------------------------------------------------------------------------------------------------------


def plan(case: Case, tuning: Tuning, args: argparse.Namespace) -> Any:
    """What a launch depends on: tunings of the same plan are timed once."""
    if case.rows > 1:
        return tuning.long
    keys = case.length if case.kind == "F" else min(case.length, WINDOW)
    blocks = max(0, case.length - BLOCK) // STRIDE + 1 if case.kind == "H" else 0
    device = torch.device(args.device)
    shares = share_out(tuning, tuning.short.keys, case.streams * args.kv_heads, keys, blocks, device)
    return tuning.short, shares if shares.splits > 1 else 1


def measure(group: Group, tuning: Tuning, args: argparse.Namespace, timer: Timer) -> None:
    """Seconds of every case of the group; a case that fails has none."""
    if group.tiles(tuning) in group.failed:
        return
    for case, layer, times, plans in zip(group.cases, group.layers, group.times, group.plans):
        key = plan(case, tuning, args)
        if key not in plans:
            try:
                with forced_tuning(tuning):
                    plans[key] = timer(layer.attend, max(12, len(layer.caches)))
            except Exception:  # out of a resource that only this launch wants
                if args.device == "cuda":
                    torch.cuda.synchronize()
                group.failed.add(group.tiles(tuning))
                return
        times[tuning] = plans[key]


def search(group: Group, args: argparse.Namespace, timer: Timer, end: float) -> Iterator[dict[str, Any]]:
    group.layers = []
    for case in group.cases:
        small = Layer(replace(case, streams=1), args, DTYPE)
        sets = min(96, max(1, 150_000_000 // (small.bytes() * case.streams))) if case.rows == 1 else 1
        group.layers.append(Layer(case, args, DTYPE, sets if args.device == "cuda" else 2))
    group.times, group.plans = [{} for _ in group.cases], [{} for _ in group.cases]
    tilings = group.candidates(args.head_dim)
    for i, tuning in enumerate(tilings):
        if i and time.monotonic() > end:
            break
        measure(group, tuning, args, timer)
    if group.decode:
        kept = [t.short for t in group.best(6)]
        kept += [min(times, key=lambda t: times[t]).short for times in group.times if times]
        for short in dict.fromkeys(kept):
            for waves in WAVES:
                for least in LEAST:
                    if time.monotonic() < end:
                        measure(
                            group, replace(group.base, short=short, waves=waves, least=least), args, timer
                        )
    for case, times in zip(group.cases, group.times):
        order = sorted(times, key=lambda t: times[t])
        yield {
            "case": case.name, "tried": len(times), "of": len(tilings),
            "shipped_us": times.get(group.base, math.nan) * 1e6,
            "best": [told(group, tuning, times[tuning]) for tuning in distinct(order, times)],
        }  # fmt: skip


def distinct(order: list[Tuning], times: dict[Tuning, float]) -> list[Tuning]:
    """The five best that are not one launch by another name."""
    firsts: dict[float, Tuning] = {}
    for tuning in order:
        firsts.setdefault(times[tuning], tuning)
    return list(firsts.values())[:5]


def told(group: Group, tuning: Tuning, seconds: float) -> str:
    x = group.tiles(tuning)
    split = f" waves {tuning.waves:g} least {tuning.least}" if group.decode else ""
    return f"{seconds * 1e6:.2f} us ({x.rows}, {x.keys}, {x.warps}, {x.stages}){split}"


def sweep(args: argparse.Namespace, timer: Timer = gpu_seconds) -> Iterator[dict[str, Any]]:
    start = time.monotonic()
    some = groups(parse(args.cases or CASES), args)
    yield compile_all(args, some, start + 0.45 * args.sweep_seconds)
    gc.collect()
    gc.freeze()  # each capture collects, and would go through all that was ever imported
    left, cases = start + args.sweep_seconds, sum(len(group.cases) for group in some)
    found: dict[str, Tuning] = {}
    head = 64 if args.head_dim <= 64 else 128
    for group in some:
        now = time.monotonic()
        share = (left - now) * len(group.cases) / cases
        cases -= len(group.cases)
        yield from search(group, args, timer, now + share)
        for best in group.best(1):
            costs = " ".join(
                f"{case.name}: {times[best] * 1e6:.2f} us, best {min(times.values()) * 1e6:.2f}"
                for case, times in zip(group.cases, group.times)
            )
            yield {
                "group": group.name,
                "recommended": told(group, best, times_mean(group, best)),
                "cases": costs,
            }
            found[group.kind] = merged(found.get(group.kind) or HALF[head][group.kind], group, best)
        group.layers = []
        if args.device == "cuda":
            torch.cuda.empty_cache()
    gc.unfreeze()
    for kind, tuning in found.items():
        yield {"paste": f'HALF[{head}] "{kind}": {line(tuning)},'}


def times_mean(group: Group, tuning: Tuning) -> float:
    return math.exp(sum(math.log(times[tuning]) for times in group.times) / len(group.times))


def merged(into: Tuning, group: Group, best: Tuning) -> Tuning:
    """What the group decides, put into a kind's tuning."""
    if group.many:
        return replace(into, many=best)
    if group.decode:
        return replace(into, short=best.short, waves=best.waves, least=best.least)
    return replace(into, long=best.long)


def line(t: Tuning) -> str:
    """As the source has it."""
    tiles = {"": t.short, " ": t.long, "one=": t.one}
    parts = [f"{k.strip()}Tiles({x.rows}, {x.keys}, {x.warps}, {x.stages})" for k, x in tiles.items() if x]
    parts += [f"waves={t.waves}", f"least={t.least}"] + ([f"many={line(t.many)}"] if t.many else [])
    return f"Tuning({', '.join(parts)})"
