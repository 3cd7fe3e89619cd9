"""Drift of a stream that should stay as it is: ADWIN, Page-Hinkley, and distances between two samples.

``drift_detector`` takes River's where it is installed (the extra ``detect``), else the ones here:
the same published algorithms, small. Both are told one value at a time and answer whether the stream has changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from deepseek.data.shift import Histogram, ks_distance
from deepseek.errors import ConfigError, DataError, MissingExtraError

Method = Literal["adwin", "page_hinkley"]
Backend = Literal["auto", "river", "own"]
Floats = NDArray[np.float64]


class DriftDetector(Protocol):
    """``update(value)``: whether the stream has changed, told at the value that shows it."""

    def update(self, value: float) -> bool: ...


def drift_detector(method: Method = "adwin", backend: Backend = "auto", **options: float) -> DriftDetector:
    """A drift detector.

    Args:
        backend: 'river', 'own', or whichever is there. options: ``delta`` of ADWIN; ``delta``, ``threshold`` and
            ``least`` of Page-Hinkley.

    Raises:
        MissingExtraError: River was asked for and is not installed.
        ConfigError: the method is unknown.
    """
    if method not in ("adwin", "page_hinkley"):
        raise ConfigError(f"unknown drift method {method!r}; one of adwin, page_hinkley")
    if backend != "own":
        try:
            return _River(method, **options)
        except ImportError as error:
            if backend == "river":
                raise MissingExtraError("river", "detect", f"drift detection by River's {method}") from error
    return Adwin(**options) if method == "adwin" else PageHinkley(**options)


class _River:
    """River's detector behind our one method."""

    def __init__(self, method: Method, **options: float) -> None:
        from river import drift

        if method == "adwin":
            self._inner: Any = drift.ADWIN(**options)
        else:
            renamed = {"delta": "delta", "threshold": "threshold", "least": "min_instances"}
            self._inner = drift.PageHinkley(mode="both", **{renamed[k]: v for k, v in options.items()})

    def update(self, value: float) -> bool:
        self._inner.update(value)
        return bool(self._inner.drift_detected)


class PageHinkley:
    """The cumulative distance from the running mean, in both directions (Page 1954; Hinkley 1971).

    Args:
        delta: what is forgiven a value. threshold: of the distance. least: values before the first answer.
    """

    def __init__(self, delta: float = 0.005, threshold: float = 50.0, least: float = 30) -> None:
        self.delta, self.threshold, self.least = delta, threshold, least
        self._reset()

    def _reset(self) -> None:
        self.count, self.mean = 0, 0.0
        self.up = self.down = self.lowest = self.highest = 0.0

    def update(self, value: float) -> bool:
        self.count += 1
        self.mean += (value - self.mean) / self.count
        self.up += value - self.mean - self.delta
        self.down += value - self.mean + self.delta
        self.lowest, self.highest = min(self.lowest, self.up), max(self.highest, self.down)
        far = max(self.up - self.lowest, self.highest - self.down)
        if self.count < self.least or far <= self.threshold:
            return False
        self._reset()
        return True


