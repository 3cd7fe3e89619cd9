"""Losses: what the model is trained for. Sums over targets, so that micro-batches and ranks add up exactly.

Shape letters: B rows, T positions, C hidden size, V vocabulary, N counted targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deepseek.batch import IGNORE, Batch
from deepseek.models.transformer import LayerStats, Transformer

CHUNK_ELEMENTS = 1 << 26  #: logits held at once by ``cross_entropy_sum``: 256 MiB in fp32


class Loss(NamedTuple):
    """``total`` is what ``backward`` gets; ``cross_entropy`` the part reported as the loss (both per target of the
    whole batch); ``layers`` what the blocks had to tell."""

    total: Tensor
    cross_entropy: Tensor
    layers: list[LayerStats]


def cross_entropy_sum(hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of −log p(target) in nats over targets that are not ``IGNORE``; logits in fp32.

    The rows are taken in chunks whose logits are recomputed in backward, so that the ``[N, V]`` logits of a large batch
    never exist at once.
    """
    rows = max(1, CHUNK_ELEMENTS // weight_VC.shape[0])
    if hidden_NC.shape[0] <= rows:
        return _chunk_loss(hidden_NC, weight_VC, targets_N)
    parts = [
        checkpoint(_chunk_loss, h, weight_VC, t, use_reentrant=False)
        for h, t in zip(hidden_NC.split(rows), targets_N.split(rows))
    ]
    return torch.stack(parts).sum()


def _chunk_loss(hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    logits = F.linear(hidden_NC, weight_VC).float()
    return F.cross_entropy(logits, targets_N, ignore_index=IGNORE, reduction="sum")


def next_token_loss(model: Transformer, batch: Batch) -> Loss:
    """Mean cross-entropy of the next token over the *whole* batch's targets, plus the routers' balance losses.

    For a micro-batch the mean is over the whole batch too (``batch.n_targets``), so that summing micro-batches, or
    ranks, gives the batch's cross-entropy and its gradient. A balance loss looks at the routing of one forward
    pass; the sum weights each pass's by its share of the targets.
    """
    hidden, layers = model(batch.tokens, batch.documents, batch.positions)
    total_targets = max(batch.n_targets, 1)
    loss = cross_entropy_sum(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten()) / total_targets
    balance = [layer.routing.balance_loss for layer in layers if layer.routing is not None]
    share = (batch.targets != IGNORE).sum() / total_targets
    total = loss + torch.stack(balance).sum() * share if balance else loss
    return Loss(total, loss.detach(), layers)
