"""Small models for the inspector's tests: random weights of a size at which heads and experts differ."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.batch import Batch
from deepseek.models import ModelConfig, Transformer
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig


def config(pattern: str = "FLH", experts: int = 6, layers: int = 3) -> ModelConfig:
    return ModelConfig(
        vocab_size=64, hidden=32, layers=layers, ffn=48, pattern=pattern, max_length=64,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8, window=8, block=8, stride=8),
        moe=MoEConfig(experts=experts, top_k=2 if experts else 1, expert_ffn=8),
    )  # fmt: skip


def model(shape: ModelConfig | None = None, seed: int = 0, std: float = 0.15) -> Transformer:
    torch.manual_seed(seed)
    made = Transformer(shape or config())
    for name, p in made.named_parameters():
        if p.dim() >= 2:
            torch.nn.init.normal_(p, std=std)
        elif name.endswith("gate_bias"):
            torch.nn.init.zeros_(p)
    return made.eval()


def batch(rows: int = 6, length: int = 32, seed: int = 1) -> Batch:
    """Rows of two documents each, the second one closed by padding."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (rows, length + 1), generator=random)
    documents = torch.zeros(rows, length, dtype=torch.long)
    documents[:, 20:], documents[:, -3:] = 1, -1
    targets = tokens[:, 1:].clone()
    targets[:, 19], targets[:, -4:] = -100, -100
    places = torch.cat((torch.arange(20), torch.arange(length - 23), torch.arange(3))).expand(rows, -1)
    return Batch(
        tokens[:, :-1].contiguous(), targets, documents, places.contiguous(), int((targets >= 0).sum())
    )


def loss(made: Transformer, given: Batch) -> float:
    """Nats per target, by torch's own cross-entropy."""
    with torch.no_grad():
        hidden = made(given.tokens, given.documents, given.positions).hidden
        logits: Tensor = hidden @ made.head_weight.T
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), given.targets.flatten()))
