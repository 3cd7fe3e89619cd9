"""What each attention head does, in a handful of numbers: the formulas that live probes and the inspector share.

A head is looked at through a sample of its queries. Nothing here reads a device tensor back: the figures are ``[H]``
tensors, ready when somebody asks for them.

Shape letters: B rows, T positions, R sampled queries, H query heads, D head size, C hidden size, S slots, F = H·D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepseek.monitor.inspect.view import AttentionView
from deepseek.nn.attention import Attention
from deepseek.nn.layers import widen


class HeadStatistics(NamedTuple):
    """Figures of the heads of one layer, fp32 ``[H]`` each, means over the sampled queries unless told otherwise.

    Attributes:
        entropy: of the attention probabilities, nats; in a hybrid layer of both branches, weighted by the gate.
        sink: probability on the first position of the document or on the learned sink.
        max_logit: the largest ``q·k / √D`` of the sample.
        output_norm: root mean square of the head's contribution to the residual stream, ``W_o,h y_h``, per element;
            NaN where the head's outputs were not given.
        gate: γ, the weight of the pooled branch; NaN in layers without one.
        diagonal, previous: probability on the position itself, and on the one before it.
        peak: the largest probability of a query.
        spread: entropy as a share of the largest that is possible (log of the slots seen), 1 = uniform.
    """

    entropy: Tensor
    sink: Tensor
    max_logit: Tensor
    output_norm: Tensor
    gate: Tensor
    diagonal: Tensor
    previous: Tensor
    peak: Tensor
    spread: Tensor


def sampled_rows(length: int, queries: int, device: torch.device) -> Tensor:
    """``queries`` positions spread evenly over a row of ``length``, the last one included; int64."""
    count = max(1, min(queries, length))
    return ((torch.arange(1, count + 1, device=device) * length) // count - 1).long()


@torch.no_grad()
def head_statistics(
    attention: Attention,
    x_BTC: Tensor,
    y_BTF: Tensor | None = None,
    *,
    documents: Tensor | None = None,
    positions: Tensor | None = None,
    queries: int = 64,
) -> HeadStatistics:
    """The figures of every head of a layer.

    Args:
        attention: the layer.
        x_BTC: its input, after the norm (a forward pre-hook of ``block.attention`` sees it).
        y_BTF: its heads' outputs side by side (a forward pre-hook of ``block.attention.output`` sees them).
        documents, positions: ``[B, T]``, what the model was given for these rows, or ``None``.
        queries: how many positions of each row are looked at; the cost is that many rows of the score matrix.

    No synchronisation: the result stays on the device.
    """
    rows = sampled_rows(x_BTC.shape[1], queries, x_BTC.device)
    view = AttentionView(attention, x_BTC, documents, positions, rows)
    output = None if y_BTF is None else contributions(attention, y_BTF[:, rows])
    return view_statistics(view, output)


def view_statistics(view: AttentionView, output_BRHC: Tensor | None = None) -> HeadStatistics:
    """``head_statistics`` of a view that exists already, with the heads' contributions if they are known."""
    counted_BR = counted(view)
    seen, logit = _branch(view, view.branches[0], counted_BR)
    gate = norm = torch.full_like(logit, float("nan"))
    if view.gate_BHR is not None:
        pooled, other = _branch(view, "pooled", counted_BR)
        share = view.gate_BHR.to(pooled[0].dtype)
        seen = [share * b + (1 - share) * a for a, b in zip(seen, pooled)]
        logit, gate = torch.maximum(logit, other), _mean(view.gate_BHR, counted_BR).float()
    if output_BRHC is not None:
        norm = _mean(output_BRHC.square().mean(-1).transpose(1, 2), counted_BR).sqrt().float()
    entropy, sink, diagonal, previous, peak, spread = (_mean(x, counted_BR).float() for x in seen)
    return HeadStatistics(entropy, sink, logit, norm, gate, diagonal, previous, peak, spread)


def counted(view: AttentionView) -> Tensor:
    """Which sampled queries are no padding: ``[B, R]``, 1 or 0."""
    B, R = view.q_BHRD[view.branches[0]].shape[0], len(view.rows)
    if view.documents is None:
        return torch.ones(B, R, device=view.rows.device)
    return (view.documents[:, view.rows] >= 0).float()


def contributions(attention: Attention, y_BRF: Tensor) -> Tensor:
    """What each head adds to the residual stream: ``[B, R, F]`` → ``[B, R, H, C]``."""
    y = widen(y_BRF).unflatten(-1, (attention.config.heads, -1))
    weight = attention.output.weight.to(y.dtype).unflatten(1, (attention.config.heads, -1))
    with torch.autocast(y.device.type, enabled=False):
        return torch.einsum("brhd,chd->brhc", y, weight)


def _mean(x_BHR: Tensor, counted_BR: Tensor) -> Tensor:
    """Mean over counted queries, ``[H]``."""
    weight = counted_BR[:, None].to(x_BHR.dtype)
    return (x_BHR * weight).sum((0, 2)) / weight.sum().clamp(min=1)


def _branch(view: AttentionView, branch: str, counted_BR: Tensor) -> tuple[list[Tensor], Tensor]:
    """Of one branch: entropy, sink, diagonal, previous, peak and spread of each query ``[B, H, R]``; and the largest
    logit ``[H]`` of the queries that count."""
    logits = view.logits(branch)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    slots = view.visible(branch).sum(-1)
    spread = entropy / slots.clamp(min=2).log()  # a query that sees one slot has no choice: 0
    if branch == "pooled":
        sink, diagonal, previous = p[..., 0], torch.zeros_like(entropy), torch.zeros_like(entropy)
    else:
        sink, diagonal, previous = (
            p.gather(-1, at.expand_as(entropy)[..., None])[..., 0] * ok for at, ok in _marks(view)
        )
    largest = logits.masked_fill(counted_BR[:, None, :, None] == 0, float("-inf")).amax((0, 2, 3))
    return [entropy, sink, diagonal, previous, p.amax(-1), spread], largest.float()


def _marks(view: AttentionView) -> list[tuple[Tensor, Tensor]]:
    """Of each query: the first position of its document, itself, the one before; and whether there is such a one."""
    rows = view.rows[None, None]
    yes = torch.ones_like(rows)
    if view.documents is None:
        first = torch.zeros_like(rows)
        return [(first, yes), (rows, yes), ((rows - 1).clamp(min=0), (rows > 0).long())]
    ids = view.documents
    new = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    first = torch.where(new, view.index, 0).cummax(1).values[:, view.rows][:, None]
    return [(first, yes), (rows, yes), ((rows - 1).clamp(min=0), (rows > first).long())]
