"""What a run tells of its layers: a few figures at every step, many more at sampled ones.

``StepProbe`` puts what the step has computed anyway (gradient norms, routers' loads) in order: no synchronisation, a
few small kernels. ``SampledProbe`` looks at weights, updates, activations, heads and experts; it runs the model once
more, forward only, on a row or two of the step's batch, beside training: that works alike for compiled models, for CUDA
graphs and with activation checkpointing, and leaves weights, gradients, statistics and random numbers as they are, so
that a run with probes is bit for bit the run without. ``Cadence`` decides how often, from what it costs.

A probe's answer is a ``Reading``: names, and one fp32 vector on the device.

Shape letters: P parameters, G groups (embedding, blocks, head), L expert layers, E experts, H heads, N tokens.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepseek.batch import Batch
from deepseek.events import emit
from deepseek.monitor.probe_forward import Look, look
from deepseek.train.clip import each_norm
from deepseek.train.step import StepResult, TrainStep

DEAD_EXPERT = 0.1  #: an expert with less than this share of the mean load counts as dead
UPDATE_SAMPLE = 4096  #: elements of a parameter, at most, by which its update is measured
PATIENCE = (
    20  #: recent costs of which the least counts: what the probe needs, not what the machine did meanwhile
)


class Reading(NamedTuple):
    """``values[i]``, fp32 on the device, is the figure called ``names[i]``."""

    names: tuple[str, ...]
    values: Tensor

    def tell(self, step: int) -> None:
        """Emit it as a 'probe' event."""
        emit("probe", step, names=self.names, values=self.values)


class Groups:
    """Which parameters belong together: ``embedding``, each block by its number, and ``head`` with the final norm."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        group = {p: _group(name) for name, p in model.named_parameters()}
        of = [group.get(p, "head") for p in parameters]
        self.names = list(dict.fromkeys(of))
        self.places = [[i for i, name in enumerate(of) if name == own] for own in self.names]
        self._flat = [i for place in self.places for i in place]
        self._contiguous = self._flat == list(range(len(of)))
        self._order: Tensor | None = None

    def joint(self, norms_P: Tensor) -> Tensor:
        """The joint norm of each group, ``[G]``, from the norm of each parameter."""
        sizes = [len(place) for place in self.places]
        if not self._contiguous:
            if self._order is None:
                self._order = torch.tensor(self._flat, device=norms_P.device)
            norms_P = norms_P.index_select(0, self._order)
        # One kernel for all groups; and a NaN stays in the group it came from.
        return torch.stack(torch._foreach_norm(norms_P.split(sizes), 2))


