"""``deepseek bench memory``: what each way of keeping fewer activations saves, and what it costs.

For every mode of ``ds.activation_checkpoint``: bytes kept from forward to backward, FLOPs with what is run again,
the time of forward and backward, and the peak of allocated memory. Then the proof that matters: rows four times as
long (2K → 8K) in the memory that the short ones took.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepseek.batch import Batch
from deepseek.bench.ceilings import ceiling_size, matmul_tflops
from deepseek.bench.report import BenchOptions, Report
from deepseek.bench.timing import attempt, free, measure, peak_gib
from deepseek.bench.train import made, named_config
from deepseek.config import replace as changed
from deepseek.models import ModelConfig, Transformer
from deepseek.ops.jit import compile_blocks
from deepseek.parallel import memory
from deepseek.precision import choose
from deepseek.train import next_token_loss

BASE = "none"
OFFLOAD = ", offload"  #: after a mode's name: what is kept waits on the host


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """Bytes, FLOPs and time of each way of keeping fewer activations."""

    model: str = "dense_856m"
    modes: tuple[str, ...] = ("none", "selective", "budget=0.4", "sqrt", "blocks", "optimal", "none, offload")
    length: int = 4096
    rows: int = 4
    short: int = 2048  # the proof: rows of `long` in the memory of rows of `short`
    long: int = 8192
    compiled: bool = False  # compile the blocks; FLOPs and bytes are then the compiler's choice too

    @property
    def config(self) -> ModelConfig:
        config = named_config(self.model, max(self.length, self.long), self.quick)
        return changed(config, layers=6) if self.quick else config  # plans need a few blocks


def run(options: Options) -> Report:
    """Every mode at one length, then short rows against long ones."""
    device = options.torch_device
    report = Report("memory", device, options, options.json)
    for mode in options.modes:
        memory.parse_mode(
            mode.removesuffix(", offload")
        )  # a misspelt one is told before anything is measured
    report.ceiling("matmul, TFLOP/s", matmul_tflops(device, ceiling_size(device, options.quick)))
    length, short, long = (64, 32, 128) if options.quick else (options.length, options.short, options.long)
    title = f"forward and backward of {options.rows} x {length:,}"
    _modes(report, title, options, length)
    proof = f"{options.rows} rows of {long:,} in the memory of {options.rows} x {short:,}"
    base = _row(report, proof, BASE, short, options)
    if base is not None:
        for mode in options.modes:
            row = _row(report, proof, mode, long, options)
            key = "peak GiB" if base["peak GiB"] is not None else "kept MiB"
            if row is not None:
                row["fits"] = "yes" if row[key] <= base[key] else "no"
    report.show(proof)
    return report.close()


def _modes(report: Report, title: str, options: Options, length: int) -> None:
    base: dict[str, Any] | None = None
    for mode in options.modes:
        row = _row(report, title, mode, length, options)
        base = row if mode == BASE else base
        if row is not None and base is not None:
            row["saved %"] = 100 * (1 - row["kept MiB"] / base["kept MiB"])
            row["FLOPs, of none"] = row["TFLOP"] / base["TFLOP"]
            row["time, of none"] = row["ms"] / base["ms"]
    report.show(title)


def _row(report: Report, title: str, mode: str, length: int, options: Options) -> dict[str, Any] | None:
    """Measure a mode and keep its row, which the caller may complete; ``None`` and a note if it fails."""
    device = options.torch_device
    free(device)
    outcome = attempt(partial(measure_mode, mode, length, options), device)
    if outcome.value is None:
        report.note(f"{mode} at {options.rows} x {length:,}: {outcome.problem}")
        return None
    row = {"mode": mode, "length": length, **outcome.value}
    report.keep(title, row)
    return report.tables[title][-1]


def measure_mode(mode: str, length: int, options: Options) -> dict[str, Any]:
    """Bytes, FLOPs, milliseconds and peak of a forward and backward pass in ``mode``."""
    device = options.torch_device
    step, model = make_step(mode, length, options)
    found = memory.measure(step, weights=model.parameters())
    free(device)

    def both() -> None:
        step().backward()

    time = measure(both, device, rounds=2 if options.quick else 5, warmup=1)
    return {
        "kept MiB": found.saved_bytes / 2**20, "on the host MiB": found.offloaded_bytes / 2**20 or None,
        "TFLOP": found.flops / 1e12, "ms": time.ms, "peak GiB": peak_gib(device),
    }  # fmt: skip


def make_step(mode: str, length: int, options: Options) -> tuple[Callable[[], Tensor], Transformer]:
    """A forward pass that returns the loss, with the model checkpointed as ``mode`` says."""
    device, config = options.torch_device, options.config
    torch.manual_seed(options.seed)
    policy = choose("fp32" if device.type == "cpu" else "bf16", device, training=True)
    model, _ = made(config, device, policy)
    batch = Batch.from_rows(torch.randint(0, config.vocab_size, (options.rows, length + 1))).to(device)
    memory.activation_checkpoint(model, mode.removesuffix(OFFLOAD), offload=mode.endswith(OFFLOAD))
    if options.compiled:
        compile_blocks(model.blocks)

    def step() -> Tensor:
        with policy.compute(device):
            return next_token_loss(model, batch).total

    step().backward()  # modes that plan by measurement have measured
    return step, model
