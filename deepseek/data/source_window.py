"""``SourceWindow``: the reference of one source, the window that is compared with it, and what is counted meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek.config import configclass
from deepseek.data.pieces import FEATURES, entropy
from deepseek.data.shift import Histogram, Limits, ks_distance, natural_limits
from deepseek.errors import ConfigError

Array = npt.NDArray[Any]
MAJOR = 0.25  #: PSI that is customarily called a major shift
MOST_FOREIGN = 5  #: documents that an alert names


@configclass
class QualityConfig:
    """How closely the data are watched.

    Attributes:
        reference: batches that the reference is made of.
        window: pieces of a source that are compared with it.
        least: pieces that the reference of a source must have; a rare source collects until it has.
        every: batches between two comparisons.
        psi: below this nothing is called a drift, whatever the limits measured.
        margin: times the largest figure between healthy samples; above it is a drift.
        sustain: comparisons one after the other that must say so.
    """

    reference: int = 64
    window: int = 512
    least: int = 128
    every: int = 10
    psi: float = MAJOR
    margin: float = 1.5
    sustain: int = 3

    def check(self) -> None:
        for name in ("reference", "window", "least", "every", "sustain"):
            if getattr(self, name) < (2 if name == "reference" else 1):
                raise ConfigError(f"quality.{name}={getattr(self, name)} is too small")
        if self.psi <= 0 or self.margin < 1:
            raise ConfigError(
                f"quality.psi={self.psi} must be above 0 and quality.margin={self.margin} at least 1"
            )


@dataclass(frozen=True)
class SourceQuality:
    """One source, over its window.

    Attributes:
        share: of the tokens since the last comparison. length: mean tokens of the documents. entropy: bits per token of
            its tokens in the last batch. duplicates: share of pieces whose very tokens were seen before elsewhere.
        psi, ks: of the feature that is farthest out, ``None`` before there is a reference and a full window.
        limit: the PSI of it from which on it is a drift: 0.25 or, where healthy samples reach so far, more.
        language: share of pieces in the commonest language so far, of the last ``LANGUAGES``; ``None``: not told.
    """

    share: float
    length: float
    entropy: float
    duplicates: float
    psi: float | None = None
    ks: float | None = None
    limit: float | None = None
    feature: str | None = None
    language: float | None = None

    def to_dict(self) -> dict[str, float]:
        """What is known, for a chart; ``psi`` on the scale on which ``MAJOR`` is the limit."""
        names = ("share", "length", "entropy", "duplicates", "language")
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.psi is not None and self.limit is not None:
            found["psi"] = self.psi * MAJOR / self.limit
        return found


class SourceWindow:
    """What is known of one source: a reference once there is one, the window, and counts since the last report."""

    def __init__(self, config: QualityConfig) -> None:
        self.config = config
        self.reference: Array | None = None
        self.places: Array = np.empty((0, 3), np.int64)  # store, document, pieces of the document
        self.pool = float("inf")  #: pieces of this source that the stream shuffles together
        self.all_tokens = self.all_pieces = 0
        self.near: Limits | None = None  #: among the documents that the reference was shuffled with
        self.far: Limits | None = None  #: among others, which come later
        self.limits: Limits | None = None  #: those that hold now
        self._collected: list[tuple[Array, Array]] = []
        self._over = 0
        self._told = False
        self.psi: Array | None = None
        self.forget_period()

    def forget_period(self) -> None:
        self.tokens, self._pieces, self._length, self._again = 0, 0, 0.0, 0

    def add(self, tokens: int, sizes: Array, again: Array) -> None:
        self.all_tokens, self.all_pieces = self.all_tokens + tokens, self.all_pieces + len(sizes)
        self.tokens, self._pieces = self.tokens + tokens, self._pieces + len(sizes)
        self._length, self._again = self._length + float(sizes.sum()), self._again + int(again.sum())

    def describe(self, values: Array, places: Array) -> None:
        """Pieces' figures, for the reference or, once there is one, the window."""
        if self.reference is None:
            self._collected.append((values, places))
            return
        n = len(self._window)
        at = (self._filled + np.arange(len(values))) % n
        self._window[at], self._where[at] = values, places
        self._filled += len(values)

    def finish(self, least: int) -> None:
        """Make the reference of what was collected, if that is enough."""
        if self.reference is None and sum(len(v) for v, _ in self._collected) >= max(least, 2):
            self.settle(*(np.concatenate(part) for part in zip(*self._collected)))
            self._collected = []

    def settle(self, reference: Array, places: Array) -> None:
        self.reference, self.places = reference, places
        n = min(self.config.window, len(reference))
        self._window, self._where = np.zeros((n, len(FEATURES))), np.zeros((n, 3), np.int64)
        self._filled = 0
        self._sorted = [np.sort(column) for column in reference.T]
        self._histograms = [Histogram(column) for column in self._sorted]
        document = np.unique(places[:, :2], axis=0, return_inverse=True)[1].reshape(-1)
        self.near = self.limits = natural_limits(reference, document, places[:, 2], float("inf"), n)
        self.far = self.near
        if np.isfinite(self.pool):
            self.far = natural_limits(reference, document, places[:, 2], self.pool, n)

    def compare(self) -> tuple[Array, Array] | None:
        """PSI and KS distance of the window, per feature; ``None`` before it is full."""
        if self.reference is None or self._filled < len(self._window):
            return None
        columns = [np.sort(column) for column in self._window.T]
        psi = np.array([h.psi(column) for h, column in zip(self._histograms, columns)])
        return psi, np.array([ks_distance(s, column) for s, column in zip(self._sorted, columns)])

    def quality(self, total: int, tokens: Array, language: float | None) -> SourceQuality:
        self.compared = self.compare()
        told = (
            self.tokens / total,
            self._length / self._pieces,
            entropy(tokens),
            self._again / self._pieces,
        )
        if self.compared is None:
            return SourceQuality(*told, language=language)
        psi, ks = self.compared
        limit = self._limit()
        worst = int((psi / limit).argmax())
        figures = (float(psi[worst]), float(ks[worst]), float(limit[worst]))
        return SourceQuality(*told, *figures, FEATURES[worst], language)

    def _limit(self) -> Array:
        """The PSI from which on it is a drift, per feature."""
        assert self.limits is not None
        return np.maximum(self.config.psi, self.config.margin * self.limits.psi)

    def drift(self) -> tuple[int, float, float] | None:
        """Feature, PSI and KS distance of a drift that is new, after the figures have lasted."""
        if self.compared is None or self.limits is None:
            return None
        psi, ks = self.compared
        excess = np.maximum(psi / self._limit(), ks / np.minimum(1.0, self.config.margin * self.limits.ks))
        worst = int(excess.argmax())
        self._over = self._over + 1 if excess[worst] > 1 else 0
        self._told = self._told and self._over > 0
        if self._over < self.config.sustain or self._told:
            return None
        self._told = True
        return worst, float(psi[worst]), float(ks[worst])

    def beyond(self, feature: int) -> float:
        """Share of the window outside the middle 98% of the reference."""
        low, high = np.quantile(self._sorted[feature], [0.01, 0.99])
        window = self._window[:, feature]
        return float(((window < low) | (window > high)).mean())

    def most_foreign(self, feature: int) -> list[tuple[int, int, float]]:
        """Store, document and value of the pieces that lie farthest out, on the side to which the window moved."""
        window, reference = self._window[:, feature], self._sorted[feature]
        sign = 1.0 if window.mean() >= reference.mean() else -1.0
        found: dict[tuple[int, int], float] = {}
        for i in np.argsort(-sign * window):
            found.setdefault((int(self._where[i, 0]), int(self._where[i, 1])), float(window[i]))
            if len(found) == MOST_FOREIGN:
                break
        return [(store, document, value) for (store, document), value in found.items()]