class Adwin:
    """Adaptive windowing (Bifet and Gavaldà, SDM 2007): the window is cut where its two parts have different means.

    The window is an exponential histogram: up to ``BUCKETS`` buckets of each power of two, so that memory and time are
    logarithmic in its length.

    Args:
        delta: chance that a stream without change is cut. clock: values between two looks.
    """

    BUCKETS = 5
    SHORTEST = 5  #: values on either side of a cut
    GRACE = 10  #: values before the first look

    def __init__(self, delta: float = 0.002, clock: float = 32) -> None:
        if not 0 < delta < 1:
            raise ConfigError(f"ADWIN's delta={delta} is a probability, between 0 and 1")
        self.delta, self.clock = delta, int(clock)
        self.rows: list[list[tuple[float, float]]] = [
            []
        ]  # row k: (sum, variance sum) of buckets of 2^k, oldest first
        self.ticks = 0

    @property
    def width(self) -> int:
        """How many values are in the window."""
        return sum(len(row) << k for k, row in enumerate(self.rows))

    @property
    def mean(self) -> float:
        return sum(total for row in self.rows for total, _ in row) / max(self.width, 1)

    def update(self, value: float) -> bool:
        self.ticks += 1
        self.rows[0].append((value, 0.0))
        self._compress()
        if self.ticks % self.clock or self.width <= self.GRACE:
            return False
        changed = False
        while old := self._cut():
            changed = True
            for _ in range(old):
                self._drop_oldest()
        return changed

    def _compress(self) -> None:
        for k in range(len(self.rows)):
            if len(self.rows[k]) <= self.BUCKETS:
                return
            (a, va), (b, vb) = self.rows[k][:2]
            del self.rows[k][:2]
            size = float(1 << k)
            between = (a - b) ** 2 / (2 * size)
            if k + 1 == len(self.rows):
                self.rows.append([])
            self.rows[k + 1].append((a + b, va + vb + between))

    def _drop_oldest(self) -> None:
        del self.rows[-1][0]
        while len(self.rows) > 1 and not self.rows[-1]:
            self.rows.pop()

    def _buckets(self) -> list[tuple[int, float, float]]:
        """Size, sum and variance sum of every bucket, the oldest first."""
        return [(1 << k, s, v) for k in range(len(self.rows) - 1, -1, -1) for s, v in self.rows[k]]

    def _cut(self) -> int:
        """How many of the oldest buckets are of another mean than the rest, beyond chance: at the clearest cut."""
        buckets = self._buckets()
        n, total = max(sum(b[0] for b in buckets), 2), sum(b[1] for b in buckets)
        best, old = 1.0, 0
        mean = total / n
        variance = sum(v + size * (s / size - mean) ** 2 for size, s, v in buckets) / n
        log = math.log(2 * math.log(n) / self.delta)
        n0, s0 = 0, 0.0
        for k, (size, s, _) in enumerate(buckets[:-1], 1):
            n0, s0 = n0 + size, s0 + s
            n1 = n - n0
            if n0 < self.SHORTEST or n1 < self.SHORTEST:
                continue
            m = 1 / (1 / (n0 - self.SHORTEST + 1) + 1 / (n1 - self.SHORTEST + 1))
            bound = math.sqrt(2 / m * variance * log) + 2 / (3 * m) * log
            clear = abs(s0 / n0 - (total - s0) / n1) / bound if bound else 0.0
            if clear > best:
                best, old = clear, k
        return old


def psi(reference: Sequence[float] | Floats, window: Sequence[float] | Floats) -> float:
    """Population stability index of two samples of one figure, over the reference's deciles and tails.

    Below 0.1 is customarily called stable, above 0.25 a major shift; small samples lie above zero by chance
    (``deepseek.data.shift`` measures by how much).

    Raises:
        DataError: a sample is empty or not finite.
    """
    a, b = _sample(reference, "reference"), _sample(window, "window")
    return Histogram(np.sort(a)).psi(np.sort(b))


def ks(reference: Sequence[float] | Floats, window: Sequence[float] | Floats) -> tuple[float, float]:
    """Two-sample Kolmogorov-Smirnov distance and the chance of one at least so large between samples of one thing.

    The chance is Kolmogorov's series with Stephens' correction for small samples (1970).

    Raises:
        DataError: a sample is empty or not finite.
    """
    a, b = np.sort(_sample(reference, "reference")), np.sort(_sample(window, "window"))
    distance = ks_distance(a, b)
    root = math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    x = (root + 0.12 + 0.11 / root) * distance
    if x < 0.2:
        return distance, 1.0
    k = np.arange(1, 101)
    return distance, float(np.clip(2 * ((-1.0) ** (k - 1) * np.exp(-2 * k**2 * x * x)).sum(), 0.0, 1.0))


def _sample(values: Sequence[float] | Floats, what: str) -> Floats:
    sample = np.asarray(values, np.float64).ravel()
    if not len(sample) or not np.isfinite(sample).all():
        raise DataError(
            f"the {what} has {len(sample)} values, {int((~np.isfinite(sample)).sum())} of them not finite; it needs at "
            "least one, and all finite"
        )
    return sample
