"""``deepseek bench train``: tokens per second and MFU of our stack, through the path a real run takes, and of peers.

Every stack gets the same random tokens, the same tokens per optimizer step and the largest micro-batch that
fits. Model FLOPs are counted by ``deepseek.models.count`` and are the same for all. Ours keeps fp32 master
weights and optimizer state, clips and balances; the peers train bf16 weights (``bench.peers``).

An expert model is run twice: with its own router's choices, and with experts assigned in turn ("forced
balance"), so that the price of real routing can be seen.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepseek.batch import Batch
from deepseek.bench import kernels
from deepseek.bench.ceilings import ceiling_size, compute_dtype, datasheet_tflops, matmul_tflops
from deepseek.bench.peers import PEERS, Setup, Step, full_attention
from deepseek.bench.report import BenchOptions, Report
from deepseek.bench.timing import Timer, attempt, free, peak_gib, reset_peak, synchronize
from deepseek.config import replace as changed
from deepseek.errors import ConfigError, did_you_mean
from deepseek.models import PRESETS, ModelConfig, Transformer, count
from deepseek.ops.jit import compile_blocks
from deepseek.precision import Policy, choose, lower
from deepseek.train import OptimConfig, TrainStep, build_optimizer, next_token_loss
from deepseek.train.graphs import WARMUP, GraphedStep
from deepseek.weights.checkpoint import CheckpointConfig, Checkpointer

TITLE = "training"
DISTINCT = 8  #: different batches; a run goes round them


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """Tokens per second and MFU of ours and of peers."""

    model: str = "dense_856m"  # a preset: dense_856m, moe_64x2, small, …
    peer: str = "all"  # all, none, or some of plain-torch, transformers, liger, separated by commas
    peer_compile: Literal["auto", "yes", "no", "both"] = (
        "auto"  # transformers: auto is both if dense, eager if not
    )
    length: int = 4096
    batch_tokens: int = 131_072  # tokens per optimizer step
    micro_rows: int = 8  # rows per forward pass to try first; halved while memory runs out
    steps: int = 8  # timed optimizer steps
    warmup: int = 2
    optimizer: Literal["adamw", "muon"] = "adamw"  # ours; peers use AdamW
    precision: str = "auto"
    eager: bool = False  # do not compile anything
    cuda_graph: bool = False  # also ours replayed as CUDA graphs; forced balance is then replayed, too
    real_only: bool = False  # no forced-balance run
    profile: bool = False  # kernels by kind and name, and the share of time without any
    checkpoint: bool = False  # also measure what a snapshot costs
    cold_start: bool = False  # also the first step of a new process, twice: empty compile cache, then kept
    seconds: float = 0.0  # start nothing more after so long; 0: no limit
    stack: str = ""  # this one only, in this process; else each stack has a process of its own on a GPU

    @property
    def config(self) -> ModelConfig:
        return named_config(self.model, self.length, self.quick)


def named_config(preset: str, length: int, quick: bool = False) -> ModelConfig:
    """A preset's shape for rows of ``length``. Raises ``ConfigError`` for an unknown preset."""
    if preset not in PRESETS:
        raise ConfigError(
            f"unknown preset {preset!r}{did_you_mean(preset, PRESETS)}; one of {', '.join(PRESETS)}"
        )
    config = PRESETS[preset]()
    config = changed(config, max_length=max(config.max_length, length))
    return quick_config(config) if quick else config


def quick_config(config: ModelConfig) -> ModelConfig:
    """The same kind of model, small enough for a test."""
    heads = changed(config.attention, heads=4, kv_heads=2, head_dim=16, window=16, block=8, stride=4)
    moe = changed(config.moe, experts=4, top_k=2, expert_ffn=32) if config.moe.experts else config.moe
    return changed(config, vocab_size=256, hidden=64, layers=2, ffn=128, attention=heads, moe=moe)


