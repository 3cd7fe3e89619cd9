"""What is usual for one figure of a training loop, and whether its newest value is.

Usual is a line through the last values (Tukey's resistant line: it follows a loss that falls, and outliers do not bend
it) and the spread around it (the median absolute deviation). Unusual is what lies far off several times in a row, or
very far off once. The classes are those of source document 2, section 4.2.
"""

from __future__ import annotations

import math
import time as clock
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from deepseek.errors import ConfigError

Bad = Literal["up", "down", "both"]
MAD = 1.4826  #: the standard deviation of a normal distribution by its median absolute deviation


class Keeper(ABC):
    """Knows what is usual for one figure."""

    @abstractmethod
    def update(self, value: Any) -> None:
        """Take the newest value."""

    @abstractmethod
    def is_anomalous(self) -> bool:
        """Whether the newest value is part of something unusual."""

    @property
    @abstractmethod
    def value(self) -> float:
        """The figure now; NaN before the first."""

    @property
    @abstractmethod
    def expected(self) -> float:
        """What would have been usual; NaN while that is not known."""

    @property
    def score(self) -> float:
        """How far off, in spreads."""
        return 0.0

    @property
    def detail(self) -> str:
        """What else there is to say of an anomaly."""
        return ""

    def figures(self, name: str) -> dict[str, float]:
        """What the run's store keeps of it."""
        return {name: self.value}


class MovingAverage(Keeper):
    """The mean of the last ``window`` values, and whether the newest fit.

    Args:
        bad: which way is bad. threshold: spreads off that are unusual when they happen ``sustain`` times in a row.
        spike: spreads off that are unusual at once. relative: the spread is at least this share of the usual value.
        warmup: values before anything is judged.

    NaN and infinities are unusual at once and never part of what is usual. A value that stays off for half a window
    is the new usual.

    Raises:
        ConfigError: the numbers make no sense.
    """

    def __init__(
        self,
        window: int = 100,
        *,
        bad: Bad = "both",
        threshold: float = 6.0,
        sustain: int = 3,
        spike: float = 30.0,
        relative: float = 5e-3,
        warmup: int = 20,
    ) -> None:
        if window < 8 or not 4 <= warmup <= window or sustain < 1 or not 0 < threshold <= spike:
            raise ConfigError(
                f"window={window} must be at least 8, warmup={warmup} between 4 and window, sustain={sustain} at least "
                f"1, and threshold={threshold} positive and not above spike={spike}"
            )
        self.window, self.bad, self.threshold, self.sustain = window, bad, threshold, sustain
        self.spike, self.relative, self.warmup = spike, relative, warmup
        self._recent: deque[float] = deque(maxlen=window)  #: every finite value
        self._usual: deque[float] = deque(maxlen=window)
        self._odd: list[float] = []  #: the values that are off at the moment
        self._value, self._expected, self._score, self._bad_now = math.nan, math.nan, 0.0, False

    @property
    def value(self) -> float:
        return self._value

    @property
    def mean(self) -> float:
        """The moving average."""
        return math.fsum(self._recent) / len(self._recent) if self._recent else math.nan

    @property
    def expected(self) -> float:
        return self._expected

    @property
    def score(self) -> float:
        return self._score

    def update(self, value: Any) -> None:
        """Take a number (or a tensor of one)."""
        self._value = number = float(value)
        if not math.isfinite(number):
            self._score, self._bad_now = math.inf, True
            return
        self._recent.append(number)
        self._score = self._distance(number)
        if abs(self._score) <= self.threshold:
            self._usual.append(number)
            self._odd.clear()
            self._bad_now = False
            return
        self._odd.append(number)
        far = self._score if self.bad == "up" else -self._score if self.bad == "down" else abs(self._score)
        self._bad_now = far >= self.spike or (far > 0 and len(self._odd) >= self.sustain)
        if len(self._odd) > self.window // 2:
            self._usual.clear()
            self._usual.extend(self._odd)
            self._odd.clear()

    def is_anomalous(self) -> bool:
        return self._bad_now

    def _distance(self, number: float) -> float:
        """Spreads from the line through the usual values to ``number``; 0 while there are too few."""
        if len(self._usual) < self.warmup:
            self._expected = math.nan
            return 0.0
        values = np.array(self._usual)
        half = len(values) // 2
        early, late = float(np.median(values[:half])), float(np.median(values[half:]))
        slope = (late - early) / (len(values) / 2)
        middle = len(values) - (len(values) - half) / 2  # where ``late`` stands
        line = late + slope * (np.arange(len(values)) - middle)
        spread = MAD * float(np.median(np.abs(values - line)))
        self._expected = late + slope * (len(values) + len(self._odd) - middle)
        spread = max(spread, self.relative * abs(self._expected), 1e-12)
        return (number - self._expected) / spread


