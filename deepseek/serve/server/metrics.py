"""What the server counts, in Prometheus' text format, under the names vLLM uses, so that its dashboards fit.

Counters, gauges and histograms are small enough to be our own: a family is a name, a help text and its children by
label values. Format: the Prometheus text exposition format 0.0.4 (prometheus.io/docs/instrumenting/exposition_formats).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
INFINITY = float("inf")


class Histogram:
    """Observations counted by upper bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class Family:
    """A metric: its children by label values. ``bounds`` makes it a histogram."""

    def __init__(
        self,
        name: str,
        about: str,
        kind: Literal["counter", "gauge", "histogram"],
        labels: Sequence[str] = (),
        bounds: Sequence[float] = (),
    ) -> None:
        self.name, self.about, self.kind = name, about, kind
        self.labels, self.bounds = tuple(labels), tuple(bounds)
        self._values: dict[tuple[str, ...], float] = {}
        self._histograms: dict[tuple[str, ...], Histogram] = {}

    def add(self, amount: float, *labels: str) -> None:
        self._values[labels] = self._values.get(labels, 0.0) + amount

    def set(self, value: float, *labels: str) -> None:
        self._values[labels] = value

    def only(self, value: float, *labels: str) -> None:
        """This child, and no other any more."""
        self._values = {labels: value}

    def value(self, *labels: str) -> float:
        return self._values.get(labels, 0.0)

    def observe(self, value: float, *labels: str, times: int = 1) -> None:
        found = self._histograms.get(labels)
        if found is None:
            found = self._histograms[labels] = Histogram(self.bounds)
        found.observe(value, times)

    def touch(self, *labels: str) -> None:
        """Show a child before anything happened: a rate needs a zero to start from."""
        if self.kind == "histogram":
            self._histograms.setdefault(labels, Histogram(self.bounds))
        else:
            self._values.setdefault(labels, 0.0)

    def lines(self) -> list[str]:
        found = [f"# HELP {self.name} {_escaped(self.about, quote=False)}", f"# TYPE {self.name} {self.kind}"]
        found += [f"{self.name}{self._tags(labels)} {_number(v)}" for labels, v in self._values.items()]
        for labels, histogram in self._histograms.items():
            total = 0
            for bound, count in zip([*histogram.bounds, INFINITY], histogram.counts):
                total += count
                found.append(f"{self.name}_bucket{self._tags(labels, ('le', _bound(bound)))} {total}")
            found.append(f"{self.name}_sum{self._tags(labels)} {_number(histogram.sum)}")
            found.append(f"{self.name}_count{self._tags(labels)} {total}")
        return found

    def _tags(self, values: tuple[str, ...], *more: tuple[str, str]) -> str:
        pairs = [*zip(self.labels, values), *more]
        return "{" + ",".join(f'{k}="{_escaped(v)}"' for k, v in pairs) + "}" if pairs else ""


def _escaped(text: str, quote: bool = True) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quote else text


def _bound(value: float) -> str:
    """As Prometheus' Python client writes it, so that queries by ``le`` fit both."""
    return "+Inf" if math.isinf(value) else repr(float(value))


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))


def render(families: Sequence[Family]) -> bytes:
    return ("\n".join(line for family in families for line in family.lines()) + "\n").encode(
        "utf-8", "replace"
    )
