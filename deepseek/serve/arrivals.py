"""Requests as they arrive: synthetic traces, traces on disk, and a forecast of what comes next.

    poisson   independent arrivals at one rate
    bursty    a Markov-modulated Poisson process: calm and busy times of random length, the busy rate a
              multiple of the calm one
    gamma     independent gaps of a given coefficient of variation (1: Poisson; 4: clumps)

On disk a trace is JSON lines as Mooncake publishes them (arXiv 2407.00079):
``{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [one per 512 tokens of the prompt]}``;
equal leading hash ids are equal beginnings of prompts.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepseek.config import configclass
from deepseek.errors import ConfigError, DataError

BLOCK = 512  #: tokens that one hash id of a Mooncake trace stands for
Kind = Literal["poisson", "bursty", "gamma"]


@dataclass(frozen=True)
class Arrival:
    """One request of a trace: seconds from its start, lengths in tokens, and what its prompt shares with others."""

    time: float
    prompt: int
    output: int
    hash_ids: tuple[int, ...] = ()

    def tokens(self, unique: int) -> tuple[int, ...]:
        """A prompt of that length: equal where hash ids are equal, elsewhere of ``unique``, an id no other has."""
        shared = [t for key in self.hash_ids for t in (key,) * BLOCK][: self.prompt]
        return (*shared, *(unique,) * (self.prompt - len(shared)))


@configclass
class TraceConfig:
    """A synthetic trace.

    Attributes:
        rate: requests per second, in the mean over calm and busy times.
        requests: how many.
        burst: how many times the calm rate the busy rate is; busy, calm: mean seconds of either. For 'bursty'.
        variation: standard deviation of the gaps over their mean. For 'gamma'.
        prompt, output: median lengths, tokens; spread: standard deviation of their logarithms; longest: of both.
    """

    kind: Kind = "poisson"
    rate: float = 1.0
    requests: int = 1000
    burst: float = 8.0
    busy: float = 5.0
    calm: float = 20.0
    variation: float = 4.0
    prompt: int = 256
    output: int = 64
    spread: float = 0.8
    longest: int = 2048

    def check(self) -> None:
        for name in ("rate", "requests", "burst", "busy", "calm", "variation", "prompt", "output", "longest"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")


def synthetic(config: TraceConfig, seed: int) -> list[Arrival]:
    """A trace of ``config.requests`` arrivals; equal seeds give equal traces."""
    rng = random.Random(seed)
    times = {"poisson": _poisson, "bursty": _bursty, "gamma": _gamma}[config.kind](config, rng)

    def length(median: int) -> int:
        return min(config.longest, max(1, round(rng.lognormvariate(math.log(median), config.spread))))

    return [
        Arrival(at, length(config.prompt), length(config.output))
        for at, _ in zip(times, range(config.requests))
    ]


def _poisson(config: TraceConfig, rng: random.Random) -> Iterator[float]:
    at = 0.0
    while True:
        at += rng.expovariate(config.rate)
        yield at


def _gamma(config: TraceConfig, rng: random.Random) -> Iterator[float]:
    shape, at = config.variation**-2, 0.0
    while True:
        at += rng.gammavariate(shape, 1 / (config.rate * shape))
        yield at


def _bursty(config: TraceConfig, rng: random.Random) -> Iterator[float]:
    share = config.busy / (config.busy + config.calm)
    slow = config.rate / (1 - share + share * config.burst)
    at, busy = 0.0, rng.random() < share
    end = at + rng.expovariate(1 / (config.busy if busy else config.calm))
    while True:
        at += rng.expovariate(slow * (config.burst if busy else 1.0))
        while at > end:  # memoryless: what is left of the gap is drawn anew at the other rate
            at, busy = end, not busy
            end = at + rng.expovariate(1 / (config.busy if busy else config.calm))
            at += rng.expovariate(slow * (config.burst if busy else 1.0))
        yield at


def read_trace(path: Path | str, scale: float = 1.0, limit: int | None = None) -> list[Arrival]:
    """A trace in Mooncake's format, by time.

    Args:
        scale: times are divided by it: 2 makes the trace twice as dense.
        limit: at most so many requests.

    Raises:
        DataError: a line is not what the format says; its number is told.
    """
    found = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found.append(_arrival(line, scale, f"{path}:{number}"))
                if limit is not None and len(found) >= limit:
                    break
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the trace {path}: {error}") from None
    if not found:
        raise DataError(f"{path} has no requests")
    return sorted(found, key=lambda a: a.time)


def write_trace(path: Path | str, arrivals: Iterable[Arrival]) -> None:
    """``arrivals`` in Mooncake's format."""
    with Path(path).open("w", encoding="utf-8") as file:
        for a in arrivals:
            row = {"timestamp": round(a.time * 1000), "input_length": a.prompt, "output_length": a.output}
            file.write(json.dumps({**row, "hash_ids": list(a.hash_ids)}) + "\n")


