"""How far a window of values has moved from a reference: population stability index and Kolmogorov–Smirnov distance.

Both are figures of two samples, and both are above zero for two samples of the same thing. How far above depends on
their sizes and on how much values that belong together (pieces of one document) resemble each other. So the limit is
measured, not looked up: reference and window are drawn again from the reference, as the stream draws them.

Shape letters: N values, F features, D documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
#: Where the reference is cut: tenths, and both ends, in which what is foreign gathers.
QUANTILES = np.array([0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99])


class Histogram:
    """The bins of a sorted reference ``[N]`` (cut at its ``QUANTILES``) and its shares of them."""

    def __init__(self, reference_N: Array) -> None:
        n = len(reference_N)
        cuts = reference_N[np.ceil(QUANTILES * n).astype(np.int64) - 1]
        self.edges = cuts[np.append(True, cuts[1:] != cuts[:-1])]
        self.shares = self._shares(reference_N)

    def psi(self, window_N: Array) -> float:
        """Σ (q − p) ln(q / p) over the bins, of a sorted window: 0 for equal shares.

        Above 0.25 is customarily called a major shift. Half a value is added to every bin, so that an empty one is
        finite.
        """
        q, p = self._shares(window_N), self.shares
        return float(((q - p) * np.log(q / p)).sum())

    def _shares(self, sorted_N: Array) -> Array:
        """A bin holds what is above its lower edge, up to and with its upper one."""
        below = np.searchsorted(sorted_N, self.edges, "right")
        counts = np.diff(below, prepend=0, append=len(sorted_N)) + 0.5
        return counts / counts.sum()


def ks_distance(reference_N: Array, window_N: Array) -> float:
    """The largest difference between the empirical distribution functions of two sorted samples, in [0, 1]."""
    both = np.concatenate([reference_N, window_N])
    mine = np.searchsorted(reference_N, both, "right") / len(reference_N)
    other = np.searchsorted(window_N, both, "right") / len(window_N)
    return float(np.abs(mine - other).max())


@dataclass(frozen=True)
class Limits:
    """What ``psi`` and ``ks`` reach at most between samples of the same thing, per feature ``[F]``."""

    psi: Array
    ks: Array


def natural_limits(
    reference_NF: Array,
    document_N: Array,
    pieces_N: Array,
    pool: float,
    window: int,
    draws: int = 100,
    seed: int = 0,
) -> Limits:
    """The largest figures in ``draws`` comparisons of two samples of the stream that the reference comes from.

    Args:
        document_N: which document a value comes from. pieces_N: how many pieces that document has in all.
        pool: pieces that the stream shuffles together before it goes on with other documents; ``inf``: always the same
            documents. window: values in the sample that is compared.
    """
    random = np.random.default_rng(seed)
    stream = _Stream(document_N, pieces_N, pool)
    features = reference_NF.shape[1]
    psi, ks = np.zeros(features), np.zeros(features)
    for _ in range(draws):
        mine = np.sort(reference_NF[stream.draw(len(reference_NF), random)], axis=0)
        other = np.sort(reference_NF[stream.draw(window, random)], axis=0)
        for f in range(features):
            psi[f] = max(psi[f], Histogram(mine[:, f]).psi(other[:, f]))
            ks[f] = max(ks[f], ks_distance(mine[:, f], other[:, f]))
    return Limits(psi, ks)


class _Stream:
    """Draws samples as a packed and shuffled stream gives them: documents make a pool, pieces are taken from it.

    A document of many pieces is met in proportion to them; divided by their number, what was met says how documents
    are. A pool is drawn from those, and within it a document counts with all its pieces.
    """

    def __init__(self, document_N: Array, pieces_N: Array, pool: float) -> None:
        self._order = np.argsort(document_N, kind="stable")
        _, self._starts, self._met = np.unique(document_N[self._order], return_index=True, return_counts=True)
        self._pieces = pieces_N[self._order][self._starts].astype(np.float64)
        likely = self._met / self._pieces
        self._likely = likely / likely.sum()
        self._documents = pool / float(self._likely @ self._pieces)

    def draw(self, size: int, random: np.random.Generator) -> Array:
        """Places of ``size`` values."""
        weight = self._met.astype(np.float64)
        if np.isfinite(self._documents):
            weight = random.multinomial(max(1, round(self._documents)), self._likely) * self._pieces
        document = np.repeat(np.arange(len(weight)), random.multinomial(size, weight / weight.sum()))
        within = (random.random(size) * self._met[document]).astype(np.int64)
        return self._order[self._starts[document] + within]
