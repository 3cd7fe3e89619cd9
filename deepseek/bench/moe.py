"""``deepseek bench moe``: one expert layer, forward and backward, under kind and unkind routing.

Ours (router statistics, load balancing, token floor and all) beside plain torch with grouped matmuls and beside a
loop over experts. Routing is steered through the router itself: the first E inputs of a token are its logits.
FLOPs are those of the chosen experts; the ceiling is the same grouped matmuls alone, measured in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.bench import kernels
from deepseek.bench.ceilings import ceiling_size, compute_dtype, grouped_tflops, matmul_tflops
from deepseek.bench.peers import LoopMoE, PlainMoE
from deepseek.bench.report import BenchOptions, Report
from deepseek.bench.timing import (
    Call,
    attempt,
    free,
    measure,
    peak_gib,
    race,
    random_like,
    reset_peak,
    synchronize,
)
from deepseek.bench.train import named_config
from deepseek.errors import ConfigError
from deepseek.models import ModelConfig
from deepseek.nn.moe import MoE, coverage, max_violation


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """One expert layer, forward and backward."""

    model: str = "moe_64x2"  # the preset whose layer is taken
    tokens: int = 65_536
    routing: tuple[str, ...] = ("uniform", "zipf", "one takes all", "half empty")
    rounds: int = 10
    eager: bool = False  # nothing compiled
    loop: bool = False  # also the loop over experts with every routing, not only the first

    @property
    def config(self) -> ModelConfig:
        """The shape. Raises ``ConfigError`` when it has no experts."""
        config = named_config(self.model, 1, self.quick)
        if not config.moe.experts:
            raise ConfigError(f"{self.model} has no experts; try moe_64x2")
        return config


def logits(kind: str, tokens: int, experts: int) -> Tensor:
    """Steering logits ``[tokens, experts]`` whose top-k is a sample of ``kind`` without replacement (Gumbel).

    Raises:
        ConfigError: unknown kind.
    """
    weight = torch.ones(experts)
    if kind == "zipf":
        weight = 1 / torch.arange(1, experts + 1)
    elif kind == "one takes all":
        weight[0] = 1e30
    elif kind == "half empty":
        weight[experts // 2 :] = 1e-30
    elif kind != "uniform":
        raise ConfigError(f"routing {kind!r} is not known; uniform, zipf, 'one takes all' or 'half empty'")
    gumbel = -torch.log(-torch.log(torch.rand(tokens, experts).clamp(1e-9, 1 - 1e-7)))
    return (weight.log() + gumbel).clamp(-40, 80)


def inputs(kind: str, tokens: int, config: ModelConfig, device: torch.device) -> Tensor:
    """Tokens ``[1, N, C]``: steering logits, then noise."""
    x = torch.randn(tokens, config.hidden)
    x[:, : config.moe.experts] = logits(kind, tokens, config.moe.experts)
    return x[None].to(device, compute_dtype(device)).requires_grad_()


def steering(config: ModelConfig, device: torch.device) -> Tensor:
    """The router weight ``[E, C]`` that reads a token's first E numbers."""
    return torch.eye(config.moe.experts, config.hidden, device=device)


class OurLayer(nn.Module):
    """Our expert layer with bf16 experts and an fp32 router, as it computes in training."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        with torch.device(device):
            self.moe = MoE(config.hidden, config.moe)
        for weight in (self.moe.gate_up, self.moe.down):
            weight.data = torch.randn_like(weight).mul_(0.02).to(compute_dtype(device))
        self.moe.router.weight.data = steering(config, device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, stats = self.moe(x)
        return y, stats.balance_loss


def peer_layer(kind: type[PlainMoE], config: ModelConfig, device: torch.device) -> nn.Module:
    """Plain torch's layer in the compute dtype."""
    m = config.moe
    with torch.device(device):
        layer = kind(config.hidden, m.expert_ffn, m.experts, m.top_k)
    layer.router.weight.data = steering(config, device)
    return layer.to(compute_dtype(device))


LOOP = "loop over experts, eager"


def layers(options: Options) -> dict[str, Any]:
    """What is measured, by name."""
    config, device = options.config, options.torch_device
    found: dict[str, Any] = {
        "deepseek, eager": OurLayer(config, device), "plain-torch, eager": peer_layer(PlainMoE, config, device),
    }  # fmt: skip
    if not options.eager and device.type == "cuda":
        found["deepseek, compiled"] = torch.compile(OurLayer(config, device), dynamic=False)
        found["plain-torch, compiled"] = torch.compile(peer_layer(PlainMoE, config, device), dynamic=False)
    return found | {LOOP: peer_layer(LoopMoE, config, device)}


