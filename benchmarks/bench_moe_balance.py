"""Which of the four mechanisms keeps 64 experts alive? One sparse layer, Zipf-distributed clusters of tokens.

A token is its cluster's centre plus noise; its target is its cluster's own linear map of it, so that experts
have something to specialise in, and frequent clusters pull many tokens to few experts. Every variant sees the
same data.

How load is measured: parameters frozen, 65,536 fresh tokens, top-k choices only (no floor), at five states 20
steps apart at the end of training; the table shows the means. ``dead`` experts have less than a tenth of
their share.

``--rules`` compares the three steps of the selection bias, everything else at its default, and counts the steps until
MaxVio stays below 0.5 from the skewed start. ``--drift`` trains, then takes 30% of the tokens from eight new clusters,
and counts the steps until MaxVio is below 0.5 again, with the drift response and without; learning rate constant.

    python benchmarks/bench_moe_balance.py [--steps 1500] [--seeds 1] [--rules | --drift] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.nn.balance import DRIFT_STEPS
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
RULES: dict[str, dict[str, Any]] = {
    "sign": SIGN,
    "proportional": {"bias_step": "proportional"},
    "dual": {"bias_step": "dual"},
}
GOAL = 0.5  #: of MaxVio, for ``--rules`` and ``--drift``
EVERY = (
    5  #: steps between two measurements of it from the skewed start; after a shift, every step is measured
)
NEW = 8  #: clusters that a shift brings


class Toy:
    """Clustered tokens and what the layer should answer."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.centres = torch.randn(CLUSTERS, HIDDEN, generator=self.random)
        self.maps = torch.randn(CLUSTERS, HIDDEN, HIDDEN, generator=self.random) / HIDDEN**0.5
        self.weights = 1 / torch.arange(1, CLUSTERS + 1)

    def shift(self, share: float) -> None:
        """From now on this share of the tokens comes from ``NEW`` new clusters, equally frequent."""
        self.centres = torch.cat((self.centres, torch.randn(NEW, HIDDEN, generator=self.random)))
        maps = torch.randn(NEW, HIDDEN, HIDDEN, generator=self.random) / HIDDEN**0.5
        self.maps = torch.cat((self.maps, maps))
        old = self.weights / self.weights.sum() * (1 - share)
        self.weights = torch.cat((old, torch.full((NEW,), share / NEW)))

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
    balanced: (
        float  #: the step from which MaxVio stayed below ``GOAL`` for three measurements; NaN if not followed
    )
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


