"""Does the inspector find the bad head and the bad expert? Planted in copies of small trained models, many seeds.

    python benchmarks/bench_inspect.py train --work runs/inspect       # the base models, once
    python benchmarks/bench_inspect.py heads --work runs/inspect --trials 100
    python benchmarks/bench_inspect.py experts --work runs/inspect --trials 100
    python benchmarks/bench_inspect.py overhead                        # what the live figures of heads cost

A trial draws a base model, a layer and a head (or expert) from its seed, plants the fault in a copy of the weights, and
asks the inspector as a user would: it is told nothing. Found is: the planted one is among the first three.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepseek.assemble import load
from deepseek.batch import Batch
from deepseek.config import replace
from deepseek.models import ModelConfig, Transformer
from deepseek.monitor.inspect.examine import attentions, examine
from deepseek.monitor.inspect.experts import examine_experts, suspect_experts
from deepseek.monitor.inspect.heads import head_statistics
from deepseek.monitor.inspect.held_out import held_out
from deepseek.monitor.inspect.suspects import Suspect, rank_heads
from deepseek.monitor.inspect.trace import TraceCapture
from deepseek.nn.attention import Attention, AttentionConfig
from deepseek.nn.hybrid import HybridAttention
from deepseek.nn.moe import MoE, MoEConfig
from deepseek.precision import choose
from deepseek.recipes.plan import PretrainConfig
from deepseek.recipes.pretrain import pretrain
from deepseek.train import TrainStep, build_optimizer, next_token_loss

STEPS = 400
BASE = PretrainConfig()


def shapes() -> dict[str, ModelConfig]:
    """Six shapes: dense, sparse; window, full, hybrid layers; one to four heads a key; with and without QK-norm."""
    sparse = MoEConfig(experts=8, top_k=2, expert_ffn=64)

    def shape(
        pattern: str, heads: int, kv: int, layers: int = 4, norm: bool = False, moe: bool = True
    ) -> ModelConfig:
        attention = AttentionConfig(
            heads=heads, kv_heads=kv, head_dim=16, qk_norm=norm, window=32, block=16, stride=16
        )
        return ModelConfig(
            vocab_size=1024, hidden=96, layers=layers, ffn=256, pattern=pattern, max_length=512,
            attention=attention, moe=sparse if moe else MoEConfig(),
        )  # fmt: skip

    return {
        "full": shape("F", 6, 6, moe=False),
        "grouped": shape("LLLF", 8, 2, moe=False),
        "sparse": shape("LLLF", 6, 3),
        "hybrid": shape("LH", 6, 3),
        "deep": shape("LLF", 4, 2, layers=6, moe=False),
        "normed": shape("LLH", 6, 2, layers=3, norm=True),
    }


def train(work: Path, steps: int) -> None:
    """The base models, each trained for ``steps`` steps on the Python standard library's sources."""
    for seed, (name, model) in enumerate(shapes().items()):
        if (work / name / f"step-{steps:06d}").exists():
            continue
        config = replace(
            BASE,
            model=model,
            data=replace(BASE.data, vocab_size=1024, train_bytes=1_000_000, seed=seed),
            optim=replace(BASE.optim, lr=0.012, embedding_lr=0.5),
            train=replace(
                BASE.train, steps=steps, batch_tokens=2048, length=256, seed=seed, precision_mode="fp32"
            ),
        )
        began = time.perf_counter()
        done = pretrain(config, work / name)
        loss = done.evaluation.loss if done.evaluation else float("nan")
        print(
            f"{name}: step {done.step}, held-out loss {loss:.3f}, {time.perf_counter() - began:.0f} s",
            flush=True,
        )


Plant = Callable[[Attention, int, torch.Generator], None]


def own_rows(attention: Attention, head: int) -> slice:
    size = attention.config.head_dim
    return slice(head * size, (head + 1) * size)


