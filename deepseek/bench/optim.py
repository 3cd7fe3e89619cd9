"""``deepseek bench optim``: what an optimizer costs a step, and how many steps it needs.

**Cost** on the parameter shapes of a preset, with random gradients: milliseconds, bytes of state, and the share of
the copy bandwidth, judged by the least traffic possible: state and masters read and written, weights written (and read
where there is no master), gradients read. torch's AdamW steps fp32 weights; ours, on a GPU, bf16 weights with masters.

**Steps to target** (``--steps-to-target``): a small model on real text, constant learning rate after warm-up. Every
optimizer gets the same number of learning rates to choose from. The target is the held-out loss at which the best
fixed-beta AdamW ends; reported is where each optimizer's best run first goes below it. One seed is one seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from deepseek.batch import Batch
from deepseek.bench.ceilings import copy_tb_per_s
from deepseek.bench.report import BenchOptions, Report
from deepseek.bench.timing import attempt, free, measure, peak_gib, reset_peak
from deepseek.bench.tokens import joined, load_tokens
from deepseek.bench.train import made, named_config
from deepseek.data import DataConfig, prepare
from deepseek.errors import ConfigError, did_you_mean
from deepseek.models import ModelConfig, Transformer
from deepseek.nn.attention import AttentionConfig
from deepseek.precision import Policy, choose, lower
from deepseek.train import OptimConfig, Schedule, ScheduleConfig, TrainStep, build_optimizer, next_token_loss
from deepseek.train.losses import cross_entropy_sum

BASELINE = "adamw"
Masters = dict[nn.Parameter, Tensor]


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """What optimizers cost, and how many steps they need."""

    models: tuple[str, ...] = ("dense_856m", "moe_64x2")  # presets whose parameter shapes are stepped
    steps_to_target: bool = False  # train a small model with each
    steps: int = 600  # of each run
    batch_tokens: int = 16_384
    length: int = 512
    lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)  # each optimizer tries all
    only: tuple[str, ...] = ()  # optimizers by name; all unless told
    corpus: str = ""  # a directory of `bench.tokens`; the standard library unless told
    seconds: float = 0.0  # start no run after so long; 0: no limit


def contestants() -> dict[str, dict[str, Any]]:
    """Changes to ``OptimConfig`` by name: every optimizer it knows, and AdamW with moving betas."""
    names = get_args(get_type_hints(OptimConfig)["name"])
    found: dict[str, dict[str, Any]] = {name: {"name": name} for name in names}
    return found | {f"{BASELINE}, dynamic betas": {"name": BASELINE, "betas_schedule": "dynamic"}}


def chosen(only: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The contestants asked for. Raises ``ConfigError`` for unknown names."""
    known = contestants()
    for name in only:
        if name not in known:
            raise ConfigError(
                f"no optimizer {name!r}{did_you_mean(name, known)}; there are: {', '.join(known)}"
            )
    return {name: change for name, change in known.items() if not only or name in only}


def run(options: Options) -> Report:
    """Cost on every model's shapes, then steps to target if asked."""
    device = options.torch_device
    torch.manual_seed(options.seed)
    names = chosen(options.only)
    report = Report("optim", device, options, options.json)
    ceiling = report.ceiling("copy, TB/s", copy_tb_per_s(device, 2**20 if options.quick else 2**30))
    free(device)
    for model in options.models:
        _costs(report, model, names, options, ceiling)
        free(device)
    if options.steps_to_target:
        _race_to_target(report, names, options)
    return report.close()


def _costs(
    report: Report, preset: str, names: dict[str, dict[str, Any]], options: Options, ceiling: float
) -> None:
    device, rounds = options.torch_device, 2 if options.quick else 5
    policy = choose("fp32" if device.type == "cpu" else "bf16", device, training=True)
    title = f"optimizer step, {preset}"

    def one(name: str, make: Callable[[nn.Module, Masters], Any], policy: Policy | None) -> None:
        free(device)
        config = named_config(preset, 1, options.quick)
        outcome = attempt(
            lambda: _cost(make, *with_gradients(config, device, policy), device, rounds), device
        )
        if outcome.value is None:
            report.note(f"{name} on {preset}: {outcome.problem}")
            return
        row = {"model": preset, "optimizer": name, **outcome.value}
        row["of copy bandwidth %"] = 100 * row["least traffic GB"] / row["ms"] / ceiling
        report.keep(title, row)

    one("torch AdamW, fused, fp32", lambda m, _: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True), None)
    for name, change in names.items():
        config = OptimConfig(**{**change, "lr": 1e-4})
        one(name, lambda m, masters, config=config: build_optimizer(m, config, masters), policy)  # type: ignore[misc]
    report.show(title)


