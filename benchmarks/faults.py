"""Faults, injected into a live training run: model, loss, optimizer, loop, probes, store and watch are the real ones.

A run trains a three-layer MoE on bytes of Python source and English prose. At a step drawn from its seed something
breaks; the watch, which knows nothing of it, sees what the store sees. What the harness itself makes up: the step times
of eight ranks (the measured one with 1% of jitter each; a slow rank really sleeps, and the step with it), and fp16's
range, which is checked at the gradient of a block's output (above 65,504 becomes infinite) with a dynamic loss scale.

The machine that this was written on runs other work beside it, whose bursts make steps twice as long: real slow steps,
but not the faults looked for. So step times are those of the training thread's own work, plus the time it really slept;
a hang and the time to an alarm are told by the clock on the wall.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import deepseek.train.loop
import deepseek.train.pace
import deepseek.train.step
from deepseek.batch import Batch
from deepseek.events import attached, emit
from deepseek.models import Transformer
from deepseek.models.config import tiny
from deepseek.monitor.detect import Watch
from deepseek.monitor.detectors import DetectConfig
from deepseek.monitor.incident import Incident
from deepseek.monitor.probe_memory import MemoryProbe
from deepseek.monitor.probes import SampledProbe, StepProbe
from deepseek.monitor.sink import StoreSink
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.precision import choose
from deepseek.train import (
    OptimConfig,
    Schedule,
    ScheduleConfig,
    StepResult,
    Stop,
    TrainStep,
    build_optimizer,
    fit,
    next_token_loss,
    seed_everything,
)  # fmt: skip

ROWS, LENGTH, EVERY, RANKS = 8, 48, 5, 8  #: of a batch; of a row; steps between sampled probes; made-up ranks
TOTAL = 1200  #: steps that the schedule is made for; a run ends long before
FP16_MAX = 65504.0

#: What breaks, and the verdict that is right.
FAULTS = {
    "noise batch": "DATA", "repeated data": "DATA", "labels shuffled in a source": "DATA", "data stall": "DATA",
    "learning rate x50": "OPTIMISER", "wrong betas": "OPTIMISER", "NaN in activations": "MODEL",
    "dead expert": "MODEL", "router collapse": "MODEL", "memory leak": "MODEL", "fp16 overflow": "PRECISION",
    "bit flips in weights": "HARDWARE", "slow rank": "HARDWARE", "hang": "HARDWARE",
}  # fmt: skip


@dataclass
class Outcome:
    """What a run's watch said. Times are Unix seconds; ``incidents`` are the last told of each id."""

    fault: str
    seed: int
    at: int
    began: float = math.nan
    rows: list[tuple[int, dict[str, float], float]] = field(default_factory=list)
    told: list[tuple[float, Incident]] = field(default_factory=list)
    step_seconds: float = math.nan

    @property
    def incidents(self) -> list[tuple[float, Incident]]:
        """First time told and last version of every incident."""
        first, last = dict[str, float](), dict[str, Incident]()
        for when, incident in self.told:
            first.setdefault(incident.id, when)
            last[incident.id] = incident
        return [(first[k], last[k]) for k in last]


class WorkClock:
    """``time``, but ``perf_counter`` counts what this thread worked and slept, not what others took from it."""

    def __init__(self) -> None:
        self.slept = 0.0

    def perf_counter(self) -> float:
        return time.thread_time() + self.slept

    def sleep(self, seconds: float) -> None:
        began = time.perf_counter()
        time.sleep(seconds)
        self.slept += time.perf_counter() - began

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@contextmanager
def work_clock(clock: WorkClock) -> Iterator[None]:
    """The loop and the step take their times from ``clock``."""
    places = (deepseek.train.loop, deepseek.train.step, deepseek.train.pace)
    for place in places:
        place.time = clock  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for place in places:
            place.time = time  # type: ignore[attr-defined]