@torch.no_grad()
def duplicate(attention: Attention, head: int, random: torch.Generator) -> None:
    """The head becomes a copy of another one: of its query, output (and, where it is another, key and value)."""
    c = attention.config
    others = [
        h for h in range(c.heads) if h != head and (c.heads == c.kv_heads or _group(c, h) == _group(c, head))
    ]
    other = others[int(torch.randint(len(others), (), generator=random))]
    mine, theirs = own_rows(attention, head), own_rows(attention, other)
    linears = (
        [attention.query] if c.heads != c.kv_heads else [attention.query, attention.key, attention.value]
    )
    for linear in linears:
        linear.weight[mine] = linear.weight[theirs].clone()
    attention.output.weight[:, mine] = attention.output.weight[:, theirs].clone()
    if isinstance(attention, HybridAttention):
        attention.gate_bias[head] = attention.gate_bias[other].clone()
        if attention.gate is not None:
            attention.gate.weight[head] = attention.gate.weight[other].clone()


def _group(c: AttentionConfig, head: int) -> int:
    return head // (c.heads // c.kv_heads)


def saturate(factor: float) -> Plant:
    @torch.no_grad()
    def plant(attention: Attention, head: int, random: torch.Generator) -> None:
        attention.query.weight[own_rows(attention, head)] *= factor

    return plant


def noise(strength: float) -> Plant:
    """Gaussian noise of ``strength`` times the root mean square of the head's own weights, on query and output."""

    @torch.no_grad()
    def plant(attention: Attention, head: int, random: torch.Generator) -> None:
        own = own_rows(attention, head)
        for part in (attention.query.weight[own], attention.output.weight[:, own]):
            size = part.square().mean().sqrt() * strength
            part += torch.randn(part.shape, generator=random) * size

    return plant


@torch.no_grad()
def replaced(attention: Attention, head: int, random: torch.Generator) -> None:
    """The head's query and output weights become Gaussian noise of the same size."""
    own = own_rows(attention, head)
    for part in (attention.query.weight[own], attention.output.weight[:, own]):
        part.copy_(torch.randn(part.shape, generator=random) * part.square().mean().sqrt())


PLANTS: dict[str, Plant] = {
    "duplicated": duplicate,
    "saturated x8": saturate(8.0),
    "saturated x32": saturate(32.0),
    "noisy 1": noise(1.0),
    "noisy 2": noise(2.0),
    "noisy 4": noise(4.0),
    "replaced by noise": replaced,
}


@dataclass
class Tally:
    """What became of the trials of one kind of fault."""

    kind: str
    trials: int = 0
    top3: int = 0
    flagged: int = 0
    harm: list[float] = field(default_factory=list)
    missed: list[dict[str, Any]] = field(default_factory=list)

    def add(self, seed: int, where: tuple[str, int, int], ranked: list[Suspect], loss_change: float) -> None:
        """Count a trial: ``where`` is the base, the layer and the head or expert."""
        _, layer, part = where
        places = [i for i, s in enumerate(ranked) if s.layer == layer and part in (s.head, s.expert)]
        place = places[0] if places else len(ranked)
        self.trials += 1
        self.top3 += place < 3
        self.flagged += bool(places) and ranked[place].score >= 1
        self.harm.append(loss_change)
        if place >= 3:
            self.missed.append({"seed": seed, "where": where, "place": place, "loss_change": loss_change})

    def to_dict(self) -> dict[str, Any]:
        return {
            "trials": self.trials, "top3": self.top3, "flagged": self.flagged,
            "median_loss_change": statistics.median(self.harm), "missed": self.missed,
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.kind}: in the first three in {self.top3} of {self.trials}, score >= 1 in {self.flagged}; "
            f"the loss rose by {statistics.median(self.harm):+.4f} (median)"
        )


