"""Which number format trains this model fastest here: measured on the model itself, once, before a run.

A large bf16 product may be eight times as fast as fp32 on a CPU with AMX, and a small model still slower in bf16,
because its matrices are small and its fp32 master weights are converted in every step. Only the step itself can tell.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from deepseek.batch import Batch
from deepseek.models.transformer import Transformer
from deepseek.precision import Policy
from deepseek.train.losses import next_token_loss


def fastest(
    model: Transformer, candidates: Sequence[Policy], rows: int, length: int, repeats: int = 2
) -> Policy:
    """The candidate whose forward and backward take least time; weights and gradients are left as they were."""
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (rows, length + 1), generator=random)
    batch = Batch.from_rows(tokens).to(device)
    seconds = {policy.name: _seconds(model, policy, batch, repeats) for policy in candidates}
    best = min(candidates, key=lambda policy: seconds[policy.name])
    told = ", ".join(f"{name} {took * 1e3:.0f} ms" for name, took in seconds.items())
    return replace(best, reason=f"forward and backward of this model, measured here: {told}")


def _seconds(model: Transformer, policy: Policy, batch: Batch, repeats: int) -> float:
    took = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        with policy.compute(batch.tokens.device):
            loss = next_token_loss(model, batch).total
        loss.backward()
        took.append(time.perf_counter() - began)
        model.zero_grad(set_to_none=True)
    return min(took[1:])