def _group(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blocks":
        return parts[1]
    return "embedding" if parts[0] == "embedding" else "head"


class StepProbe:
    """Figures of every step: each group's gradient norm, each router's entropy, MaxVio, dead experts and coverage."""

    def __init__(self, step: TrainStep) -> None:
        self.groups = Groups(step.model, step.parameters)
        routers = list(step.model.moe_layers())
        names = [f"layer/{name}/grad_norm" for name in self.groups.names]
        for figure in ("entropy", "max_vio", "dead", "coverage"):
            names += [f"router/{i}/{figure}" for i in routers]
        self.names = tuple(names)

    @torch.no_grad()
    def __call__(self, result: StepResult) -> Reading:
        assert result.gradient_norms is not None
        parts = [self.groups.joint(result.gradient_norms)]
        if result.load:
            assert result.entropies is not None
            load_LE = torch.stack(result.load)
            even = 1 / load_LE.shape[1]
            parts += [
                result.entropies,
                load_LE.amax(1) / even - 1,
                (load_LE < DEAD_EXPERT * even).sum(1),
                load_LE.clamp(max=even).sum(1),
            ]
        return Reading(self.names, torch.cat([part.float() for part in parts]))


class SampledProbe:
    """Weights, updates, activations, heads and experts, at some steps.

    ``prepare`` before the step (it remembers some of each weight's elements), then ``__call__`` after it.

    Args:
        rows: of the batch that are looked at. queries: positions of a row whose attention is computed.
    """

    def __init__(self, step: TrainStep, rows: int = 1, queries: int = 32) -> None:
        self.step, self.rows, self.queries = step, rows, queries
        self.groups = Groups(step.model, step.parameters)
        self.weights = [step.optimizer.masters.get(p, p.detach()) for p in step.parameters]
        # A sample stands for its parameter: n/s times its squared norm estimates the whole one.
        scale = [math.sqrt(weight.numel() / _some(weight).numel()) for weight in self.weights]
        self._scale = torch.tensor(scale, dtype=torch.float32, device=step.device)
        self._before: list[Tensor] | None = None
        self._turn = 0
        self._names: tuple[str, ...] = ()

    @torch.no_grad()
    def prepare(self) -> None:
        """Remember up to ``UPDATE_SAMPLE`` elements of every weight."""
        self._before = [_some(weight).clone() for weight in self.weights]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Reading, Look]:
        """The figures, and what the model said to the rows it was shown: rows take turns from call to call."""
        first = self._turn % max(1, batch.rows - self.rows + 1)
        self._turn += self.rows
        part = batch.part(first, self.rows).to(self.step.device)
        seen = look(self.step.model, part, self.step.policy, self.queries)
        names, values = self._weights()
        for own_names, own_values in (*seen.figures, self._experts()):
            names += own_names
            values.append(own_values)
        if self._names != (now := tuple(names)):
            self._names = now
        reading = Reading(self._names, torch.cat([value.flatten().float() for value in values]))
        return reading, seen._replace(first_row=first)

    def _weights(self) -> tuple[list[str], list[Tensor]]:
        """Norms of every group's weights and, if ``prepare`` was called, the size of the last update beside them."""
        names = [f"layer/{name}/weight_norm" for name in self.groups.names]
        values = [self.groups.joint(each_norm(self.weights))]
        if self._before is not None:
            now = [_some(weight) for weight in self.weights]
            moved = each_norm(torch._foreach_sub(now, self._before))
            update = self.groups.joint(moved.float() * self._scale)
            size = self.groups.joint(each_norm(self._before).float() * self._scale)
            names += [f"layer/{name}/update_ratio" for name in self.groups.names]
            values.append(update / size.clamp(min=1e-30))
            self._before = None
        return names, values

    def _experts(self) -> tuple[list[str], Tensor]:
        """Every expert's selection bias, and the norm of its weights."""
        layers = self.step.model.moe_layers()
        if not layers:
            return [], torch.zeros(0, device=self.step.device)
        masters = self.step.optimizer.masters
        names, values = [], []
        for i, moe in layers.items():
            matrices = [masters.get(p, p.detach()).flatten(1) for p in (moe.gate_up, moe.down)]
            norms = [torch.linalg.vector_norm(m, dim=1, dtype=_wide(m)) for m in matrices]
            values += [moe.router.bias, torch.linalg.vector_norm(torch.stack(norms), dim=0)]
            for figure in ("bias", "weight_norm"):
                names += [f"expert/{i}/{e}/{figure}" for e in range(moe.config.experts)]
        return names, torch.cat([value.float() for value in values])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _some(weight: Tensor) -> Tensor:
    """At most ``UPDATE_SAMPLE`` elements, evenly spaced, not all of one column."""
    flat = weight.view(-1)
    stride = -(-flat.numel() // UPDATE_SAMPLE)
    if stride > 1 and weight.dim() > 1:
        while math.gcd(stride, weight.shape[-1]) > 1:
            stride += 1
    return flat[::stride]


class Cost:
    """What a part of a step costs: the host's time or, where it is more, that of the accelerator's queue."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host = 0.0
        self._marks: list[tuple[torch.Event, torch.Event]] = []

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        if self.device.type != "cpu":
            self._start = self._mark()

    def __exit__(self, *error: object) -> None:
        self._host += time.perf_counter() - self._began
        if self.device.type != "cpu":
            self._marks.append((self._start, self._mark()))

    def _mark(self) -> torch.Event:
        mark = torch.Event(self.device, enable_timing=True)
        mark.record()
        return mark

    def read(self) -> float:
        """Seconds, once they are known; 0 until then. Waits for nothing."""
        if any(not end.query() for _, end in self._marks):
            return 0.0
        return max(self._host, sum(start.elapsed_time(end) for start, end in self._marks) / 1e3)


class Cadence:
    """How many steps lie between two sampled probes, so that they take ``overhead`` of the time.

    Args:
        overhead: share of the time. every: a fixed number of steps instead; 0: from the costs.

    The interval follows the least of the last few costs and the median step time. The first probes come early, after 2,
    8 and 32 steps, for the first is a cold one and dear; and a run of 300 steps has ten at least, so that a short one
    has curves. A shorter one has fewer: ten would take it above one per cent.
    """

    LEARNING = (2, 8, 32)  #: the longest interval before the first, second and third probe
    LEAST = 10  #: probes of a run whose length is known,
    OFTEN = 30  #: unless fewer than so many steps would lie between two

    def __init__(self, overhead: float, every: int = 0) -> None:
        self.overhead, self.fixed = overhead, every
        self._costs: deque[float] = deque(maxlen=PATIENCE)
        self._steps: deque[float] = deque(maxlen=PATIENCE)
        self._last = self._longest = 0

    def took(self, seconds: float) -> None:
        """A probe cost so much."""
        self._costs.append(seconds)

    def step(self, seconds: float) -> None:
        """A step, without probes, took so long."""
        self._steps.append(seconds)

    @property
    def every(self) -> int:
        """Steps between two probes, as known so far."""
        if self.fixed:
            return self.fixed
        if not self._costs or not self._steps:
            return self.LEARNING[0]
        typical = sorted(self._steps)[len(self._steps) // 2]
        found = max(1, math.ceil(min(self._costs) / max(self.overhead * typical, 1e-9)))
        if len(self._costs) < len(self.LEARNING):
            found = min(found, self.LEARNING[len(self._costs)])
        return min(found, self._longest or found)

    def due(self, step: int) -> bool:
        """Whether a probe is to run at ``step``; asking does not change the answer, ``done`` does."""
        if self.fixed:
            return step % self.fixed == 0
        return step >= self._last + self.every

    def done(self, step: int) -> None:
        self._last = step

    def begin(self, step: int, steps: int = 0) -> None:
        """Training goes on from ``step``, to ``steps`` if that is known."""
        self._last, self._longest = step, steps and max(steps // self.LEAST, self.OFTEN)


__all__ = ["Cadence", "Cost", "Groups", "Look", "Reading", "SampledProbe", "StepProbe"]