def train_step(moe: MoE, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One step; the smallest gradient norm of an expert."""
    out, stats = moe(x[None])
    (F.mse_loss(out[0], y) + stats.balance_loss).backward()
    assert moe.gate_up.grad is not None
    assert moe.down.grad is not None
    norms = moe.gate_up.grad.flatten(1).norm(dim=1) + moe.down.grad.flatten(1).norm(dim=1)
    optimizer.step()
    optimizer.zero_grad()
    moe.update(stats)
    return float(norms.min())


def first_below(followed: list[float], every: int) -> float:
    """The step of the first of three measurements in a row below ``GOAL``; infinite if there are none."""
    for i in range(len(followed) - 2):
        if max(followed[i : i + 3]) < GOAL:
            return (i + 1) * every
    return float("inf")


def run(steps: int, seed: int = 0, follow: int = 0, **changes: Any) -> Result:
    """Train one variant and measure it; ``follow``: for how many steps MaxVio is measured from the start."""
    toy, moe = Toy(seed), make_layer(seed, **changes)
    fresh = toy.batch(65_536)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=3e-4)
    least, started, measured = float("inf"), time.perf_counter(), list[tuple[float, float, int, float]]()
    followed = list[float]()
    for step in range(steps):
        least = min(least, train_step(moe, optimizer, *toy.batch(TOKENS)))
        schedule.step()
        if step < follow and step % EVERY == EVERY - 1:
            followed.append(measure(moe, *fresh)[1])
        if steps - step <= 100 and (steps - step) % 20 == 1:
            measured.append(measure(moe, *fresh))
    mean = [sum(column) / len(measured) for column in zip(*measured)]
    balanced = first_below(followed, EVERY) if followed else float("nan")
    return Result(mean[0], mean[1], round(mean[2]), mean[3], least, balanced, time.perf_counter() - started)


@dataclass(frozen=True)
class Drift:
    worst: float  #: largest MaxVio after the shift
    steps: float  #: until MaxVio was below ``GOAL`` for three measurements
    delay: float  #: steps from the shift to the alarm; infinite without one
    false_alarms: int  #: before the shift
    mse: float  #: at the end, on the new distribution


def run_drift(steps: int, seed: int = 0, after: int = 200, share: float = 0.3, **changes: Any) -> Drift:
    """Train on one distribution, then for ``after`` steps on a partly new one, following MaxVio."""
    toy, moe = Toy(seed), make_layer(seed, **changes)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-3, weight_decay=0.0)
    alarms, followed, fresh = list[int](), list[float](), toy.batch(1)
    for step in range(steps + after):
        if step == steps:
            toy.shift(share)
            fresh = toy.batch(32_768)
        train_step(moe, optimizer, *toy.batch(TOKENS))
        left = 0.0 if moe.drift is None else float(moe.drift.watch[-1])
        alarms += [step] if left == DRIFT_STEPS else []
        if step >= steps:
            followed.append(measure(moe, *fresh)[1])
    delay = min((step - steps + 1 for step in alarms if step >= steps), default=float("inf"))
    false = sum(step < steps for step in alarms)
    return Drift(max(followed), first_below(followed, 1), delay, false, measure(moe, *fresh)[3])


#: Columns of a table: title → field and format. '/': every seed's value, otherwise their mean.
COLUMNS = {
    "coverage": ("coverage", ".3f"),
    "MaxVio": ("max_violation", ".2f"),
    "dead": ("dead", ".1f"),
    "MSE": ("mse", ".4f"),
    "least expert gradient": ("least_gradient", "/.1e"),
    "s": ("seconds", ".0f"),
}
FOLLOWED = {f"steps to MaxVio < {GOAL}": ("balanced", "/.0f"), **COLUMNS}
AFTER_DRIFT = {
    "worst MaxVio": ("worst", ".2f"),
    f"steps to MaxVio < {GOAL}": ("steps", "/.0f"),
    "steps to the alarm": ("delay", "/.0f"),
    "false alarms": ("false_alarms", "/.0f"),
    "MSE": ("mse", ".4f"),
}


def print_table(
    variants: dict[str, dict[str, Any]], columns: dict[str, tuple[str, str]], run_one: Any, seeds: int
) -> None:
    """One line a variant: ``run_one(seed, **changes)`` for every seed."""
    print("| variant | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, changes in variants.items():
        results = [run_one(seed=seed, **changes) for seed in range(seeds)]
        cells = []
        for field, form in columns.values():
            values = [float(getattr(r, field)) for r in results]
            mean = sum(values) / len(values)
            every = " / ".join(f"{v:{form[1:]}}" for v in values)
            cells.append(every if form[0] == "/" else f"{mean:{form}}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Balance of a sparse layer, by mechanism.")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its own choice")
    parser.add_argument("--rules", action="store_true", help="compare the steps of the selection bias")
    parser.add_argument("--drift", action="store_true", help="recovery from a shift of 30%% of the tokens")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.drift:
        variants = {
            f"{rule}{name}": {**changes, "drift_response": response}
            for rule, changes in RULES.items()
            for name, response in (("", False), (" + drift response", True))
        }
        print_table(variants, AFTER_DRIFT, partial(run_drift, arguments.steps), arguments.seeds)
    elif arguments.rules:
        print_table(RULES, FOLLOWED, partial(run, arguments.steps, follow=500), arguments.seeds)
    else:
        print_table(VARIANTS, COLUMNS, partial(run, arguments.steps), arguments.seeds)


if __name__ == "__main__":
    main()
