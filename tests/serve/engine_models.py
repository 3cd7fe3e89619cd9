"""A tiny model with a tokenizer in a directory, for tests that need the real engine in a process of its own."""

from __future__ import annotations

from pathlib import Path

import torch

from deepseek.data import train_tokenizer
from deepseek.models import Transformer
from deepseek.models.config import tiny
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.weights.convert import save_hf

TEXT = "the quick brown fox jumps over the lazy dog; naïve café 你好，世界 🙂🙃 " * 20


def save_tiny(directory: Path, pattern: str = "LH", seed: int = 0, experts: int = 4) -> Path:
    """Random weights, large enough that greedy answers vary."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([TEXT], 320)
    net = Transformer(
        tiny(
            vocab_size=320, hidden=32, layers=2, ffn=48, pattern=pattern, max_length=256,
            attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8, window=8, block=8, stride=4, qk_norm=True),
            moe=MoEConfig(experts=experts, top_k=2, expert_ffn=16),
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    saved = directory.with_name(directory.name + "-tokenizer")
    saved.mkdir(parents=True, exist_ok=True)
    tokenizer.save(saved)
    save_hf(net.eval(), directory, saved)
    return directory