def with_gradients(
    config: ModelConfig, device: torch.device, policy: Policy | None
) -> tuple[nn.Module, Masters]:
    """Random parameters, stored as ``policy`` says (``None``: fp32), with random gradients; and their masters."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to_empty(device=device)
    for p in model.parameters():
        p.data.normal_(std=0.02)
    masters = lower(model, policy) if policy is not None else {}
    for p in model.parameters():
        p.grad = torch.randn_like(p).mul_(1e-3)
    return model, masters


def _cost(
    make: Callable[[nn.Module, Masters], Any],
    model: nn.Module,
    masters: Masters,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    optimizer = make(model, masters)
    optimizer.step()
    reset_peak(device)
    timing = measure(optimizer.step, device, rounds=rounds, warmup=2)
    weights = list(model.parameters())
    gradients = [p.grad for p in weights if p.grad is not None]
    state = state_bytes(optimizer) + _bytes(masters.values())
    read = _bytes(gradients) + _bytes(p for p in weights if p not in masters) + state
    written = _bytes(weights) + state
    return {
        "weights": str(max(weights, key=torch.numel).dtype).removeprefix("torch."), "ms": timing.ms,
        "state GB": state / 1e9, "bytes a weight": state / sum(p.numel() for p in weights),
        "least traffic GB": (read + written) / 1e9, "peak GiB": peak_gib(device),
    }  # fmt: skip


def state_bytes(optimizer: Any) -> int:
    """Bytes of what an optimizer remembers, masters aside."""
    parts: list[torch.optim.Optimizer] = getattr(optimizer, "parts", [optimizer])
    return sum(
        _bytes(v for v in values.values() if isinstance(v, Tensor))
        for part in parts
        for values in part.state.values()
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Text:
    """Token ids ``train [N]`` and held-out rows ``[R, T + 1]`` on the device, and the vocabulary's size."""

    train: Tensor
    held_out: Tensor
    vocab: int


