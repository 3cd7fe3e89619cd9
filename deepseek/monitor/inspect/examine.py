"""One forward pass over a held-out batch, and one backward, that tell everything about the heads of a model.

The backward pass goes to the activations only: with it, what the loss would be without a head is estimated for all
heads at once, to first order, as ``Σ y · ∂loss/∂y`` (attribution patching; Nanda 2023, and the head importance of
Michel et al., arXiv 1905.10650, with its sign kept).

Shape letters: B rows, T positions, R sampled queries, H heads, C hidden size, F = heads · head size, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from deepseek.batch import Batch
from deepseek.models import Transformer
from deepseek.models.transformer import Block
from deepseek.monitor.inspect.heads import (
    HeadStatistics,
    contributions,
    counted,
    sampled_rows,
    view_statistics,
)
from deepseek.monitor.inspect.view import AttentionView
from deepseek.nn.attention import Attention
from deepseek.ops.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class LayerHeads:
    """The heads of one layer.

    Attributes:
        index, kind: the block, and the letter of its attention.
        statistics: ``HeadStatistics``, ``[H]`` each.
        removal: estimated change of the loss (nats per token) if the head's output were zero, ``[H]``; above zero
            for a head that helps. NaN when no backward pass was made.
        patterns, outputs, weights: cosine similarities of the heads' attention patterns (against uniform attention),
            of their contributions to the residual stream (against their mean), and of their query and output weights
            (the smaller of the two), ``[H, H]``.
        size: root mean square of the head's own weights (the geometric mean of query and output), ``[H]``.
    """

    index: int
    kind: str
    statistics: HeadStatistics
    removal: Tensor
    patterns: Tensor
    outputs: Tensor
    weights: Tensor
    size: Tensor


def attentions(model: Transformer) -> list[Attention]:
    """The attention layer of every block."""
    return [cast(Block, block).attention for block in model.blocks]


def loss_sum(model: Transformer, batch: Batch) -> Tensor:
    """Sum of the next-token cross-entropy over the batch's targets, nats."""
    hidden = model(batch.tokens, batch.documents, batch.positions).hidden
    return linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten())[0]


