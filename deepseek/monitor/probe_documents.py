"""Losses per document and per source of the batch that was trained on, and which documents made a batch go wrong.

Shape letters: B rows of this rank, T positions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from deepseek.batch import IGNORE, Batch
from deepseek.data import Loader, Tokenizer
from deepseek.data.loader import Delivery, Sample
from deepseek.monitor.probe_forward import Look, quiet
from deepseek.train.losses import token_losses
from deepseek.train.step import TrainStep

EXCERPT = 400  #: characters of a document that an incident shows
EXCERPT_TOKENS = 160
FEWEST = 4  #: targets that a piece must have for its mean loss to be compared with others


def source_losses(seen: Look, delivery: Delivery, loader: Loader) -> dict[str, Tensor]:
    """Mean loss of the rows looked at, nats per target: by source name, 0-d tensors on the device."""
    sums: dict[str, list[Tensor]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    rows = range(seen.first_row, seen.first_row + seen.losses.shape[0])
    targets = delivery.batch.targets  # where the data were made: counting there waits for nothing
    for row, sample in pieces(delivery, loader, rows):
        here = slice(sample.column, sample.column + sample.length)
        sums[sample.source].append(seen.losses[row - seen.first_row, here].sum())
        counts[sample.source] += int((targets[row, here] != IGNORE).sum())
    return {
        f"data/{name}/loss": torch.stack(found).sum() / counts[name]
        for name, found in sums.items()
        if counts[name]
    }


def pieces(delivery: Delivery, loader: Loader, rows: range) -> Iterator[tuple[int, Sample]]:
    """This rank's row, and where each of its pieces came from (whose ``row`` is that of the global batch)."""
    for row in rows:
        place = loader.rank + row * loader.world
        for sample in loader.samples([delivery.rows[place]]) if place < len(delivery.rows) else ():
            yield row, _at_row(sample, place)


def _at_row(sample: Sample, row: int) -> Sample:
    fields = {**sample.__dict__, "row": row}
    return Sample(**fields)


@torch.no_grad()
def batch_losses(step: TrainStep, batch: Batch) -> Tensor:
    """Nats of every target of this rank's rows with the weights as they are: ``[B, T]`` on the CPU.

    One forward pass, in evaluation mode, in micro-batches; waits for the device.
    """
    model, found = step.model, []
    with quiet(model), step.policy.compute(step.device):
        for part in batch.split(min(step.micro_rows or batch.rows, batch.rows)):
            part = part.to(step.device)
            hidden = model(part.tokens, part.documents, part.positions).hidden
            losses = token_losses(model, hidden.flatten(0, 1), part.targets.flatten())
            found.append(losses.view_as(part.targets).float().cpu())
    return torch.cat(found)


def explain(
    step: TrainStep, delivery: Delivery, loader: Loader, tokenizer: Tokenizer | None, samples: int
) -> list[dict[str, Any]]:
    """The documents of a batch that lose most, worst first: those an incident names.

    Losses are with the weights of now, which may have learnt from the batch since. Documents of other ranks' rows are
    theirs to explain.

    Returns:
        dicts with row, column, length, source, path, offset, start (``data.loader.Sample``), ``loss`` in nats per
        target and ``share`` of the rank's whole loss (``None`` when not finite), and the piece's beginning as ``text``.
    """
    losses, batch = batch_losses(step, delivery.batch), delivery.batch
    total = float(losses.nan_to_num(0.0).sum()) or 1.0
    found = []
    for row, sample in pieces(delivery, loader, range(batch.rows)):
        here = slice(sample.column, sample.column + sample.length)
        count = int((batch.targets[row, here] != IGNORE).sum())
        if count:
            nats = float(losses[row, here].sum())
            found.append((nats / count, nats / total, count, row, sample))
    found.sort(key=lambda f: _order(f[0], f[2]), reverse=True)
    return [_told(mean, share, batch, row, s, tokenizer) for mean, share, _, row, s in found[:samples]]


def worst(told: Iterable[dict[str, Any]], samples: int) -> list[dict[str, Any]]:
    """The worst of what several ranks' ``explain`` returned, worst first."""

    def order(sample: dict[str, Any]) -> tuple[bool, bool, float]:
        loss = sample["loss"]
        return _order(math.inf if loss is None else loss, sample["length"])

    return sorted(told, key=order, reverse=True)[:samples]


def _order(mean: float, count: int) -> tuple[bool, bool, float]:
    """What is not finite first, then by mean loss; very short pieces last, whose means say little."""
    return not math.isfinite(mean), count >= FEWEST, mean


def _told(
    loss: float, share: float, batch: Batch, row: int, sample: Sample, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    end = sample.column + min(sample.length, EXCERPT_TOKENS)
    ids = batch.tokens[row, sample.column : end].tolist()
    text = tokenizer.decode(ids)[:EXCERPT] if tokenizer is not None else " ".join(map(str, ids[:32]))
    return {
        "row": sample.row, "column": sample.column, "length": sample.length, "source": sample.source,
        "path": sample.path, "offset": sample.offset, "start": sample.start,
        "loss": loss if math.isfinite(loss) else None, "share": share if math.isfinite(share) else None,
        "text": text,
    }  # fmt: skip
