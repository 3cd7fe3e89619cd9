"""``Batch``: the noun that crosses packages. Data makes it, the model and the losses read it.

Shape letters: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from deepseek.errors import ConfigError

IGNORE = -100  #: target value that no loss counts: padding and positions without a next token


@dataclass(frozen=True)
class Batch:
    """A rectangle of packed documents.

    Attributes:
        tokens: ``[B, T]`` int64, input token ids.
        targets: ``[B, T]`` int64, the next token of the same document, or ``IGNORE``.
        documents: ``[B, T]`` int32, id of the document a position belongs to, unique in its row and
            contiguous; ``-1`` marks padding. Attention never crosses documents. ``None`` means that each row
            is one document.
        positions: ``[B, T]`` int32, offset inside the document's piece in this row; ``None``: ``0..T-1``.
        n_targets: how many targets are counted (not ``IGNORE``).
        n_bytes: how many bytes of text those targets stand for, the unit of bits per byte.
        starts: ``[B, M]`` int32, where the runs of equal ``documents`` of each row start, in order, and T in the slots
            that a row does not need; ``None``: nobody counted them on the host, which some kernels need.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None = None
    positions: Tensor | None = None
    n_targets: int = 0
    n_bytes: int = 0
    starts: Tensor | None = None

    @classmethod
    def from_rows(cls, rows: Tensor) -> Batch:
        """A batch of unpacked rows ``[B, T + 1]``: inputs are ``rows[:, :-1]``, targets ``rows[:, 1:]``."""
        rows = rows.long()
        targets = rows[:, 1:].contiguous()
        return cls(rows[:, :-1].contiguous(), targets, n_targets=targets.numel(), n_bytes=targets.numel())

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def split(self, rows: int) -> Iterator[Batch]:
        """Micro-batches of at most ``rows`` rows; ``n_targets`` and ``n_bytes`` stay those of the
        whole batch.

        Raises:
            ConfigError: ``rows`` is not positive.
        """
        if rows < 1:
            raise ConfigError(f"a micro-batch has at least 1 row, not {rows}")
        for start in range(0, self.rows, rows):
            yield self.part(start, rows)

    def part(self, first: int, rows: int) -> Batch:
        """Rows ``[first, first + rows)``, views; ``n_targets`` and ``n_bytes`` stay those of the whole batch."""
        cut: dict[str, Any] = {
            f.name: value[first : first + rows]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **cut)