def _arrival(line: str, scale: float, where: str) -> Arrival:
    try:
        row = json.loads(line)
        at, prompt, output = float(row["timestamp"]), int(row["input_length"]), int(row["output_length"])
        hash_ids = tuple(int(x) for x in row.get("hash_ids", ()))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: not a request ({type(error).__name__}: {error})") from None
    if not (math.isfinite(at) and prompt > 0 and output > 0 and all(0 <= x < 2**32 for x in hash_ids)):
        raise DataError(
            f"{where}: timestamp={at}, input_length={prompt}, output_length={output}: lengths must be above 0, "
            "hash ids 32-bit numbers"
        )
    return Arrival(at / 1000 / scale, prompt, output, hash_ids)


class Forecast:
    """How much work arrives in the next seconds: an exponentially weighted rate and its trend (Holt's linear method).

    ``add`` what arrives; ``rate`` is asked for at any time. Amounts may be requests or tokens. Time runs in bins of
    ``width`` seconds; ``level`` and ``trend`` are the weights of the newest bin (0: no trend, a plain moving average).
    """

    def __init__(self, width: float = 1.0, level: float = 0.3, trend: float = 0.1) -> None:
        self.width, self._alpha, self._beta = width, level, trend
        self._bin, self._sum = 0, 0.0
        self._level, self._trend, self._seen = 0.0, 0.0, False

    def add(self, at: float, amount: float) -> None:
        self._advance(at)
        self._sum += amount

    def rate(self, at: float, ahead: float = 0.0) -> float:
        """Amount per second expected ``ahead`` seconds after ``at``; never negative."""
        self._advance(at)
        if not self._seen:
            return self._sum / self.width
        return max(0.0, self._level + self._trend * ahead / self.width) / self.width

    def _advance(self, at: float) -> None:
        now = int(at / self.width)
        for _ in range(min(now - self._bin, 1000)):  # after so many empty bins nothing is left of the past
            if self._seen:
                before = self._level
                self._level = self._alpha * self._sum + (1 - self._alpha) * (before + self._trend)
                self._trend = self._beta * (self._level - before) + (1 - self._beta) * self._trend
            else:
                self._level, self._seen = self._sum, True
            self._sum = 0.0
        self._bin = max(now, self._bin)


def forecast_error(arrivals: Sequence[Arrival], forecast: Forecast, ahead: float) -> tuple[float, float]:
    """Mean absolute error of predicting the prompt tokens of the next ``ahead`` seconds, as a share of their mean:
    of ``forecast``, and of assuming the mean of everything before. Every ``ahead`` seconds, after a tenth of the trace.
    """
    end = arrivals[-1].time
    sums = [0.0] * (int(end / ahead) + 1)
    for a in arrivals:
        sums[int(a.time / ahead)] += a.prompt
    errors, plain, total, at, before = 0.0, 0.0, 0.0, 0, 0.0
    for index, actual in enumerate(sums[:-1]):
        start = index * ahead
        if index > len(sums) // 10 and index:
            errors += abs(forecast.rate(start, ahead / 2) * ahead - actual)
            plain += abs(before / index - actual)
            total += actual
        before += actual
        while at < len(arrivals) and arrivals[at].time < start + ahead:
            forecast.add(arrivals[at].time, arrivals[at].prompt)
            at += 1
    return errors / max(total, 1e-9), plain / max(total, 1e-9)