def text(options: Options) -> Text:
    """A corpus of ``bench.tokens``, the standard library, or (quick) a noisy cycle that a tiny model can learn."""
    if options.quick:
        vocab = 64
        steps = np.random.default_rng(options.seed).choice([1, 2], 20_000, p=[0.9, 0.1])
        train = steps.cumsum() % vocab
        held = train[-2_000:]
    elif options.corpus:
        tokens = load_tokens(options.corpus)
        vocab, train, held = tokens.vocab_size, tokens.train, tokens.held_out
    else:
        corpus = prepare(DataConfig(), Path("runs/.corpora"))
        assert corpus.held_out is not None
        vocab, train, held = (
            corpus.tokenizer.vocab_size,
            joined(corpus.train, 1.0),
            joined(corpus.held_out, 1.0),
        )
    T = _length(options)
    ids, device = torch.from_numpy(held.astype(np.int64)), options.torch_device
    rows = ids[: (len(ids) - 1) // T * T + 1].unfold(0, T + 1, T)[:64]
    return Text(torch.from_numpy(train.astype(np.int64)).to(device), rows.to(device), vocab)


def _length(options: Options) -> int:
    return 32 if options.quick else options.length


def small_model(vocab: int, quick: bool) -> ModelConfig:
    """A dense model of 4 layers; 8M parameters with a vocabulary of 4,096."""
    hidden, heads = (32, 2) if quick else (320, 5)
    return ModelConfig(
        vocab_size=vocab, hidden=hidden, layers=2 if quick else 6, ffn=4 * hidden, pattern="F", tie_embeddings=False,
        attention=AttentionConfig(heads=heads, kv_heads=1, head_dim=hidden // heads, qk_norm=True),
    )  # fmt: skip


def _race_to_target(report: Report, names: dict[str, dict[str, Any]], options: Options) -> None:
    data, began = text(options), time.perf_counter()
    curves: dict[str, dict[float, list[tuple[int, float]]]] = {}
    for name, change in names.items():
        for lr in options.lrs[:1] if options.quick else options.lrs:
            if 0 < options.seconds < time.perf_counter() - began:
                report.note(f"{name}, lr {lr}: not started, {options.seconds:.0f} s are over")
                continue
            outcome = attempt(
                partial(train, data, OptimConfig(**{**change, "lr": lr}), options), options.torch_device
            )
            if outcome.value is None:
                report.note(f"{name}, lr {lr}: {outcome.problem}")
                continue
            curves.setdefault(name, {})[lr] = outcome.value
            report.keep(
                "runs", {"optimizer": name, "lr": lr, "held-out loss at the end": outcome.value[-1][1]}
            )
    report.show("runs")
    if BASELINE not in curves:
        report.note(f"no target: no run of {BASELINE} finished")
        return
    _, base = best(curves[BASELINE])
    report.add(f"steps to the loss at which fixed-beta AdamW ends ({base[-1][1]:.4f})", [
        _reached(name, *best(runs), base=base) for name, runs in curves.items()
    ])  # fmt: skip
    report.add("held-out loss of each optimizer's best run", [
        {"step": step, **{name: dict(best(runs)[1]).get(step) for name, runs in curves.items()}} for step, _ in base
    ])  # fmt: skip


def best(runs: dict[float, list[tuple[int, float]]]) -> tuple[float, list[tuple[int, float]]]:
    """The learning rate whose run ends lowest, and its curve of (step, held-out loss)."""
    return min(runs.items(), key=lambda item: item[1][-1][1] if math.isfinite(item[1][-1][1]) else math.inf)


def _reached(
    name: str, lr: float, curve: list[tuple[int, float]], base: list[tuple[int, float]]
) -> dict[str, Any]:
    target, end = base[-1][1], base[-1][0]
    step = steps_to(curve, target)
    return {
        "optimizer": name, "best lr": lr, "steps": step, "speed-up": end / step if step else None,
        "loss at the end": curve[-1][1],
    }  # fmt: skip


def steps_to(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """Where a curve of (step, loss) first goes down to ``target``, interpolated; ``None`` if it never does."""
    before = curve[0]
    for step, loss in curve:
        if loss <= target:
            share = (before[1] - target) / (before[1] - loss) if before[1] > loss else 1.0
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None


def train(data: Text, optim: OptimConfig, options: Options) -> list[tuple[int, float]]:
    """One run; held-out loss every thirtieth of it."""
    device, T, quick = options.torch_device, _length(options), options.quick
    steps, rows = (12, 4) if quick else (options.steps, max(1, options.batch_tokens // options.length))
    torch.manual_seed(options.seed)
    policy = choose("fp32" if device.type == "cpu" else "bf16", device, training=True)
    model, masters = made(small_model(data.vocab, quick), device, policy)
    step = TrainStep(model, next_token_loss, build_optimizer(model, optim, masters), policy)
    schedule = Schedule(ScheduleConfig(kind="constant", warmup=0.05), steps)
    random, offsets = torch.Generator().manual_seed(options.seed + 1), torch.arange(T + 1, device=device)
    every, curve = max(1, steps // 30), list[tuple[int, float]]()
    for number in range(steps):
        schedule.apply(step.optimizer, number)
        starts = torch.randint(0, len(data.train) - T - 1, (rows,), generator=random).to(device)
        step(Batch.from_rows(data.train[starts[:, None] + offsets]))
        if (number + 1) % every == 0 or number + 1 == steps:
            curve.append((number + 1, held_out_loss(model, data.held_out, policy)))
    return curve


@torch.no_grad()
def held_out_loss(model: Transformer, rows: Tensor, policy: Policy) -> float:
    """Mean cross-entropy in nats of the rows ``[R, T + 1]``."""
    model.eval()
    total = 0.0
    for part in rows.split(16):
        with policy.compute(part.device):
            hidden = model(part[:, :-1]).hidden.flatten(0, 1)
            total += float(cross_entropy_sum(hidden, model.head_weight, part[:, 1:].flatten()))
    model.train()
    return total / rows[:, 1:].numel()