def run(options: Options) -> Report:
    """Measure every stack; rows appear as they are found."""
    device = options.torch_device
    if options.quick:
        options = replace(options, length=64, batch_tokens=256, micro_rows=2, steps=2, warmup=1)
    if options.cuda_graph:
        options = replace(options, warmup=max(options.warmup, WARMUP + 1))  # the capture is no step to time
    if options.batch_tokens % options.length:
        raise ConfigError(
            f"--batch-tokens={options.batch_tokens} is not a multiple of --length={options.length}"
        )
    if options.steps < 1 or options.micro_rows < 1 or options.warmup < 0:
        raise ConfigError(
            f"--steps={options.steps} and --micro-rows={options.micro_rows} must be at least 1, "
            f"--warmup={options.warmup} not negative"
        )
    config, began = options.config, time.perf_counter()
    todo = stacks(options, config)
    if options.stack:
        todo = {options.stack: _named(todo, options.stack)}
    report = Report("train", device, options, options.json)
    if options.cold_start:
        _cold_start(options, report)
    size = ceiling_size(device, options.quick)
    ceiling = _ceilings(report, device, size)
    report.say(_told(options, config))
    for name, make in todo.items():
        if 0 < options.seconds < time.perf_counter() - began:
            report.note(f"{name}: not started, {options.seconds:.0f} s are over")
            continue
        if device.type == "cuda" and len(todo) > 1:
            _alone(name, options, report)
        else:
            _measure(name, make, options, report, ceiling)
    report.show(TITLE)
    report.ceiling("matmul again, at the end, TFLOP/s", matmul_tflops(device, size))
    return report.close()


def _named(todo: dict[str, Maker], name: str) -> Maker:
    if name not in todo:
        raise ConfigError(f"no stack {name!r}{did_you_mean(name, todo)}; there are: {', '.join(todo)}")
    return todo[name]


def _alone(name: str, options: Options, report: Report) -> None:
    """One stack in a process of its own: nothing that another left, in memory or compiled, can touch it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stack.json"
        mine = replace(options, stack=name, json=str(path), seconds=0.0, cold_start=False)
        done = subprocess.run(_command(mine), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        found = json.loads(path.read_text()) if path.exists() else {"tables": {}, "notes": []}
    if done.returncode or not found["tables"]:
        report.note(f"{name}: no result; {done.stderr.strip()[-300:]}")
    for note in found["notes"]:
        report.note(note)
    for title, rows in found["tables"].items():
        if title != TITLE:
            report.add(title, rows)
    for row in found["tables"].get(TITLE, []):
        report.keep(TITLE, row)


def _command(options: Options) -> list[str]:
    """The command line that asks for ``options``."""
    words = [sys.executable, "-m", "deepseek", "bench", "train"]
    for field, default in ((f.name, f.default) for f in fields(options)):
        value, flag = getattr(options, field), "--" + field.replace("_", "-")
        if value != default:
            words += [flag] if value is True else [flag, str(value)]
    return words


def _ceilings(report: Report, device: torch.device, size: int) -> float:
    sheet = datasheet_tflops(report.environment["device"])
    if sheet is not None:
        report.ceiling("data sheet, dense bf16, TFLOP/s", sheet)
    dtype = "fp32" if device.type == "cpu" else "bf16"
    return report.ceiling(f"{dtype} matmul {size}^3, TFLOP/s", matmul_tflops(device, size))


def _told(options: Options, config: ModelConfig) -> str:
    found, flops = count.parameters(config), count.flops(config, options.length).per_token
    return (
        f"{options.model}: {found.total:,} parameters, {found.active:,} active, {flops / 1e9:.3f} GFLOP/token at "
        f"{options.length:,}; {options.batch_tokens:,} tokens a step"
    )


Maker = Callable[[int], Step]  #: micro-batch rows -> a stack ready to step


def stacks(options: Options, config: ModelConfig) -> dict[str, Maker]:
    """What is to be measured, by name, in order."""
    device, compiled = options.torch_device, not options.eager and options.torch_device.type != "cpu"
    found: dict[str, Maker] = {"deepseek": partial(Ours, options, config)}
    replayed = options.cuda_graph and device.type == "cuda"
    if replayed:
        found["deepseek, CUDA graph"] = partial(Ours, options, config, graph=True)
    if config.moe.experts and not options.real_only:
        found["deepseek, forced balance"] = partial(
            Ours, options, config, forced_balance=True, graph=replayed
        )

    def peer(name: str, compile: bool, micro_rows: int) -> Step:
        return PEERS[name](Setup(full_attention(config), device, micro_rows, compile))

    for name in _peers(options.peer, bool(config.moe.experts)):
        for how in _compile_choices(name, options, bool(config.moe.experts)) if compiled else [False]:
            found[f"{name}, {'compiled' if how else 'eager'}"] = partial(peer, name, how)
    return found


def _peers(asked: str, sparse: bool) -> list[str]:
    """The peers to measure, in order. Raises ``ConfigError`` for a name that is none of them."""
    if asked == "all":
        return [name for name in PEERS if not (sparse and name == "liger")]
    names = [] if asked == "none" else asked.split(",")
    for name in names:
        if name not in PEERS:
            raise ConfigError(
                f"no peer {name!r}{did_you_mean(name, PEERS)}; all, none, or some of {', '.join(PEERS)}"
            )
    return names


def _compile_choices(name: str, options: Options, sparse: bool) -> list[bool]:
    """Plain torch is compiled, Liger's kernels replace compiling, transformers is better sometimes so, sometimes so."""
    if name != "transformers":
        return [name == "plain-torch"]
    auto = [False] if sparse else [False, True]
    return {"auto": auto, "yes": [True], "no": [False], "both": [False, True]}[options.peer_compile]