class RateCounter(Keeper):
    """Amounts per second: ``update(n)`` says that ``n`` more (tokens, samples) are done.

    Args:
        window: updates that the rate and what is usual are over. cumulative: ``update`` gets the total instead.
        drop: the share of the usual rate that must be missing, ``sustain`` times in a row, to be unusual.
        clock: seconds.

    For a rate that is known already use ``MovingAverage``.
    """

    def __init__(
        self,
        window: int = 100,
        *,
        cumulative: bool = False,
        drop: float = 0.4,
        sustain: int = 3,
        clock: Callable[[], float] = clock.monotonic,
    ) -> None:
        if not 0 < drop < 1:
            raise ConfigError(f"drop={drop} is a share of the rate, between 0 and 1")
        self.cumulative, self.clock = cumulative, clock
        threshold = 6.0
        self._rates = MovingAverage(
            window,
            bad="down",
            threshold=threshold,
            sustain=sustain,
            spike=1e9,
            relative=drop / threshold,
            warmup=8,
        )
        self._amounts: deque[tuple[float, float]] = deque(maxlen=window)  #: (amount, seconds) of each update
        self._last: tuple[float, float] | None = None  #: total and time
        self.total = 0.0

    def update(self, value: Any) -> None:
        """``value``: how many since the last update (of a ``cumulative`` counter: in all)."""
        now, number = self.clock(), float(value)
        amount = number - self.total if self.cumulative else number
        self.total += amount
        if self._last is not None:
            seconds = max(now - self._last[1], 1e-9)
            self._amounts.append((amount, seconds))
            self._rates.update(amount / seconds)
        self._last = self.total, now

    @property
    def value(self) -> float:
        """The rate of the newest update, per second; NaN before the second."""
        return self._rates.value

    @property
    def mean(self) -> float:
        """The rate over the window."""
        seconds = sum(s for _, s in self._amounts)
        return sum(a for a, _ in self._amounts) / seconds if seconds else math.nan

    @property
    def expected(self) -> float:
        return self._rates.expected

    @property
    def score(self) -> float:
        return self._rates.score

    def is_anomalous(self) -> bool:
        return self._rates.is_anomalous()


class MultiGPUAggregator(Keeper):
    """One value for each of several devices: their mean, and which of them leave the others.

    ``update`` takes a list, a tensor or array, or a mapping from device to value; a number is one device. A device is
    unusual when it is more than ``apart`` (a share of the devices' median) away from the median ``sustain`` times in a
    row; all together are when their mean is, as in ``MovingAverage``.
    """

    def __init__(self, window: int = 100, *, apart: float = 0.3, sustain: int = 3, bad: Bad = "both") -> None:
        if not apart > 0:
            raise ConfigError(f"apart={apart} must be positive")
        self.apart, self.sustain = apart, sustain
        self._means = MovingAverage(window, bad=bad, sustain=sustain, relative=apart / 6)
        self.values: dict[str, float] = {}
        self._odd: dict[str, int] = {}

    def update(self, value: Any) -> None:
        self.values = _by_device(value)
        finite = [v for v in self.values.values() if math.isfinite(v)]
        middle = float(np.median(finite)) if finite else math.nan
        odd = {}
        for device, one in self.values.items():
            off = not math.isfinite(one) or (
                len(finite) > 1 and abs(one - middle) > self.apart * max(abs(middle), 1e-12)
            )
            if off:
                odd[device] = self._odd.get(device, 0) + 1
        self._odd = odd
        self._means.update(math.fsum(finite) / len(finite) if finite else math.nan)

    @property
    def outliers(self) -> list[str]:
        """The devices that are unusual now."""
        return [d for d, n in self._odd.items() if n >= self.sustain or not math.isfinite(self.values[d])]

    @property
    def value(self) -> float:
        """The mean over the devices."""
        return self._means.value

    @property
    def expected(self) -> float:
        return self._means.expected

    @property
    def score(self) -> float:
        return self._means.score

    @property
    def detail(self) -> str:
        return ", ".join(f"device {d} at {self.values[d]:.4g}" for d in self.outliers)

    def is_anomalous(self) -> bool:
        return bool(self.outliers) or self._means.is_anomalous()

    def figures(self, name: str) -> dict[str, float]:
        return {name: self.value, **{f"{name}/{device}": value for device, value in self.values.items()}}


def _by_device(value: Any) -> dict[str, float]:
    if isinstance(value, Mapping):
        return {str(device): float(v) for device, v in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    values: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    return {str(i): float(v) for i, v in enumerate(values)}
