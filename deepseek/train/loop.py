"""The training loop. ``fit`` is the whole of it; what happens around a step is a hook.

A hook is called as ``hook(step, result)`` after step number ``step`` (1 is the first) and may save, evaluate, or do
nothing; ``Stop`` asks the loop to end after the current step.
"""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch

from deepseek.batch import Batch
from deepseek.config import configclass
from deepseek.dist import comm
from deepseek.errors import ConfigError, TrainingError
from deepseek.events import emit
from deepseek.parallel.memory import parse_mode
from deepseek.train.clip import Kind
from deepseek.train.pace import Pace, Readback
from deepseek.train.schedule import Schedule
from deepseek.train.step import StepResult, TrainStep

Hook = Callable[[int, StepResult], None]


@configclass
class TrainingConfig:
    """How long, how much at once, and how carefully."""

    steps: int = 0  # 0: from `tokens`
    tokens: int = 0  # 0 with steps=0: 20 tokens per active parameter
    batch_tokens: int = 8192  # tokens per optimizer step, over all ranks and micro-batches
    length: int = 512  # positions per packed row
    micro_rows: int = 0  # rows per forward pass; 0: as many as memory_budget allows
    memory_budget: float = 4.0  # GiB for activations on a CPU; on an accelerator 60% of its free memory
    precision_mode: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    loss_scaling_factor: float = 128.0  # fp16 only
    clip: Kind = "norm"  # zclip: what is unusual for the run; agc: by the size of each unit's weights
    grad_clip_threshold: float = 1.0  # norm: the largest, 0 for none; zclip: while it warms up
    z_loss: float = 0.0  # weight of log²Σexp(logits): keeps logits from drifting; 1e-4 is usual
    max_nonfinite: int = 5  # consecutive non-finite steps that are forgiven; one more ends the run
    compile: bool = False
    cuda_graph: bool = False  # replay the step as CUDA graphs: for models whose kernels are short
    activation_checkpoint: str = (
        "none"  # sqrt, blocks, selective, budget=0.4, optimal: recompute, to keep less
    )
    deterministic: bool = False
    seed: int = 0
    device: str = "auto"

    def check(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"train.seed={self.seed} must lie between 0 and 2^63 - 1")
        for name in ("steps", "tokens", "micro_rows", "grad_clip_threshold", "max_nonfinite", "z_loss"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must not be negative")
        if self.length < 2 or self.batch_tokens < self.length:
            raise ConfigError(
                f"train.batch_tokens={self.batch_tokens} must hold at least one row of train.length={self.length} "
                "(and a row at least 2 positions)"
            )
        mode, _ = parse_mode(self.activation_checkpoint)
        if self.cuda_graph and mode != "none" and not (self.compile and mode in ("selective", "budget")):
            raise ConfigError(
                f"train.activation_checkpoint={self.activation_checkpoint!r} runs parts again, which a CUDA graph "
                "cannot capture; set train.cuda_graph=false, or activation_checkpoint='none' (selective, with "
                "compile=true)"
            )
        if not self.loss_scaling_factor > 0:
            raise ConfigError(f"train.loss_scaling_factor={self.loss_scaling_factor} must be positive")


class Stop:
    """Asks the loop to end after the current step: by a signal, or by ``request``.

    ``reason`` may be set on one rank and at any moment; ``agreed`` is the same on all, from one step to the next.
    """

    def __init__(self) -> None:
        self.reason, self.agreed = "", False

    def request(self, reason: str) -> None:
        self.reason = self.reason or reason

    @contextmanager
    def on_signals(self) -> Iterator[Stop]:
        """SIGINT and SIGTERM request a stop; a second SIGINT interrupts at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.reason and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.request(signal.Signals(number).name)

        try:
            previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller handles signals
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class NonFiniteGuard:
    """A hook that ends training after ``limit`` consecutive steps without a finite loss and gradient.

    On an accelerator it looks at a step when the next one has been started, and names the right one; ``flush`` looks at
    the last.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.run = limit, 0
        self._pending: tuple[int, Readback] | None = None

    def __call__(self, step: int, result: StepResult) -> None:
        found = Readback([result.skipped, result.loss, result.grad_norm])
        self.flush()
        self._pending = (step, found)
        if not found.waiting:
            self.flush()

    def flush(self) -> None:
        """Look at the step that was kept waiting."""
        if self._pending is None:
            return
        (step, found), self._pending = self._pending, None
        skipped, loss, norm = found.read()
        self.run = self.run + 1 if skipped else 0
        if skipped:
            emit(
                "warning",
                step,
                text=f"step {step} skipped: loss {loss}, gradient norm {norm}; weights unchanged",
            )
        if self.run > self.limit:
            raise TrainingError(
                f"{self.run} consecutive non-finite steps up to step {step} (loss {loss}); weights are "
                "those before the first of them. Lower optim.lr, use precision_mode='fp32', or resume from an "
                "earlier checkpoint with --from"
            )


def fit(
    train_step: TrainStep,
    batches: Iterable[Batch],
    schedule: Schedule,
    *,
    steps: int,
    start: int = 0,
    hooks: Sequence[Hook] = (),
    stop: Stop | None = None,
    peak_tokens_per_second: float = 0.0,
) -> int:
    """Train from step ``start`` to ``steps``; returns the number of the last step done.

    Args:
        hooks: called after every step.
        stop: checked after every step, agreed on by all ranks before the hooks are called.
        peak_tokens_per_second: what the device could do at its peak; MFU is relative to it. 0: unknown.

    On an accelerator the host runs one step ahead, and the speed in a step's event is that of the step before
    (``Pace``).

    Raises:
        TrainingError: from a guard, or when the batches run out.
    """
    stream, pace = iter(batches), Pace(train_step.device)
    for step in range(start + 1, steps + 1):
        pace.start()
        began = time.perf_counter()
        lr = schedule.apply(train_step.optimizer, step - 1)
        batch = next(stream, None)
        if batch is None:
            raise TrainingError(f"the data ended before step {step} of {steps}")
        waited = time.perf_counter() - began
        result = train_step(batch)
        values = _values(result, waited, pace.stop())
        if peak_tokens_per_second:
            values["mfu"] = values["tokens_per_second"] / peak_tokens_per_second
        emit("train", step, lr=lr, **values)
        if stop is not None:
            stop.agreed = comm.agree(bool(stop.reason))
        for hook in hooks:
            hook(step, result)
        if step == steps or (stop is not None and stop.agreed):
            _flush(hooks)
            return step
    return max(start, steps)


def _flush(hooks: Sequence[Hook]) -> None:
    """Let hooks that are a step behind catch up."""
    for hook in hooks:
        if isinstance(hook, NonFiniteGuard):
            hook.flush()


def _values(result: StepResult, waited: float, took: float) -> dict[str, Any]:
    """The fields of the 'train' event; tensors stay where they are."""
    queued = result.loss.device.type != "cpu"  # the host's laps then measure only how fast it fills the queue
    seconds = {"data": waited, **({"step": max(0.0, took - waited)} if queued else result.seconds)}
    seconds["other"] = max(0.0, took - sum(seconds.values()))
    return {
        "loss": result.loss,
        "bits_per_byte": result.loss * (result.tokens / (math.log(2) * max(result.n_bytes, 1))),
        "balance_loss": result.balance_loss,
        "grad_norm": result.grad_norm,
        "clipped": result.clipped,
        "skipped": result.skipped,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens / took,
        "seconds": {k: round(v, 5) for k, v in seconds.items()},
        "load": result.load,
        "gates": result.gates,
        "coverage": result.coverage,
        "max_vio": result.max_violation,
        "router_entropy": result.router_entropy,
    }


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; ``deterministic`` also refuses operations without a deterministic form."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