class Ours:
    """Our stack as a ``Step``: the path of ``deepseek pretrain`` without its data and its events."""

    def __init__(
        self,
        options: Options,
        config: ModelConfig,
        micro_rows: int,
        forced_balance: bool = False,
        graph: bool = False,
    ) -> None:
        device = options.torch_device
        torch.manual_seed(options.seed)
        policy = choose(options.precision, device, training=True)
        self.model, masters = made(config, device, policy)
        if forced_balance:
            force_balance(self.model)
        if not options.eager and device.type != "cpu":
            compile_blocks(self.model.blocks)
        optimizer = build_optimizer(self.model, OptimConfig(name=options.optimizer, lr=1e-4), masters)
        self.step = TrainStep(self.model, next_token_loss, optimizer, policy, micro_rows=micro_rows)
        if graph:
            self.step = GraphedStep(self.step)
        self.violation: Tensor | None = None

    def __call__(self, batch: Batch) -> Tensor:
        result = self.step(batch)
        self.violation = result.max_violation if result.load else None
        return result.loss

    @property
    def facts(self) -> dict[str, Any]:
        """What else the last step had to tell."""
        return {"MaxVio": None if self.violation is None else float(self.violation)}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds."""
        optimizer = self.step.optimizer
        return {
            "model": optimizer.master_state(self.model.state_dict()), "optimizer": optimizer.state_dict(),
        }  # fmt: skip


def made(
    config: ModelConfig, device: torch.device, policy: Policy
) -> tuple[Transformer, dict[nn.Parameter, Tensor]]:
    """A fresh model made on the device, stored as ``policy`` says, and its fp32 masters."""
    with torch.device(device):
        model = Transformer(config)
    return model, lower(model, policy)


def force_balance(model: Transformer) -> None:
    """Experts in turn instead of the router's choice. Raises ``ConfigError`` when the layers cannot do that."""
    for moe in model.moe_layers().values():
        if not hasattr(moe.router, "force_balance"):
            raise ConfigError("this version's router has no force_balance: forced balance is not measured")
        moe.router.force_balance = True


def _measure(name: str, make: Maker, options: Options, report: Report, ceiling: float) -> None:
    """One stack, with micro-batches halved until it fits."""
    device, rows = options.torch_device, options.batch_tokens // options.length
    micro = min(options.micro_rows, rows)
    free(device)
    while True:
        outcome = attempt(partial(_one, name, make, micro, options, report, ceiling), device)
        if not outcome.out_of_memory or micro == 1:
            break
        report.note(f"{name}: {micro} rows of {options.length:,} do not fit")
        micro //= 2
    if outcome.problem:
        report.note(f"{name}: {outcome.problem}")
    free(device)


