"""The loss of a step's batch once more, document by document: which sample was it?

With the weights of the checkpoint before the step, or of any other, or those of now; always the same figures for the
same question. On a live run nothing of it is disturbed: weights, buffers, generators and the place in the data are
afterwards, bit for bit, what they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.assemble import Run, build, load_weights, pick_device
from deepseek.batch import Batch
from deepseek.data import Corpus, Loader, Sample
from deepseek.data.loader import Delivery
from deepseek.dist import comm
from deepseek.errors import RunError
from deepseek.models.transformer import Transformer
from deepseek.precision import Policy, choose, lower
from deepseek.recipes.provenance import PlacedSample, describe, open_data
from deepseek.train.losses import token_losses
from deepseek.weights import checkpoint
from deepseek.weights.reader import step_of

TOP = 64  #: documents that an answer lists at most, those of the highest loss first


@dataclass(frozen=True)
class ReplayResult:
    """What a step's batch costs with other weights.

    Attributes:
        step: whose batch. weights: the step whose weights were used.
        loss: nats per target, over all ranks, as a training step would tell it; ``targets`` of them.
        documents: the pieces of the batch, the costliest first, at most ``TOP``.
    """

    step: int
    weights: int
    loss: float
    targets: int
    documents: list[PlacedSample]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, and what they say as ``text``."""
        text = f"step {self.step} with the weights of step {self.weights}: loss {self.loss:.4f}"
        return {**asdict(self), "text": text}


def replay_run(run: Path | str, step: int, at: str | int = "before", device: str = "auto") -> ReplayResult:
    """Replay a step of a run that may have ended, from its files alone.

    Args:
        at: 'before': the newest checkpoint before the step; 'current': the newest of all; a step: that one.

    Raises:
        RunError: there is no such checkpoint. DataError: the corpus is gone.
    """
    path = Run.open(run).path
    found = checkpoint.load(weights_at(path, step, at))
    with open_data(path, step) as data:
        train, where = data.config.train, pick_device(device)
        model = build(Run(path).model_config(), where)
        policy = choose(train.precision_mode, where, train.loss_scaling_factor, training=True)
        lower(model, policy)
        load_weights(model, found)
        delivery = data.loader.peek(data.state, data.ahead)
        return replay(model, delivery, data.loader, data.corpus, policy, train.micro_rows, step, found.step)


def weights_at(run: Path, step: int, at: str | int) -> Path:
    """The checkpoint that ``at`` means; see ``replay_run``."""
    held = {step_of(p): p for p in checkpoint.list_checkpoints(run)}
    has = f"it has: {', '.join(map(str, held))}" if held else "it has none"
    if at == "current":
        chosen = max(held, default=None)
    elif at == "before":
        chosen = max((s for s in held if s < step), default=None)
    else:
        chosen = int(at) if int(at) in held else None
    if chosen is None:
        wanted = {"current": "", "before": f" before step {step}"}.get(str(at), f" of step {at}")
        raise RunError(f"{run} has no checkpoint{wanted}; {has}. Choose one with --at")
    return held[chosen]


def replay(
    model: Transformer,
    delivery: Delivery,
    loader: Loader,
    corpus: Corpus,
    policy: Policy,
    micro_rows: int,
    step: int,
    weights: int,
) -> ReplayResult:
    """Every rank computes its rows of ``delivery``; every rank gets the whole answer."""
    with undisturbed(model):
        model.train()
        losses = batch_losses(model, delivery.batch, policy, micro_rows)
    samples = loader.samples(delivery.rows)
    mine = _piece_losses(losses, samples, loader.rank, loader.world)
    sums = dict(pair for part in comm.gather(mine) for pair in part)
    placed = [replace(p, loss=sums[i] / p.length) for i, p in enumerate(describe(samples, corpus))]
    targets = delivery.batch.n_targets
    placed.sort(key=lambda p: (-(p.loss or 0.0), p.row, p.column))
    return ReplayResult(step, weights, sum(sums.values()) / max(targets, 1), targets, placed[:TOP])


@torch.no_grad()
def batch_losses(model: Transformer, batch: Batch, policy: Policy, micro_rows: int) -> Tensor:
    """−log p of every target of this rank's rows, fp64 ``[B, T]`` on the CPU; forward passes as a step makes them."""
    device = next(model.parameters()).device
    found = []
    for part in batch.split(micro_rows or batch.rows):
        part = part.to(device)
        with policy.compute(device):
            hidden = model(part.tokens, part.documents, part.positions).hidden
            losses = token_losses(model, hidden.flatten(0, 1), part.targets.flatten())
        found.append(losses.view(part.targets.shape).cpu().double())
    return torch.cat(found)


def _piece_losses(losses_BT: Tensor, samples: list[Sample], rank: int, world: int) -> list[tuple[int, float]]:
    """The summed loss of each piece in this rank's rows, by the piece's number."""
    return [
        (i, float(losses_BT[s.row // world, s.column : s.column + s.length].sum()))
        for i, s in enumerate(samples)
        if s.row % world == rank
    ]


@contextlib.contextmanager
def undisturbed(model: Transformer) -> Iterator[None]:
    """Afterwards, training mode, buffers and every random generator are what they were."""
    kept = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    training, generators = model.training, checkpoint.rng_state()
    try:
        yield
    finally:
        model.train(training)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in kept:
                    buffer.copy_(kept[name])
        checkpoint.set_rng_state(generators)


@contextlib.contextmanager
def weights_of(model: Transformer, found: checkpoint.Checkpoint) -> Iterator[None]:
    """The weights of a checkpoint in the place of the model's own, which wait in host memory."""
    own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    try:
        load_weights(model, found)
        yield
    finally:
        model.load_state_dict(own)
