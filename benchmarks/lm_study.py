"""What the two studies share: token arrays from our own data pipeline, and one short training run.

Rows are random windows of the concatenated training documents and cross document boundaries; evaluation goes
over the held-out documents in contiguous rows of the training length. That is simpler and a little faster
than packed rows, and the same for every run of a study. The bits per byte of a study therefore compare with
each other, not with those of ``deepseek evaluate``. Tokens lie on the device, windows are drawn there, and
nothing is read back before the end.

Shape letters: B rows, T positions.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from deepseek.batch import Batch
from deepseek.bench.tokens import load_tokens
from deepseek.data import DataConfig, prepare
from deepseek.data.store import TokenStore
from deepseek.models import ModelConfig, Transformer, count
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.ops.jit import compile_blocks
from deepseek.precision import Policy, choose, lower
from deepseek.train import OptimConfig, Schedule, ScheduleConfig, TrainStep, build_optimizer, next_token_loss
from deepseek.train.losses import cross_entropy_sum


@dataclass(frozen=True)
class Setting:
    """One run. Its length is ``steps``, or ``tokens``, or what ``tflop`` buys: the first that is not 0."""

    vocab: int = 4096
    hidden: int = 192
    layers: int = 4
    pattern: str = "LLLH"
    ffn_pattern: str = ""
    ffn: int = 0  # 0: 8/3 of hidden
    head_dim: int = 32
    queries_per_kv: int = 2
    window: int = 128
    gate_init: float = -3.0
    block: int = 32
    stride: int = 16
    pooling: str = "mean"
    full_rope: bool = True
    experts: int = 16
    expert_ffn: int = 0  # 0: hidden
    top_k: int = 2
    shared_experts: int = 0
    entropy_weight: float = 0.01
    bias_rate: float = 1e-3
    tied: bool = True
    init_std: float = 0.02

    length: int = 512
    batch_tokens: int = 4096
    steps: int = 0
    tokens: int = 0
    tflop: float = 4.0
    precision: str = "fp32"
    compiled: bool = False
    seed: int = 0

    optimizer: Literal["adamw", "muon"] = "muon"
    lr: float = 3e-3
    embedding_lr: float = 1.0
    momentum: float = 0.95
    beta2: float = 0.95
    newton_schulz_steps: int = 5
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: float = 0.03
    floor: float = 0.05

    @property
    def model(self) -> ModelConfig:
        heads = self.hidden // self.head_dim
        attention = AttentionConfig(
            heads=heads, kv_heads=max(1, heads // self.queries_per_kv), head_dim=self.head_dim, qk_norm=True,
            window=self.window, gate_init=self.gate_init, block=self.block, stride=self.stride, **self._newer,
        )  # fmt: skip
        moe = MoEConfig(
            experts=self.experts, top_k=self.top_k if self.experts else 1, expert_ffn=self.expert_ffn or self.hidden,
            shared_experts=self.shared_experts, entropy_weight=self.entropy_weight, bias_rate=self.bias_rate,
        )  # fmt: skip
        return ModelConfig(
            vocab_size=self.vocab, hidden=self.hidden, layers=self.layers, ffn=self.ffn or int(2.67 * self.hidden),
            pattern=self.pattern, ffn_pattern=self.ffn_pattern, max_length=max(512, self.length),
            init_std=self.init_std, tie_embeddings=self.tied, attention=attention, moe=moe,
        )  # fmt: skip

    @property
    def _newer(self) -> dict[str, Any]:
        """Options of ``AttentionConfig`` that not every version has."""
        changes = {"pooling": self.pooling, "full_rope": self.full_rope}
        return {name: v for name, v in changes.items() if v != getattr(Setting, name)}

    @property
    def optim(self) -> OptimConfig:
        return OptimConfig(
            name=self.optimizer, lr=self.lr, embedding_lr=self.embedding_lr, weight_decay=self.weight_decay,
            momentum=self.momentum, newton_schulz_steps=self.newton_schulz_steps, betas=(0.9, self.beta2),
        )  # fmt: skip

    def number_of_steps(self, flops_per_token: float) -> int:
        tokens = self.tokens or self.tflop * 1e12 / flops_per_token
        return self.steps or max(1, int(tokens / self.batch_tokens))


@dataclass(frozen=True)
class Text:
    """Token ids ``train [N]`` and ``held_out [M]``, int32 on the device, and held-out bytes per token."""

    train: Tensor
    held_out: Tensor
    bytes_per_token: float


@cache
def text(vocab: int, folder: Path, device: str) -> Text:
    """The tokens of ``folder`` if ``corpus_debian.py`` wrote them there; else the standard library, prepared once
    for each vocabulary and kept in ``folder``."""
    if (folder / "tokens.json").is_file():
        tokens = load_tokens(folder)
        return Text(
            torch.from_numpy(tokens.train.astype(np.int32)).to(device),
            torch.from_numpy(tokens.held_out.astype(np.int32)).to(device),
            float(tokens.report["held_out_bytes"]) / len(tokens.held_out),
        )
    corpus = prepare(DataConfig(vocab_size=vocab), folder)
    assert corpus.held_out is not None
    held_out = _ids(corpus.held_out, device)
    return Text(_ids(corpus.train, device), held_out, corpus.held_out.n_bytes / len(held_out))


def _ids(store: TokenStore, device: str) -> Tensor:
    joined = np.concatenate([np.asarray(store.tokens(i)) for i in range(len(store))])
    return torch.from_numpy(joined.astype(np.int32)).to(device)


def run(
    setting: Setting, data: Text, device: str, held_out_tokens: int = 0, marks: int = 0
) -> dict[str, Any]:
    """Train and evaluate; ``held_out_tokens`` > 0 evaluates on so many only, ``marks`` > 0 also at so many points."""
    torch.manual_seed(setting.seed)
    model = Transformer(setting.model).to(device)
    if setting.compiled:
        torch.compiler.reset()
        compile_blocks(model.blocks)
    policy = choose(setting.precision, torch.device(device), training=True)
    optimizer = build_optimizer(model, setting.optim, lower(model, policy))
    step = TrainStep(model, next_token_loss, optimizer, policy, grad_clip=setting.clip)
    flops = count.flops(setting.model, setting.length).per_token
    steps = setting.number_of_steps(flops)
    schedule = Schedule(
        ScheduleConfig(kind=setting.schedule, warmup=setting.warmup, floor=setting.floor), steps
    )
    held_out, T = data.held_out[: held_out_tokens or None], setting.length
    rows = max(1, setting.batch_tokens // T)
    random = torch.Generator(device).manual_seed(setting.seed + 1)
    offsets, losses, curve = torch.arange(T + 1, device=device), list[Tensor](), list[tuple[int, float]]()
    seconds, began, counted = 0.0, time.perf_counter(), 0
    started = began
    for number in range(steps):
        schedule.apply(step.optimizer, number)
        starts = torch.randint(0, len(data.train) - T - 1, (rows, 1), generator=random, device=device)
        result = step(Batch.from_rows(data.train[starts + offsets]))
        losses.append(result.loss.detach())
        counted += 1
        at_mark = marks and (number + 1) % max(1, steps // marks) == 0
        if number < min(10, steps - 1):  # compiling and warming up is no training speed
            _synchronize(device)
            began, counted = time.perf_counter(), 0
        elif at_mark or number == steps - 1:
            _synchronize(device)
            seconds += time.perf_counter() - began
            if at_mark and number < steps - 1:
                curve.append(((number + 1) * rows * T, round(evaluate(model, held_out, setting, policy), 4)))
            began = time.perf_counter()
        if number == 0:
            first = time.perf_counter() - started
    parameters = count.parameters(setting.model)
    nats = evaluate(model, held_out, setting, policy)
    gates = {str(i): round(float(gate.mean()), 3) for i, gate in result.gates.items()}
    tail = torch.stack(losses[-max(1, steps // 20) :])
    return {
        "bits_per_byte": round(nats / math.log(2) / data.bytes_per_token, 4), "loss": round(nats, 4),
        "train_loss": round(float(tail.mean()), 4), "steps": steps, "tokens": steps * rows * T,
        "epochs": round(steps * rows * T / len(data.train), 2), "curve": curve, "gates": gates,
        "mflop_per_token": round(flops / 1e6, 2), "active": parameters.active, "total": parameters.total,
        "tokens_per_second": round((steps - min(10, steps - 1)) * rows * T / max(seconds, 1e-9)),
        "first_step_seconds": round(first, 1), "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def _synchronize(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


@torch.no_grad()
def evaluate(model: Transformer, ids: Tensor, setting: Setting, policy: Policy) -> float:
    """Mean cross-entropy in nats over contiguous rows."""
    model.eval()
    T, device = setting.length, ids.device
    total, counted = torch.zeros((), dtype=torch.float64, device=device), 0
    rows = ids[: (len(ids) - 1) // T * T + 1].unfold(0, T + 1, T)
    for part in torch.split(rows, max(1, 65_536 // T)):
        batch = Batch.from_rows(part)
        with policy.compute(device), torch.compiler.set_stance("force_eager"):
            hidden = model(batch.tokens).hidden
            nats = cross_entropy_sum(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten())
        total += nats.to(torch.float64)
        counted += batch.n_targets
    model.train()
    return float(total) / counted


def main(doc: str, grid: Mapping[str, Setting]) -> None:
    """Run every setting of ``grid`` whose name contains ``--only``; a JSON line each."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="run the settings whose name contains this")
    parser.add_argument(
        "--steps", type=int, default=0, help="instead of each setting's own: to see that it starts"
    )
    parser.add_argument("--hidden", type=int, default=0, help="likewise")
    parser.add_argument("--length", type=int, default=0, help="likewise; also the tokens of a batch")
    parser.add_argument("--held-out-tokens", type=int, default=0, help="evaluate on so many; 0: all")
    parser.add_argument("--cache", type=Path, default=Path("runs/.corpora"))
    options = parser.parse_args()
    changes: dict[str, Any] = {
        name: v for name in ("steps", "hidden", "length") if (v := getattr(options, name))
    }
    if options.length:
        changes["batch_tokens"] = options.length
    for name, setting in grid.items():
        if options.only in name:
            used = replace(setting, **changes)
            found = run(
                used, text(used.vocab, options.cache, options.device), options.device, options.held_out_tokens
            )
            print(json.dumps({"setting": name, **found}), flush=True)