def _one(name: str, make: Maker, micro: int, options: Options, report: Report, ceiling: float) -> None:
    """Build, warm up, time, and look inside if asked."""
    device, config = options.torch_device, options.config
    step, batches = make(micro), random_batches(options, config)
    synchronize(device)
    began = time.perf_counter()
    first = float(step(batches[0]))
    first_seconds = time.perf_counter() - began
    reset_peak(device)
    losses, timers = [], []
    for number in range(options.warmup + options.steps):
        timers.append(timer := Timer(device))
        timer.start()
        losses.append(step(batches[(number + 1) % len(batches)]))
        timer.stop()
    synchronize(device)
    seconds = sorted(t.seconds for t in timers[options.warmup :])
    median = seconds[len(seconds) // 2]
    ours = name.startswith("deepseek")
    flops = count.flops(config if ours else full_attention(config), options.length).per_token
    speed, peer_format = options.batch_tokens / median, str(compute_dtype(device)).removeprefix("torch.")
    achieved, sheet = speed * flops / 1e12, datasheet_tflops(report.environment["device"])
    row = {
        "stack": name, "weights": "fp32 masters" if ours else peer_format,
        "tok/s": speed, "MFU %": 100 * achieved / sheet if sheet else None, "peak TFLOP/s": sheet,
        "of matmul %": 100 * achieved / ceiling, "TFLOP/s": achieved, "step ms": median * 1e3,
        "worst step ms": seconds[-1] * 1e3, "first step s": first_seconds, "peak GiB": peak_gib(device),
        "rows": micro, "loss first": first, "loss last": float(losses[-1]), "idle %": None,
        **getattr(step, "facts", {}),
    }  # fmt: skip
    if not math.isfinite(row["loss last"]):
        report.note(f"{name}: the loss is {row['loss last']}")
    seen = kernels.profile(lambda: step(batches[0]), device) if options.profile else None
    if seen is not None and seen.idle_share is not None:
        row["idle %"] = 100 * seen.idle_share
    report.keep(TITLE, row)
    if seen is not None:
        report.add(f"{name}: time of a step by kind of kernel", seen.by_kind())
        report.add(f"{name}: kernels", seen.top())
    if options.checkpoint and isinstance(step, Ours) and name == "deepseek":
        report.add("checkpoints", snapshot(step, batches, device, median))


def random_batches(options: Options, config: ModelConfig) -> list[Batch]:
    """Uniform random tokens, one document a row, in (page-locked) host memory as a loader would have them."""
    random = torch.Generator().manual_seed(options.seed)
    shape = (options.batch_tokens // options.length, options.length + 1)
    number = min(DISTINCT, 1 + options.warmup + options.steps)
    found = [
        Batch.from_rows(torch.randint(0, config.vocab_size, shape, generator=random)) for _ in range(number)
    ]
    if options.torch_device.type == "cuda":
        found = [replace(b, tokens=b.tokens.pin_memory(), targets=b.targets.pin_memory()) for b in found]
    return found


def snapshot(step: Ours, batches: list[Batch], device: torch.device, usual: float) -> list[dict[str, Any]]:
    """Two saves, as a run makes them: how long training stands still, and what writing costs the steps meanwhile."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, Checkpointer(
        Path(folder), CheckpointConfig(keep_last=1, keep_best=False)
    ) as keeper:  # fmt: skip
        for number, which in enumerate(("first save", "later save"), 1):
            synchronize(device)
            began = time.perf_counter()
            tensors = step.tensors()
            keeper.save(number, tensors=tensors, state={})
            stall = time.perf_counter() - began
            size = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
            del tensors
            meanwhile = _steps_seconds(step, batches, device)
            keeper.wait()
            rows.append({
                "checkpoint": which, "GB": size / 1e9, "stall s": stall, "stall, steps": stall / usual,
                "on disk after s": time.perf_counter() - began, "step while writing, % longer":
                100 * (meanwhile / usual - 1),
            })  # fmt: skip
    return rows


def _steps_seconds(step: Step, batches: list[Batch], device: torch.device, number: int = 3) -> float:
    timer = Timer(device)
    timer.start()
    for i in range(number):
        step(batches[i % len(batches)])
    timer.stop()
    synchronize(device)
    return timer.seconds / number


def _cold_start(options: Options, report: Report) -> None:
    """The first step of two fresh processes that share a compile cache, which is empty for the first."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        for which in ("empty cache", "kept cache"):
            path = Path(folder) / "cold.json"
            path.unlink(missing_ok=True)
            command = _command(
                replace(
                    options,
                    peer="none",
                    real_only=True,
                    steps=1,
                    warmup=0,
                    cold_start=False,
                    stack="",
                    json=str(path),
                    profile=False,
                    checkpoint=False,
                    cuda_graph=False,
                    seconds=0.0,
                )
            )
            began = time.perf_counter()
            done = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True)
            took = time.perf_counter() - began
            rows = json.loads(path.read_text())["tables"].get(TITLE, []) if path.exists() else []
            if not rows:
                report.note(f"cold start, {which}: no result; {done.stderr.strip()[-300:]}")
                continue
            report.keep(
                "start of a process",
                {"compile cache": which, "first step s": rows[0]["first step s"], "whole process s": took},
            )
    report.show("start of a process")
