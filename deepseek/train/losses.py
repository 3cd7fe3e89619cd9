"""Losses: what the model is trained for. Sums over targets, so that micro-batches and ranks add up exactly.

Shape letters: B rows, T positions, C hidden size, V vocabulary, N counted targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.batch import IGNORE, Batch
from deepseek.models.transformer import LayerStats, Transformer
from deepseek.nn.layers import to_compute_dtype
from deepseek.ops.cross_entropy import chunk_rows, linear_cross_entropy


class Loss(NamedTuple):
    """``total`` is what ``backward`` gets; ``cross_entropy`` the part reported as the loss (both per target of the
    whole batch); ``layers`` what the blocks had to tell."""

    total: Tensor
    cross_entropy: Tensor
    layers: list[LayerStats]


def cross_entropy_sum(hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of −log p(target) in nats over targets that are not ``IGNORE``; see ``linear_cross_entropy``."""
    return linear_cross_entropy(to_compute_dtype(hidden_NC), weight_VC, targets_N)[0]


@torch.no_grad()
def token_losses(model: Transformer, hidden_NC: Tensor, targets_N: Tensor) -> Tensor:
    """−log p(target) of each position, nats, fp32 at least: ``[N]``, 0 where the target is ``IGNORE``; no gradient."""
    hidden, weight = to_compute_dtype(hidden_NC), model.head_weight
    size = chunk_rows(weight.shape[0], hidden.element_size(), hidden.is_cuda)
    parts = hidden.split(size), targets_N.split(size)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    found = [
        F.cross_entropy(
            F.linear(h, weight.to(h.dtype)).to(wide), targets, ignore_index=IGNORE, reduction="none"
        )
        for h, targets in zip(*parts)
    ]
    return torch.cat(found)


def next_token_loss(model: Transformer, batch: Batch, z_weight: float = 0.0) -> Loss:
    """Mean cross-entropy of the next token over the *whole* batch's targets, plus the routers' balance losses.

    For a micro-batch the mean is over the whole batch too (``batch.n_targets``), so that summing micro-batches, or
    ranks, gives the batch's cross-entropy and its gradient. A balance loss looks at the routing of one forward
    pass; the sum weights each pass's by its share of the targets. ``z_weight`` > 0 adds that much of the mean squared
    log-partition to ``total``.
    """
    hidden, layers = model(batch.tokens, batch.documents, batch.positions, starts=batch.starts)
    total_targets = max(batch.n_targets, 1)
    nats, squares = linear_cross_entropy(
        to_compute_dtype(hidden.flatten(0, 1)), model.head_weight, batch.targets.flatten(), z_weight
    )
    loss = nats / total_targets
    balance = [layer.routing.balance_loss for layer in layers if layer.routing is not None]
    share = (batch.targets != IGNORE).sum() / total_targets
    total = loss + torch.stack(balance).sum() * share if balance else loss
    if z_weight:
        total = total + z_weight * squares / total_targets  # its gradient is in ``loss`` already
    return Loss(total, loss.detach(), layers)
