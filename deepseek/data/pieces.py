"""``Pieces``: what is in a batch, and what they are like, all at once in numpy.

Shape letters: N tokens of a batch, P pieces, F features, V vocabulary, H = 2 halves of the documents.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from deepseek.data.store import TokenStore

Array = npt.NDArray[Any]
FEATURES = ("surprise", "novel pairs", "token entropy", "length")
BUCKETS = 256  #: that a piece's tokens are counted in for its entropy
PAIRS = 1 << 20  #: bits of the table of pairs
FINGERPRINTS = 65_536  #: pieces that duplicates are looked for among


class Pieces(NamedTuple):
    """The pieces of a batch: targets ``tokens [N]``, and per piece ``[P]`` its place and where its tokens begin."""

    tokens: Array
    source: Array
    store: Array
    document: Array
    start: Array
    length: Array
    first: Array

    @property
    def half(self) -> Array:
        """0 or 1 for each piece, by its document."""
        return (self.document * np.int64(0x9E3779B1) + self.store) >> 13 & 1

    def sizes(self, stores: Sequence[TokenStore]) -> Array:
        """Targets of each piece's whole document."""
        found = np.empty(len(self.store))
        for i, held in enumerate(stores):
            here = self.store == i
            found[here] = held.records["length"][self.document[here]] - 1
        return found


class Familiar:
    """How frequent tokens are, and which pairs of neighbours there are, in each half of the documents.

    A document that took part in a table would look familiar for ever: each half is judged by the tables of the other.
    """

    def __init__(self, vocab: int) -> None:
        self.counts, self.pairs = np.zeros((2, vocab), np.int64), np.zeros((2, PAIRS), bool)
        self._surprise = np.zeros((2, vocab), np.float32)

    def learn(self, pieces: Pieces) -> None:
        """Add the pieces of a batch to the tables."""
        half, vocab = np.repeat(pieces.half, pieces.length), self.counts.shape[1]
        self.counts += np.bincount(half * vocab + pieces.tokens, minlength=2 * vocab).reshape(2, vocab)
        self.pairs[half[:-1], _pairs(pieces.tokens)] = True

    def settle(self) -> None:
        """The tables are done."""
        totals = self.counts.sum(1, keepdims=True) + 0.5 * self.counts.shape[1]
        self._surprise = np.log2(totals / (self.counts + 0.5)).astype(np.float32)

    def features(self, pieces: Pieces, stores: Sequence[TokenStore]) -> Array:
        """``FEATURES`` of each piece ``[P, F]``.

        Bits per token under the frequencies (half a count added to each token's), share of pairs that are not in the
        table, bits per token of the piece's own tokens, log2 of the document's tokens.
        """
        tokens, first, length = pieces.tokens, pieces.first, pieces.length
        other = np.repeat(1 - pieces.half, length)
        bits = np.take(self._surprise, other * self._surprise.shape[1] + tokens)
        surprise = np.add.reduceat(bits, first, dtype=np.float64) / length
        unknown = np.zeros(len(tokens))
        unknown[:-1] = ~np.take(self.pairs, other[:-1] * PAIRS + _pairs(tokens))
        unknown[first[1:] - 1] = 0.0  # the last token of a piece and the first of the next are no pair
        novel = np.add.reduceat(unknown, first) / np.maximum(length - 1, 1)
        size = np.log2(pieces.sizes(stores) + 1)
        return np.stack([surprise, novel, _entropies(tokens, length), size], 1)


class Fingerprints:
    """Which pieces have tokens that another piece had before: a rolling memory of hashes."""

    def __init__(self, vocab: int) -> None:
        draw = np.random.default_rng(0)
        self._of_token = draw.integers(0, 2**64, vocab, np.uint64)
        self._seen: OrderedDict[int, tuple[int, int, int]] = OrderedDict()

    def __call__(self, pieces: Pieces) -> Array:
        """bool ``[P]``."""
        at = np.arange(len(pieces.tokens), dtype=np.uint64) - np.repeat(pieces.first, pieces.length).astype(
            np.uint64
        )
        mixed = (self._of_token[pieces.tokens] ^ (at * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(
            0xBF58476D1CE4E5B9
        )
        hashes = np.add.reduceat(mixed ^ (mixed >> np.uint64(29)), pieces.first)
        keys = zip(pieces.store.tolist(), pieces.document.tolist(), pieces.start.tolist())
        return np.array([self._again(h, key) for h, key in zip(hashes.tolist(), keys)])

    def _again(self, fingerprint: int, key: tuple[int, int, int]) -> bool:
        before = self._seen.setdefault(fingerprint, key)
        if len(self._seen) > FINGERPRINTS:
            self._seen.popitem(last=False)
        return before != key


def entropy(tokens_N: Array) -> float:
    """Bits per token of all tokens together."""
    if not len(tokens_N):
        return 0.0
    counts = np.unique(tokens_N, return_counts=True)[1]
    return float(np.log2(len(tokens_N)) - (counts * np.log2(counts)).sum() / len(tokens_N))


def _pairs(tokens_N: Array) -> Array:
    """A number below ``PAIRS`` for every two neighbours ``[N - 1]``."""
    return ((tokens_N[:-1] * np.int64(0x9E3779B1)) ^ (tokens_N[1:] * np.int64(0x85EBCA77))) >> 7 & (PAIRS - 1)


def _entropies(tokens_N: Array, length_P: Array) -> Array:
    """Bits per token of each piece, its tokens counted in ``BUCKETS``."""
    piece = np.repeat(np.arange(len(length_P)) * BUCKETS, length_P)
    counts = np.bincount(piece + tokens_N % BUCKETS, minlength=len(length_P) * BUCKETS).reshape(-1, BUCKETS)
    table = np.arange(int(length_P.max()) + 1, dtype=np.float64)
    table[1:] *= np.log2(table[1:])
    return np.log2(length_P) - table[counts].sum(1) / length_P
