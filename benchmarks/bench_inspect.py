"""Does the inspector find the bad head and the bad expert? Planted in copies of small trained models, many seeds.

    python benchmarks/bench_inspect.py train --work runs/inspect       # the base models, once
    python benchmarks/bench_inspect.py heads --work runs/inspect --trials 100
    python benchmarks/bench_inspect.py experts --work runs/inspect --trials 100
    python benchmarks/bench_inspect.py overhead --work runs/inspect    # the live figures' share of a step

A trial draws a base model, a kind of fault, a layer and a head (or expert) from its seed, plants the fault in a copy of
the weights, and asks the inspector as a user would: it is told nothing. ``found`` is: the planted one is among the first
three suspects.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deepseek.assemble import load
from deepseek.config import replace
from deepseek.models import ModelConfig
from deepseek.monitor.inspect.examine import attentions, examine
from deepseek.monitor.inspect.held_out import held_out
from deepseek.monitor.inspect.suspects import rank_heads
from deepseek.nn.attention import Attention, AttentionConfig
from deepseek.nn.hybrid import HybridAttention
from deepseek.nn.moe import MoEConfig
from deepseek.recipes.plan import PretrainConfig
from deepseek.recipes.pretrain import pretrain

STEPS = 400
BASE = PretrainConfig()


def shapes() -> dict[str, ModelConfig]:
    """Six shapes: dense and sparse, window, full and hybrid layers, one to four heads a key, with and without QK-norm."""
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


def heads(work: Path, trials: int, kinds: list[str]) -> dict[str, Any]:
    bases = {name: load(work / name) for name in shapes() if (work / name).is_dir()}
    batches = {name: held_out(loaded).batch for name, loaded in bases.items()}
    report: dict[str, Any] = {"unplanted": {}}
    for name, loaded in bases.items():
        ranked = rank_heads(examine(loaded.model, batches[name])[1])
        flagged = [s.to_dict() for s in ranked if s.score >= 1]
        report["unplanted"][name] = {
            "heads": len(ranked),
            "flagged": len(flagged),
            "worst": ranked[0].to_dict(),
        }
        print(
            f"{name}: {len(flagged)} of {len(ranked)} heads flagged; highest {ranked[0].score:.2f} {ranked[0].why}"
        )
    for kind, plant in ((k, PLANTS[k]) for k in (kinds or PLANTS)):
        found, flagged, missed = 0, 0, []
        for seed in range(trials):
            names = [n for n in bases if not (kind.startswith("saturated") and n == "normed")]
            random = torch.Generator().manual_seed(seed)
            name = names[int(torch.randint(len(names), (), generator=random))]
            model = copy.deepcopy(bases[name].model)
            layer = int(torch.randint(len(model.blocks), (), generator=random))
            attention = attentions(model)[layer]
            head = int(torch.randint(attention.config.heads, (), generator=random))
            plant(attention, head, random)
            ranked = rank_heads(examine(model, batches[name])[1])
            place = next(i for i, s in enumerate(ranked) if (s.layer, s.head) == (layer, head))
            found += place < 3
            flagged += ranked[place].score >= 1
            if place >= 3:
                missed.append(
                    (
                        seed,
                        name,
                        layer,
                        head,
                        place,
                        round(ranked[place].score, 2),
                        round(ranked[0].score, 2),
                        ranked[0].kind,
                    )
                )
        report[kind] = {"trials": trials, "top3": found, "flagged": flagged, "missed": missed}
        print(
            f"{kind}: in the top 3 in {found} of {trials}, flagged in {flagged}; missed {missed}", flush=True
        )
    return report


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
    if options.what == "heads":
        report = heads(options.work, options.trials, options.kinds)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