class Recorder:
    """Passes rows to a watch, keeps them, and notes when it answers."""

    def __init__(self, watch: Watch, outcome: Outcome, stop: Stop, after: int) -> None:
        self.watch, self.outcome, self.stop, self.after = watch, outcome, stop, after
        self._found_at: int | None = None

    def update(self, step: int, row: Mapping[str, float], time: float) -> list[Incident]:
        self.outcome.rows.append((step, dict(row), time))
        if self._found_at is not None and step >= self._found_at + self.after:
            self.stop.request("found")
        return self._note(self.watch.update(step, row, time), step)

    def tick(self, now: float) -> list[Incident]:
        return self._note(self.watch.idle(now), self.outcome.rows[-1][0] if self.outcome.rows else 0)

    def _note(self, found: list[Incident], step: int) -> list[Incident]:
        now = time.time()
        self.outcome.told += [(now, incident) for incident in found]
        if self._found_at is None and any(i.step >= self.outcome.at for i in found):
            self._found_at = step
        return found


class Hung(Exception):
    """The run hung and somebody ended it."""


class Text:
    """Two sources of bytes, rows drawn at random places; the first half of a batch is of the first."""

    def __init__(self, seed: int) -> None:
        import argparse
        import pydoc_data.topics
        import statistics
        import tarfile
        import typing

        code = "".join(inspect.getsource(m) for m in (argparse, statistics, tarfile, typing))
        prose = "".join(pydoc_data.topics.topics.values())
        self.sources = {
            name: np.frombuffer(text.encode(), np.uint8) for name, text in (("code", code), ("prose", prose))
        }
        self.random = np.random.default_rng(seed)

    def rows(self) -> dict[str, np.ndarray]:
        found = {}
        for name, text in self.sources.items():
            starts = self.random.integers(0, len(text) - LENGTH - 1, ROWS // 2)
            found[name] = np.stack([text[s : s + LENGTH + 1] for s in starts]).astype(np.int64)
        return found


class LiveSchedule(Schedule):
    """The schedule of a run, and the fault that is about it; ``step`` counts from 0."""

    def __init__(self, live: Live) -> None:
        super().__init__(ScheduleConfig(warmup=0.02), TOTAL)
        self.live = live

    def apply(self, optimizer: Any, step: int) -> float:
        lr = super().apply(optimizer, step)
        if self.live.fault == "learning rate x50" and step + 1 >= self.live.at:
            for group in optimizer.param_groups:
                group["lr"] *= 50
            lr *= 50
        return lr


class Live:
    """One run with one fault (or none: ``fault=""``)."""

    def __init__(
        self, fault: str, seed: int, config: DetectConfig, *, after: int = 14, most: int = 90
    ) -> None:
        seed_everything(seed)
        torch.set_num_threads(1)
        self.fault, self.seed, self.most = fault, seed, most
        self.random = random.Random(seed * 7919 + 13)
        self.at = self.random.randint(95, 125)
        self.outcome = Outcome(fault, seed, self.at)
        self.text, self.stop, self.held = Text(seed), Stop(), list[Tensor]()
        self.repeated: Batch | None = None
        self.clock = WorkClock()
        self.seen, self.again = Counter[bytes](), dict[str, tuple[int, int]]()
        self.scale, self.since = 1024.0, 0
        model = tiny(
            vocab_size=256, hidden=64, ffn=128, pattern="LLH",
            attention=AttentionConfig(heads=2, kv_heads=1, head_dim=32, qk_norm=True, window=32, stride=16),
            moe=MoEConfig(experts=8, top_k=2, expert_ffn=48),
        )  # fmt: skip
        self.model = Transformer(model)
        optimizer = build_optimizer(self.model, OptimConfig(name="adamw", lr=2e-3))
        self.step = TrainStep(self.model, next_token_loss, optimizer, choose("fp32", torch.device("cpu")))
        self.schedule = LiveSchedule(self)
        self.each, self.sampled, self.memory = (
            StepProbe(self.step),
            SampledProbe(self.step),
            MemoryProbe(self.step),
        )
        self.watch = Recorder(Watch(config), self.outcome, self.stop, after)
        self._hooks()

    def run(self) -> Outcome:
        """Train until the fault was found and its aftermath seen, or for ``most`` steps after it."""
        with tempfile.TemporaryDirectory() as place:
            sink = StoreSink(Path(place), self.watch, every=4, seconds=0.1)
            with attached(sink), work_clock(self.clock):
                steps, hooks = self.at + self.most, (self._after,)
                with suppress(Hung):
                    fit(self.step, self._batches(), self.schedule, steps=steps, hooks=hooks, stop=self.stop)
                sink.flush()
        times = np.diff([when for _, _, when in self.outcome.rows])
        self.outcome.step_seconds = float(np.median(times)) if len(times) else math.nan
        return self.outcome

    # What ``fit`` calls: the batches, and a hook after every step.

    def _batches(self) -> Iterator[Batch]:
        for step in range(1, 10**9):
            began = self.clock.perf_counter()
            self.now = step
            if step == self.at:
                self.outcome.began = time.time()
            self._before(step)
            rows = self.text.rows()
            batch = Batch.from_rows(torch.from_numpy(np.concatenate(list(rows.values()))))
            batch = self._broken_batch(step, batch)
            self._count_rows(batch)
            half = ROWS // 2
            shown = {name: batch.tokens[k * half : (k + 1) * half].numpy() for k, name in enumerate(rows)}
            self._data_event(step, shown)
            if step % EVERY == 0:
                self.sampled.prepare()
            self.batch, self.began = batch, began
            yield batch

    def _after(self, step: int, result: StepResult) -> None:
        reading = self.each(result)
        emit("probe", step, names=reading.names, values=reading.values, series=self._precision(result))
        took = self.clock.perf_counter() - self.began
        if self.fault == "slow rank" and step >= self.at:
            self.clock.sleep(0.35 * took)
        self._ranks(step, took)
        if step % EVERY == 0:
            self.sampled(self.batch)[0].tell(step)
        if step % 2 == 0:
            emit("probe", step, series={**self.memory(self.batch), **self._source_losses()})
        if self.fault == "bit flips in weights" and step == self.at - 1:
            self._flip()

    # The faults.

    def _before(self, step: int) -> None:
        if self.fault == "data stall" and step == self.at:
            self.clock.sleep(self.random.uniform(2.5, 4.0))
        if self.fault == "hang" and step == self.at:
            end = time.time() + 30
            while time.time() < end and not any(i.kind == "hang" for _, i in self.outcome.told):
                self.clock.sleep(0.05)
            raise Hung
        if self.fault == "wrong betas" and step == self.at:
            for group in self.step.optimizer.param_groups:
                group["beta1"], group["beta2"] = 0.0, self.random.choice((0.0, 0.05, 0.1))
        if step >= self.at and self.fault in ("dead expert", "router collapse"):
            moe = list(self.model.moe_layers().values())[self.seed % 3]
            if self.fault == "dead expert":
                moe.router.bias[self.seed % 8] = -1e4
            else:
                moe.router.bias[[self.seed % 8, (self.seed + 3) % 8]] = 1e4

    def _broken_batch(self, step: int, batch: Batch) -> Batch:
        if self.fault == "noise batch" and step == self.at:
            noise = torch.from_numpy(self.text.random.integers(0, 256, (ROWS, LENGTH + 1)))
            return Batch.from_rows(noise)
        if self.fault == "repeated data" and step >= self.at:
            self.repeated = self.repeated or batch
            return self.repeated
        if self.fault == "labels shuffled in a source" and step >= self.at:
            half = ROWS // 2
            rows = slice(0, half) if self.seed % 2 else slice(half, ROWS)
            targets = batch.targets.clone()
            flat = targets[rows].flatten()
            order = torch.from_numpy(self.text.random.permutation(len(flat)))
            targets[rows] = flat[order].view(half, LENGTH)
            return replace(batch, targets=targets)
        return batch

    def _hooks(self) -> None:
        block = self.model.blocks[self.seed % 3]

        def forward(module: Any, args: Any, output: Any) -> Any:
            if not self.model.training or not torch.is_grad_enabled():
                return output
            x = output[0] if isinstance(output, tuple) else output
            if self.fault == "NaN in activations" and self.now >= self.at:
                x = x + torch.where(torch.arange(x.shape[-1]) == 3, math.nan, 0.0)
            if self.fault == "memory leak" and self.now >= self.at:
                self.held.append(
                    torch.zeros(2**18 + self.seed % 7).add_(x.detach().mean())
                )  # 1 MiB of history a step
            if self.fault == "fp16 overflow":
                if self.now >= self.at and x.requires_grad:
                    x = x * 1.0
                    x.register_hook(lambda g: self._half_range(g * 3e4))
                elif x.requires_grad:
                    x.register_hook(self._half_range)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        block.register_forward_hook(forward)

    @staticmethod
    def _half_range(gradient: Tensor) -> Tensor:
        return torch.where(gradient.abs() > FP16_MAX, math.inf, gradient)

    def _flip(self) -> None:
        """Exponent bits of one weight (catastrophic), or of a row of weights (a bad copy), by the seed."""
        names = [n for n, p in self.model.named_parameters() if p.dim() >= 2 and n.startswith("blocks")]
        weight = dict(self.model.named_parameters())[self.random.choice(names)].data
        bits = weight.view(torch.int32).view(-1, weight.shape[-1])
        row = self.random.randrange(bits.shape[0])
        if self.seed % 2:
            bits[row, self.random.randrange(bits.shape[1])] ^= 1 << 30
        else:
            bits[row] ^= 1 << 25

    # What the harness measures for its rows.

    def _precision(self, result: StepResult) -> dict[str, float]:
        """A dynamic loss scale where the fault is about one; the others train in fp32 with a scale of 1."""
        if self.fault != "fp16 overflow":
            return {"precision/loss_scale": 1.0}
        lost = bool(result.skipped)
        self.since = 0 if lost else self.since + 1
        told = self.scale
        if lost or self.since >= 500:
            self.scale *= 0.5 if lost else 2.0
        self.step.policy = dataclasses.replace(self.step.policy, loss_scale=self.scale)
        return {"precision/loss_scale": told}

    def _ranks(self, step: int, took: float) -> None:
        jitter = np.exp(self.text.random.normal(0, 0.01, RANKS))
        seconds = took * jitter
        if self.fault == "slow rank" and step >= self.at:
            seconds[self.seed % RANKS] *= 1.35
        emit("ranks", step, seconds=seconds.tolist(), data=[], memory=[])

    def _duplicates(self, name: str) -> float:
        """The share of this source's rows, since the last time, that the run has had before."""
        again, rows = self.again.pop(name, (0, 0))
        return again / max(rows, 1)

    def _count_rows(self, batch: Batch) -> None:
        half = ROWS // 2
        for k, name in enumerate(self.text.sources):
            again, rows = self.again.get(name, (0, 0))
            for row in batch.tokens[k * half : (k + 1) * half].numpy():
                key = row.tobytes()
                again, rows = again + (key in self.seen), rows + 1
                self.seen[key] += 1
            self.again[name] = again, rows

    def _data_event(self, step: int, rows: dict[str, np.ndarray]) -> None:
        if step % EVERY:
            return
        found = {}
        for name, block in rows.items():
            counts = np.bincount(block.ravel(), minlength=256) / block.size
            entropy = float(-(counts[counts > 0] * np.log(counts[counts > 0])).sum())
            found[name] = {"entropy": entropy, "share": 0.5, "duplicates": self._duplicates(name)}
        emit("data", step, sources=found)

    def _source_losses(self) -> dict[str, float]:
        """The loss of each source's rows of this batch, at the weights after the step."""
        half, found = ROWS // 2, {}
        with torch.no_grad():
            for k, name in enumerate(self.text.sources):
                part = self.batch.part(k * half, half)
                part = replace(part, n_targets=part.targets.numel())
                found[f"data/{name}/loss"] = float(next_token_loss(self.model, part).cross_entropy)
        return found
