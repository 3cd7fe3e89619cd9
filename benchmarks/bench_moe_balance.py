"""Which of the four mechanisms keeps 64 experts alive? One sparse layer, Zipf-distributed clusters of tokens.

A token is its cluster's centre plus noise; its target is its cluster's own linear map of it, so that experts
have something to specialise in, and frequent clusters pull many tokens to few experts. Every variant sees the
same data.

How load is measured: parameters frozen, 65,536 fresh tokens, top-k choices only (no floor), at five states 20
steps apart at the end of training; the table shows the means. ``dead`` experts have less than a tenth of
their share.

    python benchmarks/bench_moe_balance.py [--steps 1500] [--seeds 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.nn.moe import MoE, MoEConfig, coverage, max_violation

HIDDEN, EXPERTS, CLUSTERS, TOKENS = 32, 64, 256, 2048

OFF = {"entropy_weight": 0.0, "bias_rate": 0.0, "default_decay": 0.0, "token_floor": 0.0}
SIGN = {"bias_rate": 1e-3, "bias_step": "sign"}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": OFF,
    "entropy": {**OFF, "entropy_weight": 0.01},
    "bias by sign": {**OFF, **SIGN},
    "bias": {**OFF, "bias_rate": 2e-3},
    "entropy + bias by sign": {**OFF, "entropy_weight": 0.01, **SIGN},
    "entropy + bias": {"token_floor": 0.0, "default_decay": 0.0},
    "entropy + bias by sign + default": {"token_floor": 0.0, **SIGN},
    "entropy + bias + default": {"token_floor": 0.0},
    "entropy + bias + default + floor (defaults)": {},
}


class Toy:
    """Clustered tokens and what the layer should answer."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.centres = torch.randn(CLUSTERS, HIDDEN, generator=self.random)
        self.maps = torch.randn(CLUSTERS, HIDDEN, HIDDEN, generator=self.random) / HIDDEN**0.5
        self.weights = 1 / torch.arange(1, CLUSTERS + 1)

    def batch(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets ``[tokens, HIDDEN]``."""
        cluster = torch.multinomial(self.weights, tokens, replacement=True, generator=self.random)
        x = self.centres[cluster] + 0.5 * torch.randn(tokens, HIDDEN, generator=self.random)
        return x, torch.cat(
            [torch.bmm(self.maps.index_select(0, c), v[..., None])[..., 0] for c, v in _pieces(cluster, x)]
        )


def _pieces(cluster: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(cluster.split(4096), x.split(4096))


@dataclass(frozen=True)
class Result:
    coverage: float
    max_violation: float
    dead: int
    mse: float
    least_gradient: float  #: the smallest gradient norm any expert had in any step
    seconds: float


def make_layer(seed: int, **changes: Any) -> MoE:
    """A freshly initialised layer."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"experts": EXPERTS, "top_k": 2, "expert_ffn": HIDDEN, **changes}
    moe = MoE(HIDDEN, MoEConfig(**shape))
    for weight in (moe.router.weight, moe.gate_up, moe.down):
        torch.nn.init.normal_(weight, std=weight.shape[-2 if weight.dim() == 3 else -1] ** -0.5)
    return moe


@torch.no_grad()
def measure(moe: MoE, x: Tensor, y: Tensor) -> tuple[float, float, int, float]:
    """Coverage, MaxVio, dead experts and MSE of ``moe`` on fresh tokens."""
    moe.eval()
    out, stats = moe(x[None])
    moe.train()
    load = stats.chosen_E / stats.chosen_E.sum()
    dead = int((load < 0.1 / EXPERTS).sum())
    return float(coverage(load)), float(max_violation(load)), dead, float(F.mse_loss(out[0], y))


def run(steps: int, seed: int = 0, **changes: Any) -> Result:
    """Train one variant and measure it."""
    toy, moe = Toy(seed), make_layer(seed, **changes)
    fresh = toy.batch(65_536)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=3e-4)
    least, started, measured = float("inf"), time.perf_counter(), list[tuple[float, float, int, float]]()
    for step in range(steps):
        x, y = toy.batch(TOKENS)
        out, stats = moe(x[None])
        (F.mse_loss(out[0], y) + stats.balance_loss).backward()
        assert moe.gate_up.grad is not None
        assert moe.down.grad is not None
        norms = moe.gate_up.grad.flatten(1).norm(dim=1) + moe.down.grad.flatten(1).norm(dim=1)
        least = min(least, float(norms.min()))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        moe.update(stats)
        if steps - step <= 100 and (steps - step) % 20 == 1:
            measured.append(measure(moe, *fresh))
    mean = [sum(column) / len(measured) for column in zip(*measured)]
    return Result(mean[0], mean[1], round(mean[2]), mean[3], least, time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description="Balance of a sparse layer, by mechanism.")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    print("| variant | coverage | MaxVio | dead | MSE | least expert gradient | s |")
    print("|---|---|---|---|---|---|---|")
    for name, changes in VARIANTS.items():
        results = [run(arguments.steps, seed, **changes) for seed in range(arguments.seeds)]

        def mean(field: str, results: list[Result] = results) -> float:
            return sum(getattr(r, field) for r in results) / len(results)

        print(
            f"| {name} | {mean('coverage'):.3f} | {mean('max_violation'):.2f} | {mean('dead'):.1f} "
            f"| {mean('mse'):.4f} | {min(r.least_gradient for r in results):.1e} | {mean('seconds'):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
