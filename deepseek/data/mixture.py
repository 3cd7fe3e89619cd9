"""Which document comes next: a weighted mixture without dice, over streams that never repeat before they are
through.

Each source is walked in an order given by a *stateless* permutation: the position of step i is computed, not
stored, so the state of a stream is two integers however large the corpus. Between sources, the one that is
furthest behind its share of tokens is drawn next; shares are therefore met at every moment, to within one
document.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek.errors import ConfigError, DataError

Int = npt.NDArray[np.int64]
_ROUNDS = 4


@dataclass(frozen=True)
class Permutation:
    """A seeded permutation of ``range(n)`` whose values are computed on demand.

    A Feistel network over the next power of four, with cycle walking back into range (Black and Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains").
    """

    n: int
    key: bytes

    def __call__(self, index: npt.NDArray[Any]) -> Int:
        """Values at ``index`` (int, each in ``[0, n)``), int64."""
        half = max(1, ((self.n - 1).bit_length() + 1) // 2)
        keys = np.frombuffer(hashlib.blake2b(self.key, digest_size=8 * _ROUNDS).digest(), "<u8")
        value = self._feistel(index.astype(np.uint64), half, keys)
        while (outside := value >= self.n).any():
            value[outside] = self._feistel(value[outside], half, keys)
        return value.astype(np.int64)

    @staticmethod
    def _feistel(value: npt.NDArray[np.uint64], half: int, keys: Any) -> npt.NDArray[np.uint64]:
        mask = np.uint64((1 << half) - 1)
        left, right = value >> np.uint64(half), value & mask
        for key in keys:
            mixed = right + key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        return (left << np.uint64(half)) | right


@dataclass
class Cursor:
    """Where a mixture stands: per source the epoch, the position in it, and the tokens drawn so far."""

    epoch: list[int]
    position: list[int]
    drawn: list[int]

    def copy(self) -> Cursor:
        return Cursor(list(self.epoch), list(self.position), list(self.drawn))


class Mixture:
    """An endless stream of documents of several sources.

    Args:
        sizes: per source, the tokens (targets) of each of its documents.
        weights: per source, its share of tokens; relative. Sources of weight 0 or without documents never
            come.
        seed: of the permutations.
        shuffle: whether each epoch of a source has an order of its own; else documents come in stored order.
    """

    def __init__(
        self, sizes: list[npt.NDArray[Any]], weights: list[float], seed: int, *, shuffle: bool = True
    ) -> None:
        if len(sizes) != len(weights):
            raise ConfigError(f"{len(weights)} weights for {len(sizes)} sources")
        if any(not 0 <= w < float("inf") for w in weights):
            raise ConfigError(f"mixture weights must be finite and >= 0, not {weights}")
        self._sizes, self._seed, self._shuffle = sizes, seed, shuffle
        self.active = [i for i, (s, w) in enumerate(zip(sizes, weights)) if w > 0 and len(s)]
        if not self.active:
            raise DataError("the mixture is empty: every source has weight 0 or no documents")
        total = sum(weights[i] for i in self.active)
        self._share = [weights[i] / total if i in self.active else 0.0 for i in range(len(sizes))]
        self._chunk: dict[int, tuple[int, int, Int]] = {}

    def start(self) -> Cursor:
        """The cursor before the first document."""
        zeros = [0] * len(self._sizes)
        return Cursor(list(zeros), list(zeros), list(zeros))

    def take(self, cursor: Cursor, tokens: int) -> tuple[Int, Int, Cursor]:
        """Documents of at least ``tokens`` tokens together.

        A mixture of one source stops at the end of an epoch, so that epochs never share a packing window.

        Returns:
            The source of each document, its index within the source (both ``[documents]`` int64), and the
            cursor after them.
        """
        cursor = cursor.copy()
        sources: list[int] = []
        documents: list[int] = []
        taken, total = 0, sum(cursor.drawn)
        while taken < tokens:
            source = max(self.active, key=lambda i: self._share[i] * total - cursor.drawn[i])
            document = self._next(source, cursor)
            size = int(self._sizes[source][document])
            sources.append(source)
            documents.append(document)
            cursor.drawn[source] += size
            taken, total = taken + size, total + size
            if len(self.active) == 1 and cursor.position[source] == 0:
                break
        return np.array(sources, np.int64), np.array(documents, np.int64), cursor

    def _next(self, source: int, cursor: Cursor) -> int:
        epoch, position = cursor.epoch[source], cursor.position[source]
        document = self._at(source, epoch, position)
        cursor.position[source] += 1
        if cursor.position[source] == len(self._sizes[source]):
            cursor.epoch[source], cursor.position[source] = epoch + 1, 0
        return document

    def _at(self, source: int, epoch: int, position: int) -> int:
        if not self._shuffle:
            return position
        block = position // 4096
        held = self._chunk.get(source)
        if held is None or held[:2] != (epoch, block):
            n = len(self._sizes[source])
            index = np.arange(block * 4096, min(n, (block + 1) * 4096))
            order = Permutation(n, f"{self._seed}/{source}/{epoch}".encode())(index)
            self._chunk[source] = held = (epoch, block, order)
        return int(held[2][position - block * 4096])
