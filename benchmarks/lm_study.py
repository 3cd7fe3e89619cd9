"""What the two studies share: token arrays from our own data pipeline, and one short training run.

Rows are random windows of the concatenated training documents and cross document boundaries; evaluation goes
over the held-out documents in contiguous rows of the training length. That is simpler and a little faster
than packed rows, and the same for every run of a study. The bits per byte of a study therefore compare with
each other, not with those of ``deepseek evaluate``.

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
from deepseek.data import DataConfig, prepare
from deepseek.data.store import TokenStore
from deepseek.models import ModelConfig, Transformer, count
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.precision import choose
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
            window=self.window, gate_init=self.gate_init,
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
    """The standard library as int64 token ids ``train [N]`` and ``held_out [M]``, and held-out bytes per token."""

    train: Tensor
    held_out: Tensor
    bytes_per_token: float


@cache
def text(vocab: int, folder: Path, device: str) -> Text:
    """Prepared once for each vocabulary, kept in ``folder``."""
    corpus = prepare(DataConfig(vocab_size=vocab), folder)
    assert corpus.held_out is not None
    held_out = _ids(corpus.held_out, device)
    return Text(_ids(corpus.train, device), held_out, corpus.held_out.n_bytes / len(held_out))


def _ids(store: TokenStore, device: str) -> Tensor:
    joined = np.concatenate([np.asarray(store.tokens(i)) for i in range(len(store))])
    return torch.from_numpy(joined.astype(np.int64)).to(device)


def run(setting: Setting, data: Text, device: str, held_out_tokens: int = 0) -> dict[str, float]:
    """Train and evaluate; ``held_out_tokens`` > 0 evaluates on so many only."""
    torch.manual_seed(setting.seed)
    model = Transformer(setting.model).to(device)
    policy = choose(setting.precision, torch.device(device))
    step = TrainStep(
        model, next_token_loss, build_optimizer(model, setting.optim), policy, grad_clip=setting.clip
    )
    flops = count.flops(setting.model, setting.length).per_token
    steps = setting.number_of_steps(flops)
    shape = ScheduleConfig(kind=setting.schedule, warmup=setting.warmup, floor=setting.floor)
    schedule = Schedule(shape, steps)
    rows, random = (
        max(1, setting.batch_tokens // setting.length),
        torch.Generator().manual_seed(setting.seed + 1),
    )
    offsets, began, loss = torch.arange(setting.length + 1, device=device), time.perf_counter(), float("nan")
    for number in range(steps):
        schedule.apply(step.optimizer, number)
        starts = torch.randint(0, len(data.train) - setting.length - 1, (rows,), generator=random).to(device)
        result = step(Batch.from_rows(data.train[starts[:, None] + offsets]))
        loss = float(result.loss)
        if number == 0:
            began = time.perf_counter()
    seconds = (time.perf_counter() - began) / max(1, steps - 1)
    parameters = count.parameters(setting.model)
    nats = evaluate(model, data.held_out[: held_out_tokens or None], setting, device)
    return {
        "bits_per_byte": round(nats / math.log(2) / data.bytes_per_token, 4), "loss": round(nats, 4),
        "train_loss": round(loss, 3), "steps": steps, "tokens": steps * rows * setting.length,
        "mflop_per_token": round(flops / 1e6, 2), "active": parameters.active, "total": parameters.total,
        "tokens_per_second": round(rows * setting.length / seconds),
    }  # fmt: skip


@torch.no_grad()
def evaluate(model: Transformer, ids: Tensor, setting: Setting, device: str) -> float:
    """Mean cross-entropy in nats over contiguous rows."""
    model.eval()
    policy, T = choose(setting.precision, torch.device(device)), setting.length
    total, counted = 0.0, 0
    rows = ids[: (len(ids) - 1) // T * T + 1].unfold(0, T + 1, T)
    for part in torch.split(rows, max(1, 8192 // T)):
        with policy.compute(torch.device(device)):
            hidden = model(part[:, :-1]).hidden
            total += float(cross_entropy_sum(hidden.flatten(0, 1), model.head_weight, part[:, 1:].flatten()))
        counted += part[:, 1:].numel()
    return total / counted


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
