"""Held-out loss and bits per byte: the only figure that compares models with different tokenizers, and with gzip."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from deepseek.batch import Batch
from deepseek.dist import comm
from deepseek.models.transformer import Transformer
from deepseek.precision import Policy
from deepseek.train.losses import cross_entropy_sum


@dataclass(frozen=True)
class Evaluation:
    """``loss`` in nats per token; ``bits_per_byte`` of the text those tokens stand for."""

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int
    seconds: float


@torch.no_grad()
def evaluate(model: Transformer, batches: Iterable[Batch], policy: Policy, tokens: int = 0) -> Evaluation:
    """Cross-entropy over every target of ``batches``, added up over ranks, in evaluation mode.

    ``batch.n_targets`` and ``n_bytes`` count the batch over all ranks, each of which holds its own rows. ``tokens`` > 0
    stops after so many targets. Without any target the figures are NaN.
    """
    device = next(model.parameters()).device
    wide = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack
    total, n_targets, n_bytes = torch.zeros((), dtype=wide, device=device), 0, 0
    began, was_training = time.perf_counter(), model.training
    model.eval()
    try:
        for batch in batches:
            batch = batch.to(device)
            with policy.compute(device):
                hidden = model(batch.tokens, batch.documents, batch.positions).hidden
                nats = cross_entropy_sum(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten())
            total += nats.to(wide)
            n_targets, n_bytes = n_targets + batch.n_targets, n_bytes + batch.n_bytes
            if 0 < tokens <= n_targets:
                break
    finally:
        model.train(was_training)
    comm.sum_in_place([total])
    return Evaluation(
        loss=float(total) / n_targets if n_targets else math.nan,
        bits_per_byte=float(total) / math.log(2) / n_bytes if n_bytes else math.nan,
        tokens=n_targets,
        bytes=n_bytes,
        seconds=time.perf_counter() - began,
    )
