"""De-duplication: exact by a hash of the normalised text, near by MinHash and locality-sensitive hashing.

A document is compared with those kept before it; the first one stays. Near duplicates (Broder 1997; Lee et
al. 2022, "Deduplicating Training Data Makes Language Models Better") are documents whose sets of word 5-grams
have a Jaccard similarity of at least ``threshold``. The sketch and the index come from the library ``rensa``;
since both only *suggest*, every suggested pair is checked on the full sets, which lie in a temporary file,
not in memory.
"""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from deepseek.config import configclass
from deepseek.data.clean import WORD
from deepseek.data.source import Document
from deepseek.errors import ConfigError, MissingExtraError

Shingles = npt.NDArray[np.uint64]


@configclass
class DedupConfig:
    """Which duplicates are dropped.

    Attributes:
        exact: drop texts that are equal but for case and blanks.
        near: drop texts whose shingles are similar (extra ``[data]``).
        threshold: Jaccard similarity from which two texts count as duplicates.
        ngram: words in a shingle; a Chinese, Japanese or Korean character counts as a word.
        permutations: length of a sketch; a power of two of at least 16.
        seed: of the sketch.
    """

    exact: bool = True
    near: bool = False
    threshold: float = 0.8
    ngram: int = 5
    permutations: int = 128
    seed: int = 0

    def check(self) -> None:
        if not 0 < self.threshold <= 1 or self.ngram < 1:
            raise ConfigError(
                f"dedup needs 0 < threshold <= 1 and ngram >= 1, not {self.threshold} and {self.ngram}"
            )
        if self.permutations < 16 or self.permutations & (self.permutations - 1):
            raise ConfigError(f"dedup.permutations={self.permutations} must be a power of two of at least 16")


@dataclass(frozen=True)
class Duplicate:
    """A document that was dropped, the one kept instead, and how alike they are (1.0 when exact)."""

    dropped: str
    kept: str
    kind: str
    similarity: float


class Deduplicator:
    """``check(document)`` gives the ``Duplicate`` that ``document`` is, or keeps it and gives ``None``."""

    def __init__(self, config: DedupConfig, keep: int = 1000) -> None:
        self._config, self._keep = config, keep
        self.counts: Counter[str] = Counter()
        self.examples: list[Duplicate] = []
        self._seen: dict[bytes, str] = {}
        self._near = _NearIndex(config) if config.near else None

    def check(self, document: Document) -> Duplicate | None:
        found = self._check(document)
        if found is not None:
            self.counts[found.kind] += 1
            if len(self.examples) < self._keep:
                self.examples.append(found)
        return found

    def _check(self, document: Document) -> Duplicate | None:
        if self._config.exact:
            key = hashlib.blake2b(" ".join(document.text.lower().split()).encode(), digest_size=16).digest()
            kept = self._seen.setdefault(key, document.id)
            if kept != document.id:
                return Duplicate(document.id, kept, "exact", 1.0)
        return self._near.check(document) if self._near is not None else None

    def summary(self) -> dict[str, Any]:
        """Plain values for reports: counts per kind and the first pairs."""
        return {"counts": dict(self.counts), "examples": [vars(e) for e in self.examples]}


class _NearIndex:
    def __init__(self, config: DedupConfig) -> None:
        try:
            import rensa
        except ImportError:
            raise MissingExtraError("rensa", "data", "near de-duplication") from None
        self._config, self._rensa = config, rensa
        bands = bands_for(config.threshold, config.permutations)
        self._index: Any = rensa.RMinHashLSH(config.threshold, config.permutations, bands)
        spill = tempfile.TemporaryFile(prefix="deepseek-dedup-")  # noqa: SIM115 - closed with the index
        self._file = cast("IO[bytes]", spill)
        weakref.finalize(self, spill.close)
        self._kept: list[tuple[str, int, int]] = []  # id, first byte in the file, shingles

    def check(self, document: Document) -> Duplicate | None:
        words = shingle(document.text, self._config.ngram)
        sketch = self._rensa.RMinHash(self._config.permutations, self._config.seed)
        sketch.update(words)
        hashes = np.unique(np.array(self._rensa.RMinHash.hash_token_sets([words])[0], np.uint64))
        best = max(((self._similarity(hashes, k), -k) for k in self._index.query(sketch)), default=(0.0, 0))
        if best[0] >= self._config.threshold:
            return Duplicate(document.id, self._kept[-best[1]][0], "near", best[0])
        self._index.insert(len(self._kept), sketch)
        self._file.seek(0, 2)
        self._kept.append((document.id, self._file.tell(), len(hashes)))
        self._file.write(hashes.tobytes())
        return None

    def _similarity(self, hashes: Shingles, key: int) -> float:
        _, start, size = self._kept[key]
        self._file.seek(start)
        other = np.frombuffer(self._file.read(size * 8), np.uint64)
        shared = len(np.intersect1d(hashes, other, assume_unique=True))
        return shared / max(1, len(hashes) + size - shared)


def shingle(text: str, n: int) -> list[str]:
    """The distinct word n-grams of ``text``, lower-case; a shorter text is one shingle."""
    words = WORD.findall(text.lower())
    if len(words) <= n:
        return [" ".join(words)]
    return list(dict.fromkeys(map(" ".join, zip(*(words[i:] for i in range(n))))))


def bands_for(threshold: float, permutations: int) -> int:
    """The fewest bands that suggest a pair at ``threshold`` with probability of at least 0.999."""
    rows = permutations
    while rows > 1:
        bands = permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= 0.999:
            return bands
        rows //= 2
    return permutations
