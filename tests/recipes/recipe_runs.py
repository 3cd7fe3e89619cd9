"""Very small runs: a corpus of a few kilobytes, a model of some thousand weights, seconds per run."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.config import replace, to_toml
from deepseek.data import DataConfig, SourceConfig
from deepseek.models.config import tiny
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.recipes.pretrain import PretrainConfig
from deepseek.train import OptimConfig, TrainingConfig
from deepseek.weights import checkpoint
from deepseek.weights.checkpoint import CheckpointConfig

SENTENCE = "alpha beta gamma delta def return self = ( ) : epsilon 'zeta' eta théta 你好 🙂 [0] lambda"
WORDS = SENTENCE.split()


def write_corpus(root: Path, documents: int = 40, seed: int = 0) -> Path:
    """Text files of about a kilobyte, with characters of one to four bytes."""
    root.mkdir(parents=True)
    draw = random.Random(seed)
    for i in range(documents):
        lines = [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(draw.randint(5, 30))]
        (root / f"{i:03}.txt").write_text("\n".join(lines), encoding="utf-8")
    return root


def free_port() -> str:
    """A port for ``MASTER_PORT``, which a rank binds seconds later: one that the system gives to nobody by itself."""
    dice = random.SystemRandom()
    while True:
        port = dice.randrange(20_000, 32_000)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
        return str(port)


def smallest(corpus: Path, **changes: Any) -> PretrainConfig:
    """Window and hybrid layers, experts with every balancing mechanism, accumulation with a smaller last part."""
    config = PretrainConfig(
        model=tiny(
            vocab_size=300, hidden=16, layers=2, ffn=24, pattern="LH", ffn_pattern="DE", max_length=64,
            attention=AttentionConfig(heads=2, kv_heads=1, head_dim=8, window=8, block=8, stride=4, qk_norm=True),
            moe=MoEConfig(experts=4, top_k=2, expert_ffn=8),
        ),
        data=DataConfig(sources=(SourceConfig(kind="text", path=str(corpus)),), vocab_size=300, held_out=0.15),
        optim=OptimConfig(lr=0.01),
        train=TrainingConfig(
            steps=8, batch_tokens=8 * 32, length=32, micro_rows=3, precision_mode="fp32", device="cpu"
        ),
    )  # fmt: skip
    for name, values in changes.items():
        config = replace(config, **{name: replace(getattr(config, name), **values)})
    return config


def checkpointed(config: PretrainConfig, every: int, **options: Any) -> PretrainConfig:
    return replace(config, checkpoint=CheckpointConfig(every=every, keep_last=0, **options))


def tensors(run: Path, step: int | None = None) -> dict[str, Tensor]:
    """Weights, buffers and optimizer state of a checkpoint, by group and name."""
    at = checkpoint.load(run if step is None else run / f"step-{step:06d}")
    return {f"{group}/{name}": t for group, named in at.tensors.items() for name, t in named.items()}


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def write_config(config: PretrainConfig, path: Path) -> Path:
    path.write_text(to_toml(config), encoding="utf-8")
    return path


def start(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A Python process that runs ``code`` with ``arguments``; ``env`` is added to the environment."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def events(run: Path) -> list[dict[str, Any]]:
    found = []
    for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # a line torn by a kill
            continue
    return found


def losses(run: Path) -> dict[int, float]:
    """The loss of every step, as told last."""
    return {e["step"]: e["loss"] for e in events(run) if e["event"] == "train"}