def examine(
    model: Transformer, batch: Batch, *, queries: int = 64, rows: int = 8, gradient: bool = True
) -> tuple[float, list[LayerHeads]]:
    """Look at every head.

    Args:
        batch: on the model's device. queries: how many positions of a row the patterns are sampled at.
        rows: rows of the batch that go through the model at a time, which bounds the memory.
        gradient: also make the backward pass that ``removal`` needs.

    Returns:
        The loss in nats per target, and a ``LayerHeads`` for every layer, its tensors on the CPU.
    """
    found: list[tuple[int, list[LayerHeads]]] = []
    total = 0.0
    with evaluating(model), torch.set_grad_enabled(gradient):
        for part in batch.split(rows):
            loss, layers = _look(model, part, queries, gradient)
            total += loss
            found.append((part.rows, layers))
    return total / max(batch.n_targets, 1), [
        _merge([(n, ls[i]) for n, ls in found]) for i in range(len(model.blocks))
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen weights for the length of a ``with`` block; afterwards all is as before."""
    was, frozen = model.training, {p: p.requires_grad for p in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(was)
        for p, needed in frozen.items():
            p.requires_grad_(needed)


def _look(model: Transformer, part: Batch, queries: int, gradient: bool) -> tuple[float, list[LayerHeads]]:
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def keep(into: dict[int, Tensor], index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            into[index] = args[0]
            if gradient and into is outputs:
                args[0].retain_grad()

        return hook

    with ExitStack() as hooks:
        if gradient:
            handle = model.embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())
            hooks.callback(handle.remove)
        for index, attention in enumerate(attentions(model)):
            for module, into in ((attention, inputs), (attention.output, outputs)):
                hooks.callback(module.register_forward_pre_hook(keep(into, index)).remove)
        loss = loss_sum(model, part)
    if gradient:
        loss.backward()
    scale = 1 / max(part.n_targets, 1)
    with torch.no_grad():
        return float(loss.detach()), [
            _layer(model, i, inputs[i].detach(), outputs[i], part, queries, scale) for i in sorted(inputs)
        ]


def _layer(
    model: Transformer, index: int, x: Tensor, y: Tensor, part: Batch, queries: int, scale: float
) -> LayerHeads:
    attention = attentions(model)[index]
    rows = sampled_rows(x.shape[1], queries, x.device)
    view = AttentionView(attention, x, part.documents, part.positions, rows)
    output = contributions(attention, y.detach()[:, rows])
    removal = torch.full((attention.config.heads,), float("nan"))
    if y.grad is not None:
        product = (y.detach() * y.grad).unflatten(-1, (attention.config.heads, -1))
        removal = -product.float().sum((0, 1, 3)) * scale
    weight = counted(view)
    return LayerHeads(
        index,
        model.config.kinds[index],
        HeadStatistics(*(figure.cpu() for figure in view_statistics(view, output))),
        removal.cpu(),
        pattern_similarity(view, weight).cpu(),
        output_similarity(output, weight).cpu(),
        weight_similarity(attention).cpu(),
        weight_size(attention).cpu(),
    )


def pattern_similarity(view: AttentionView, counted_BR: Tensor) -> Tensor:
    """Cosines ``[H, H]`` of the heads' attention patterns, each less the uniform pattern over what it may see."""
    gram, heads = None, view.config.heads
    for branch in view.branches:
        seen = view.visible(branch)
        excess = view.probabilities(branch) - seen / seen.sum(-1, keepdim=True)
        share: Tensor = counted_BR[:, None].to(excess.dtype)
        if view.gate_BHR is not None:
            share = share * (view.gate_BHR if branch == "pooled" else 1 - view.gate_BHR).to(excess.dtype)
        flat = (excess * share[..., None]).transpose(0, 1).reshape(heads, -1)
        gram = flat @ flat.T if gram is None else gram + flat @ flat.T
    assert gram is not None
    return cosines(gram)


def output_similarity(output_BRHC: Tensor, counted_BR: Tensor) -> Tensor:
    """Cosines ``[H, H]`` of what the heads add to the residual stream, each less its mean over positions."""
    weight = counted_BR[..., None, None].to(output_BRHC.dtype)
    mean = (output_BRHC * weight).sum((0, 1), keepdim=True) / weight.sum().clamp(min=1)
    flat = ((output_BRHC - mean) * weight).permute(2, 0, 1, 3).flatten(1)
    return cosines(flat @ flat.T)


def own_weights(attention: Attention) -> tuple[Tensor, Tensor]:
    """What is each head's alone: its rows of the query and its columns of the output matrix, ``[H, D·C]`` each."""
    heads = attention.config.heads
    output = attention.output.weight.float().unflatten(1, (heads, -1)).transpose(0, 1).flatten(1)
    return attention.query.weight.float().view(heads, -1), output


def weight_similarity(attention: Attention) -> Tensor:
    """Cosines ``[H, H]`` of the heads' own weights: the smaller of that of the query and that of the output matrix."""
    query, output = own_weights(attention)
    return torch.minimum(cosines(query @ query.T), cosines(output @ output.T))


def weight_size(attention: Attention) -> Tensor:
    """Geometric mean of the root mean squares of each head's query and output weights, ``[H]``."""
    query, output = (w.square().mean(1) for w in own_weights(attention))
    return (query * output).pow(0.25)


def cosines(gram_HH: Tensor) -> Tensor:
    """A Gram matrix as cosines; a vector of length zero is like no other."""
    norm = gram_HH.diagonal().clamp(min=0).sqrt()
    return (gram_HH / (norm[:, None] * norm).clamp(min=1e-30)).clamp(-1, 1).float()


def _merge(parts: list[tuple[int, LayerHeads]]) -> LayerHeads:
    """The mean of the parts' figures, weighted by their rows; the largest logit is the largest of all."""
    if len(parts) == 1:
        return parts[0][1]
    shares = [rows / sum(n for n, _ in parts) for rows, _ in parts]

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack([share * v for share, v in zip(shares, values)]).sum(0)

    layers = [layer for _, layer in parts]
    statistics = HeadStatistics(
        *(mean(list(values)) for values in zip(*(layer.statistics for layer in layers)))
    )
    largest = torch.stack([layer.statistics.max_logit for layer in layers]).amax(0)
    return LayerHeads(
        layers[0].index,
        layers[0].kind,
        statistics._replace(max_logit=largest),
        torch.stack([layer.removal for layer in layers]).sum(
            0
        ),  # each is a share of the whole batch's targets
        mean([layer.patterns for layer in layers]),
        mean([layer.outputs for layer in layers]),
        layers[0].weights,
        layers[0].size,
    )