class Bases:
    """The trained models, and a held-out batch of each."""

    def __init__(self, work: Path, names: Sequence[str]) -> None:
        self.models = {
            name: load(work / name).model for name in names if (work / name / "config.toml").is_file()
        }
        if not self.models:
            raise SystemExit(f"no base models in {work}: run `bench_inspect.py train --work {work}` first")
        self.batches = {name: held_out(load(work / name)).batch for name in self.models}
        self.losses = {
            name: examine(m, self.batches[name], gradient=False)[0] for name, m in self.models.items()
        }

    def draw(self, random: torch.Generator, names: Sequence[str]) -> tuple[str, Transformer, Batch]:
        """A copy of one of the models, to be spoilt."""
        usable = [name for name in self.models if name in names]
        name = usable[int(torch.randint(len(usable), (), generator=random))]
        return name, copy.deepcopy(self.models[name]), self.batches[name]


def pick(count: int, random: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=random))


def heads(work: Path, trials: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Every kind of bad head in ``trials`` copies, and what the healthy models are suspected of."""
    bases, report = Bases(work, list(shapes())), {}
    for name, model in bases.models.items():
        ranked = rank_heads(examine(model, bases.batches[name])[1])
        flagged = sum(s.score >= 1 for s in ranked)
        report[f"healthy {name}"] = {"heads": len(ranked), "flagged": flagged, "highest": ranked[0].to_dict()}
        print(
            f"healthy {name}: {flagged} of {len(ranked)} heads flagged, highest score {ranked[0].score:.2f}"
        )
    for kind in kinds or PLANTS:
        # A norm on queries and keys bounds the logits: one head alone cannot be saturated there.
        names = [n for n in bases.models if not (kind.startswith("saturated") and n == "normed")]
        tally = Tally(kind)
        for seed in range(trials):
            random = torch.Generator().manual_seed(seed)
            name, model, batch = bases.draw(random, names)
            layer = pick(len(model.blocks), random)
            attention = attentions(model)[layer]
            head = pick(attention.config.heads, random)
            PLANTS[kind](attention, head, random)
            loss, found = examine(model, batch)
            tally.add(seed, (name, layer, head), rank_heads(found), loss - bases.losses[name])
        report[kind] = tally.to_dict()
        print(tally, flush=True)
    return report


PlantExpert = Callable[[MoE, int, torch.Generator], None]


@torch.no_grad()
def never_chosen(moe: MoE, expert: int, random: torch.Generator) -> None:
    moe.router.bias[expert] = -2.0


@torch.no_grad()
def rarely_chosen(moe: MoE, expert: int, random: torch.Generator) -> None:
    """The router's row shrinks towards a small probability for every token."""
    moe.router.weight[expert] = -moe.router.weight.mean(0) * 4
    moe.router.bias[expert] = -0.2


@torch.no_grad()
def mute(moe: MoE, expert: int, random: torch.Generator) -> None:
    moe.down[expert].zero_()


def copied(permuted: bool, strength: float = 0.0) -> PlantExpert:
    """A copy of another expert, perhaps with its hidden units in another order, perhaps with noise on the weights."""

    @torch.no_grad()
    def plant(moe: MoE, expert: int, random: torch.Generator) -> None:
        experts, inner, _ = moe.down.shape
        other = (expert + 1 + pick(experts - 1, random)) % experts
        order = torch.randperm(inner, generator=random) if permuted else torch.arange(inner)
        gate, up = moe.gate_up[other].chunk(2, -1)
        moe.gate_up[expert] = torch.cat((gate[:, order], up[:, order]), -1)
        moe.down[expert] = moe.down[other][order]
        for weight in (moe.gate_up[expert], moe.down[expert]):
            weight += torch.randn(weight.shape, generator=random) * weight.square().mean().sqrt() * strength

    return plant


EXPERT_PLANTS: dict[str, PlantExpert] = {
    "dead: never chosen": never_chosen,
    "dead: rarely chosen": rarely_chosen,
    "dead: mute": mute,
    "duplicated": copied(permuted=False),
    "duplicated, units in another order": copied(permuted=True),
    "duplicated, with 5% noise": copied(permuted=True, strength=0.05),
}


def experts(work: Path, trials: int) -> dict[str, Any]:
    """Every kind of bad expert in ``trials`` copies, and what the healthy models are suspected of."""
    names = [name for name, shape in shapes().items() if shape.moe.experts]
    bases = Bases(work, names)
    report: dict[str, Any] = {}
    for name, model in bases.models.items():
        found = suspect_experts(examine_experts(model, bases.batches[name]))
        report[f"healthy {name}"] = [s.to_dict() for s in found]
        print(f"healthy {name}: {len(found)} experts flagged {[s.why for s in found]}")
    for kind, plant in EXPERT_PLANTS.items():
        tally = Tally(kind)
        for seed in range(trials):
            random = torch.Generator().manual_seed(seed)
            name, model, batch = bases.draw(random, names)
            layers = list(model.moe_layers())
            layer = layers[pick(len(layers), random)]
            moe = model.moe_layers()[layer]
            expert = pick(moe.config.experts, random)
            plant(moe, expert, random)
            found = suspect_experts(examine_experts(model, batch))
            tally.add(seed, (name, layer, expert), found, 0.0)
        report[kind] = tally.to_dict()
        print(
            f"{kind}: found in {tally.flagged} of {trials}, among the first three in {tally.top3}", flush=True
        )
    return report


def overhead(repeats: int = 15) -> dict[str, Any]:
    """What live figures of all heads cost beside a step, and what an idle trace hook does; alternating, one process.

    A run takes such a sample as often as ``monitor.overhead`` (half a percent) allows; this tells how often that is.
    """
    model = Transformer(shapes()["hybrid"]).train()
    optimizer = build_optimizer(model, BASE.optim)
    step = TrainStep(model, next_token_loss, optimizer, choose("fp32", torch.device("cpu")))
    batch = Batch.from_rows(torch.randint(0, 1024, (8, 257), generator=torch.Generator().manual_seed(0)))
    tracer, one = TraceCapture(Path(), step), next(batch.split(1))
    seconds: dict[str, list[float]] = {"step": [], "heads": [], "hook": []}
    inputs = head_inputs(model, one)

    def idle() -> None:
        for _ in range(1000):
            tracer(1, None)

    for _ in range(repeats):
        seconds["step"].append(timed(lambda: step(batch)))
        seconds["heads"].append(timed(lambda: [head_statistics(a, x, y, queries=32) for a, x, y in inputs]))
        seconds["hook"].append(timed(idle) / 1000)
    told = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    every = told["heads"] / 0.005 / told["step"]
    print(
        f"step {told['step'] * 1e3:.1f} ms; figures of all {4 * 6} heads {told['heads'] * 1e3:.2f} ms "
        f"({told['heads'] / told['step']:.1%} of a step): 0.5% when taken every {every:.0f} steps; "
        f"idle trace hook {told['hook'] * 1e6:.2f} µs ({told['hook'] / told['step']:.5%})"
    )
    return {**told, "every": every}


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.no_grad()
def head_inputs(model: Transformer, batch: Batch) -> list[tuple[Attention, torch.Tensor, torch.Tensor]]:
    """The inputs and the heads' outputs of every attention layer, as live probes get them from hooks."""
    found: list[list[Any]] = [[attention] for attention in attentions(model)]
    handles = []
    for own, attention in zip(found, attentions(model)):
        for module in (attention, attention.output):
            hook = module.register_forward_pre_hook(lambda m, args, own=own: own.append(args[0]))
            handles.append(hook)
    model(batch.tokens)
    for handle in handles:
        handle.remove()
    return [(a, x, y) for a, x, y in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "heads", "experts", "overhead"))
    parser.add_argument("--work", type=Path, default=Path("runs/inspect"))
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--kinds", nargs="*", default=[], choices=list(PLANTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "train":
        train(options.work, options.steps)
        return
    began = time.perf_counter()
    if options.what == "heads":
        report = heads(options.work, options.trials, options.kinds)
    elif options.what == "experts":
        report = experts(options.work, options.trials)
    else:
        report = overhead()
    print(f"{time.perf_counter() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