def run(options: Options) -> Report:
    """One table for each routing, then where the time goes."""
    device, config = options.torch_device, options.config
    torch.manual_seed(options.seed)
    tokens = 512 if options.quick else options.tokens
    report = Report("moe", device, options, options.json)
    report.ceiling("matmul, TFLOP/s", matmul_tflops(device, ceiling_size(device, options.quick)))
    ceiling = _ceilings(report, config, tokens, device)
    free(device)
    measured = layers(options)
    for number, kind in enumerate(options.routing):
        here = {n: layer for n, layer in measured.items() if n != LOOP or number == 0 or options.loop}
        _routing(report, kind, inputs(kind, tokens, config, device), here, options, ceiling)
    _breakdown(report, measured, inputs(options.routing[0], tokens, config, device), device)
    return report.close()


def _ceilings(report: Report, config: ModelConfig, tokens: int, device: torch.device) -> float:
    """TFLOP/s of the layer's grouped matmuls alone, forward and backward, evenly loaded."""
    m, dtype = config.moe, compute_dtype(device)
    rows = tokens * m.top_k // m.experts * m.experts
    ends = torch.arange(1, m.experts + 1, device=device, dtype=torch.int32) * (rows // m.experts)
    calls: list[Call] = []
    for inner, outer in ((config.hidden, 2 * m.expert_ffn), (m.expert_ffn, config.hidden)):
        report.ceiling(
            f"grouped_mm {m.experts} x {inner}x{outer}, {rows:,} rows, TFLOP/s",
            grouped_tflops(device, rows, m.experts, inner, outer),
        )
        leaves = (
            random_like((rows, inner), device, dtype, grad=True),
            random_like((m.experts, inner, outer), device, dtype, grad=True),
        )
        calls.append(partial(_grouped_both, leaves, ends, random_like((rows, outer), device, dtype)))
    seconds = measure(lambda: [call() for call in calls], device).median
    work = 3 * 2 * rows * 3 * config.hidden * m.expert_ffn
    return report.ceiling("these two, forward+backward, TFLOP/s", work / seconds / 1e12)


def _grouped_both(leaves: tuple[Tensor, Tensor], ends: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(F.grouped_mm(*leaves, offs=ends), leaves, gradient)


def _routing(
    report: Report, kind: str, x: Tensor, measured: dict[str, Any], options: Options, ceiling: float
) -> None:
    """The table of one routing."""
    device, config = options.torch_device, options.config
    calls, memory, gradient = dict[str, Call](), dict[str, float | None](), torch.randn_like(x)
    for name, layer in measured.items():
        reset_peak(device)
        before = peak_gib(device)
        outcome = attempt(partial(_ready, layer, x, gradient, device), device)
        if outcome.value is None:
            report.note(f"{name}, {kind}: {outcome.problem}")
            continue
        calls[name], peak = outcome.value, peak_gib(device)
        memory[name] = peak - before if peak is not None and before is not None else None
    rounds, warmup = (2, 1) if options.quick else (options.rounds, 3)
    taken = race(calls, device, rounds=rounds, warmup=warmup)
    work = 3 * 6 * x.shape[1] * config.moe.top_k * config.hidden * config.moe.expert_ffn
    load, rows = _load(x, config), []
    for name, time in taken.items():
        achieved = work / time.median / 1e12
        rows.append({
            "routing": kind, "layer": name, "forward+backward ms": time.ms, "TFLOP/s": achieved,
            "of grouped_mm %": 100 * achieved / ceiling, "peak GiB": memory[name],
            "MaxVio": float(max_violation(load)), "coverage": float(coverage(load)),
        })  # fmt: skip
    report.add(f"{kind} routing, {x.shape[1]:,} tokens", rows)


def _load(x: Tensor, config: ModelConfig) -> Tensor:
    """Share of the choices that each expert gets."""
    chosen = x[0, :, : config.moe.experts].topk(config.moe.top_k).indices.flatten()
    return torch.bincount(chosen, minlength=config.moe.experts) / chosen.numel()


def both(layer: Any, x: Tensor, gradient: Tensor) -> None:
    """Forward, and backward to the input and every weight; other outputs than the first are losses."""
    out = layer(x)
    outs = out if isinstance(out, tuple) else (out,)
    gradients = (gradient, *(torch.ones_like(o) for o in outs[1:]))
    torch.autograd.grad(outs, [x, *layer.parameters()], gradients)


def _ready(layer: Any, x: Tensor, gradient: Tensor, device: torch.device) -> Call:
    call = partial(both, layer, x, gradient)
    call()
    synchronize(device)
    return call


def _breakdown(report: Report, measured: dict[str, Any], x: Tensor, device: torch.device) -> None:
    """Kernels of ours and of plain torch, compiled where there is a compiled form."""
    how = "compiled" if "deepseek, compiled" in measured else "eager"
    for name in (f"deepseek, {how}", f"plain-torch, {how}"):
        call = partial(both, measured[name], x, torch.randn_like(x))
        outcome = attempt(partial(kernels.profile, call, device), device)
        if outcome.value is None:
            report.note(f"{name}, kernels: {outcome.problem}")
            continue
        report.add(f"{name}: time by kind of kernel", outcome.value.by_kind())
        report.add(f"{name}: kernels", outcome.value.top(20))
