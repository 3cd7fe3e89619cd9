"""What is normal: a running, robust forecast of every series of a row, all series at once.

Each series keeps a level and a trend (Holt's linear smoothing, 1957) whose corrections are clipped at a few scales
(Huber 1964), and a scale that follows the *median* of the absolute forecast errors: it moves by a fixed ratio up when
an error is larger than it and down when smaller (Robbins and Monro 1951, for the quantile 1/2). Neither can be bought
by outliers, so a spike does not hide the next one. A row costs a few dozen vector operations however many series there
are.

The evidence against normality adds up in two one-sided cumulative sums (Page 1954) of the standardised error ``z``,
one for each direction. They are the sustain gate: ``z`` is capped, so that one odd row counts for so much and no more,
and a small shift has to last. Legend: S series, R rows kept.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAD = 1.4826  #: the standard deviation of a normal distribution over its median absolute deviation
FIRST = 8  #: rows from which the first level, trend and scale are computed
LONG_CAP, LONG_SLACK = 3.0, 0.8  #: of the sums that look for small and lasting shifts
LAYOUTS = 16  #: sets of names whose places are remembered
TINY = 1e-30  #: below it a positive quantity counts as zero
FARTHEST = 1e9  #: standard deviations; what is farther away is as unusual


@dataclass(frozen=True)
class Trait:
    """How series of one kind behave.

    Attributes:
        log: the series is positive and varies by factors. bad: +1 where up is bad, -1 where down is, 0 for both.
        floor: the least scale, in the series' unit, or as a factor's logarithm. relative: a floor that grows with the
            level. memory: rows that the level remembers. warmup: rows before it is judged. shifts: the
            scale is that of the changes from row to row, which a lasting shift does not widen; for series whose rows
            are independent of each other.
    """

    log: bool = False
    bad: int = 0
    floor: float = 1e-9
    relative: float = 1e-3
    memory: int = 64
    warmup: int = 40
    shifts: bool = False


#: First match wins. Times settle within a few rows; losses and norms need more; shares of tokens are counts.
TRAITS: tuple[tuple[str, Trait], ...] = (
    (r"(train|eval)/(loss|bits_per_byte)", Trait(bad=1, floor=1e-4, memory=64, warmup=40)),
    (r"data/.+/loss", Trait(bad=1, floor=1e-3, relative=0.02, warmup=12, shifts=True)),
    (r"layer/.+/update_ratio", Trait(log=True, floor=0.05, memory=32, warmup=12)),
    (r"train/grad_norm|layer/.+/grad_norm", Trait(log=True, bad=1, floor=0.05)),
    (r"layer/.+/(weight_norm|activation_rms)", Trait(log=True, floor=5e-3)),
    (r"layer/.+/activation_max|attention/.+/max_logit", Trait(log=True, bad=1, floor=0.03)),
    (r"(time|rank)/.+", Trait(log=True, bad=1, floor=0.01, warmup=12)),
    (r"train/(tokens_per_second|mfu)", Trait(log=True, bad=-1, floor=0.01, warmup=12)),
    (r"memory/.+", Trait(log=True, bad=1, floor=1e-3)),
    (r"train/lr|precision/loss_scale", Trait(log=True, floor=0.02)),
    (r"expert/.+/load", Trait(floor=1e-3, relative=0.05)),
    (r"router/.+/entropy|train/router_entropy", Trait(bad=-1, floor=5e-3, relative=5e-3)),
    (r"data/.+/(share|length|entropy|duplicates|psi)", Trait(floor=0.01, relative=0.01, warmup=12)),
    (r"router/.+/dead|layer/.+/dead_units|expert/.+/dead_units", Trait(bad=1, floor=0.5, relative=0.05)),
    (r"train/(clipped|skipped)|precision/.+", Trait(bad=1, floor=0.5)),
    (r".*", Trait(relative=0.01)),
)


_COMPILED = [(re.compile(pattern).fullmatch, trait) for pattern, trait in TRAITS]


@lru_cache(maxsize=65536)
def trait_of(name: str) -> Trait:
    """The trait of a series, by its name."""
    return next(trait for matches, trait in _COMPILED if matches(name))


@dataclass(frozen=True)
class Scores:
    """How unusual a row is. Arrays are over the series of the row, ``index`` into all series; see ``Baselines``."""

    index: Ints
    value: Floats
    z: Floats  #: standardised forecast error; 0 while warming up; ±inf never, non-finite values are not scored


class Baselines:
    """Level, trend, scale and cumulative sums of every series seen so far.

    Args:
        clip: in scales, the largest correction that an error may make. slack: in scales, what a cumulative sum forgives
            a row. cap: the most that one row adds. rows: kept for looking back.

    With all detectors a row of 300 series takes about half a millisecond (benchmarks/bench_detect.py cost).
    """

    #: The per-series arrays that make the state, and their first value.
    STATE = {  # noqa: RUF012
        "count": 0.0,
        "level": 0.0,
        "trend": 0.0,
        "spread": 0.0,
        "last": 0.0,
        "up": 0.0,
        "down": 0.0,
        "long_up": 0.0,
        "long_down": 0.0,
    }

    def __init__(self, *, clip: float = 3.0, slack: float = 2.0, cap: float = 40.0, rows: int = 512) -> None:
        self.clip, self.slack, self.cap, self.rows = clip, slack, cap, rows
        self.names: list[str] = []
        self.place: dict[str, int] = {}
        self.traits: list[Trait] = []
        for key in self.STATE:
            setattr(self, key, np.zeros(0))
        self.log = np.zeros(0, bool)
        self.shifts = np.zeros(0, bool)
        self.floor = self.relative = self.warmup = self.alpha = np.zeros(0)
        self.first = np.zeros((0, FIRST))
        self.values = np.full((rows, 0), np.nan, np.float32)
        self.z = np.zeros((rows, 0), np.float32)
        self.lost = np.zeros((rows, 0), bool)  # NaN or infinity was logged
        self.steps = np.full(rows, -1, np.int64)
        self.seen = 0  # rows so far
        self._indices: dict[
            tuple[str, ...], Ints
        ] = {}  # of the last few sets of names: every step has one of them

    # Per-series arrays, set by name in ``__init__`` and ``_grow``.
    count: Floats
    level: Floats
    trend: Floats
    spread: Floats
    last: Floats
    up: Floats
    down: Floats
    long_up: Floats
    long_down: Floats

    def update(self, step: int, row: Mapping[str, float]) -> Scores:
        """Score ``row`` against the forecast, then learn from it.

        Args:
            step: of the row. row: values by series name; ``nan`` and ``inf`` are kept for looking back but teach
                nothing.
        """
        keys = tuple(row)
        index = self._indices.get(keys)
        if index is None:
            if len(self._indices) >= LAYOUTS:
                self._indices.clear()
            index = self._indices[keys] = self._places(keys)
        raw = np.fromiter(row.values(), np.float64, len(keys))
        slot = self.seen % self.rows
        self.steps[slot], self.seen = step, self.seen + 1
        self.values[slot] = np.nan
        self.z[slot], self.lost[slot] = 0.0, False
        with np.errstate(over="ignore"):
            self.values[slot, index] = raw
        finite, value = np.isfinite(raw), raw
        if not finite.all():
            self.lost[slot, index[~finite]] = True
            index, value = index[finite], raw[finite]
        z = self._learn(index, self._transformed(index, value))
        self.z[slot, index] = z
        return Scores(index, value, z)

    def _learn(self, index: Ints, x: Floats) -> Floats:
        """Standardised errors ``z`` of ``x``, after which level, trend, scale and sums have moved."""
        i = _span(index)
        seen = self.count[i].copy()
        self.count[i] = seen + 1
        young = seen < FIRST
        if young.any():
            self._begin(index[young], x[young], seen[young].astype(np.int64))
        forecast = self.level[i] + self.trend[i]
        error = x - forecast
        floor = np.maximum(self.floor[i], self.relative[i] * np.abs(self.level[i]) * ~self.log[i])
        spread = np.maximum(self.spread[i], floor)
        # A scale from few rows is itself uncertain: widen it as Student's t does a normal distribution.
        z = error / (spread * (1 + 4 / (seen + 1)))
        # Young series move fast, and what looks like an outlier is the way down.
        alpha = np.maximum(self.alpha[i], 4 / (seen + 5))
        clip = np.where(seen < self.warmup[i], 10.0, self.clip) * spread
        move = alpha * np.clip(error, -clip, clip)
        grown = ~young
        self.level[i] = np.where(grown, forecast + move, self.level[i])
        # Learning curves fall like a power of the step, so that their slope fades as 2/step; so does the trend.
        fade = 1 - np.maximum(0.5 * self.alpha[i], np.minimum(2 / (seen + 1), 0.25))
        self.trend[i] += np.where(grown, 0.5 * alpha * move - (1 - fade) * self.trend[i], 0.0)
        rate = np.maximum(0.5 * self.alpha[i], 3 / (seen + 1))
        size = np.where(
            self.shifts[i] & (seen > self.warmup[i]), np.abs(x - self.last[i]) / np.sqrt(2), np.abs(error)
        )
        self.last[i] = x
        away = np.where(size * MAD > spread, rate, -rate)
        self.spread[i] = np.where(grown, np.maximum(spread * np.exp(away), floor), self.spread[i])
        z = np.where(seen >= self.warmup[i], np.clip(z, -FARTHEST, FARTHEST), 0.0)
        gain = np.clip(z, -self.cap, self.cap)
        self.up[i] = np.maximum(self.up[i] + gain - self.slack, 0.0)
        self.down[i] = np.maximum(self.down[i] - gain - self.slack, 0.0)
        # The same for small shifts that last: a row counts for little, and so does what it is forgiven.
        gain = np.clip(z, -LONG_CAP, LONG_CAP)
        self.long_up[i] = np.maximum(self.long_up[i] + gain - LONG_SLACK, 0.0)
        self.long_down[i] = np.maximum(self.long_down[i] - gain - LONG_SLACK, 0.0)
        return z

    def _begin(self, i: Ints, x: Floats, seen: Ints) -> None:
        """Collect the first rows; at the last of them set level, trend and scale by medians."""
        self.first[i, seen] = x
        ready = i[seen == FIRST - 1]
        if not len(ready):
            return
        first = self.first[ready]
        change = np.diff(first, axis=1)
        trend = np.median(change, axis=1)
        noise = np.median(np.abs(change - trend[:, None]), axis=1) * MAD / np.sqrt(2)
        middle = np.median(first - trend[:, None] * np.arange(FIRST), axis=1)
        self.level[ready] = middle + trend * (FIRST - 1)
        self.trend[ready] = trend
        self.spread[ready] = np.maximum(noise, self.floor[ready])

    def prior(self, name: str, level: float, spread: float, rows: int = 64) -> None:
        """Start ``name`` as if ``rows`` rows had been seen around ``level``.

        Args:
            level: in the series' unit. spread: one standard deviation; of the natural logarithm for series that vary
                by factors (``trait_of(name).log``).

        Raises:
            ConfigError: the spread is not positive, or the level of a series that varies by factors is not.
        """
        trait = trait_of(name)
        if not spread > 0 or (trait.log and not level > 0):
            raise ConfigError(f"prior for {name}: level {level} and spread {spread} must be positive")
        (i,) = self._places((name,))
        self.level[i] = np.log(level) if trait.log else level
        self.trend[i], self.spread[i], self.count[i] = 0.0, spread, max(rows, trait.warmup)

    def forget(self, index: Ints) -> None:
        """Empty the cumulative sums of some series, after an alarm."""
        for sums in (self.up, self.down, self.long_up, self.long_down):
            sums[index] = 0.0

    def expected(self, index: int) -> float:
        """The level of a series in its own unit."""
        level = float(self.level[index])
        return float(np.exp(min(level, 700.0))) if self.log[index] else level

    def recent(self, rows: int) -> Ints:
        """Slots of the last ``rows`` rows, oldest first; index ``values``, ``z`` and ``steps`` with them."""
        n = min(rows, self.seen, self.rows)
        return np.arange(self.seen - n, self.seen) % self.rows

    def _transformed(self, index: Ints, value: Floats) -> Floats:
        log = self.log[index]
        if not log.any():
            return value
        return np.where(log, np.log(np.maximum(value, TINY)), value)

    def _places(self, keys: Sequence[str]) -> Ints:
        new = [k for k in keys if k not in self.place]
        if new:
            self._grow(new)
        return np.fromiter((self.place[k] for k in keys), np.int64, len(keys))

    def _grow(self, new: list[str]) -> None:
        before, traits = len(self.names), [trait_of(n) for n in new]
        self.place.update({name: before + k for k, name in enumerate(new)})
        self.names += new
        self.traits += traits
        for key, start in self.STATE.items():
            setattr(self, key, np.append(getattr(self, key), np.full(len(new), start)))
        self.log = np.append(self.log, [t.log for t in traits])
        self.shifts = np.append(self.shifts, [t.shifts for t in traits])
        self.floor = np.append(self.floor, [t.floor for t in traits])
        self.relative = np.append(self.relative, [t.relative for t in traits])
        self.warmup = np.append(self.warmup, [float(t.warmup) for t in traits])
        self.alpha = np.append(self.alpha, [2 / (t.memory + 1) for t in traits])
        self.first = np.vstack([self.first, np.zeros((len(new), FIRST))])
        self.values = np.hstack([self.values, np.full((self.rows, len(new)), np.nan, np.float32)])
        self.z = np.hstack([self.z, np.zeros((self.rows, len(new)), np.float32)])
        self.lost = np.hstack([self.lost, np.zeros((self.rows, len(new)), bool)])

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it: arrays are base64 of their bytes."""
        arrays = {key: _packed(getattr(self, key)) for key in (*self.STATE, *KEPT)}
        return {"names": list(self.names), "seen": self.seen, "rows": self.rows, **arrays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            ConfigError: the state keeps another number of rows.
        """
        if state["rows"] != self.rows:
            raise ConfigError(
                f"the saved baselines keep {state['rows']} rows, these {self.rows}: use one value"
            )
        self.names, self.place, self.traits = [], {}, []
        self.__init__(clip=self.clip, slack=self.slack, cap=self.cap, rows=self.rows)  # type: ignore[misc]
        self._grow(list(state["names"]))
        for key in (*self.STATE, *KEPT):
            old = getattr(self, key)
            setattr(self, key, _unpacked(state[key], old.dtype, old.shape))
        self.seen = int(state["seen"])


def _span(index: Ints) -> slice | Ints:
    """Places that follow one another as a slice, whose arrays are views and cost no copy."""
    if len(index) and index[-1] - index[0] == len(index) - 1 and bool((np.diff(index) == 1).all()):
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


KEPT = ("first", "values", "z", "lost", "steps")


def _packed(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _unpacked(text: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape).copy()
