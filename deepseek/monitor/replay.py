"""``Replay``: the series of a run that has only ``events.jsonl``, rebuilt in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek.monitor.history import EventDict, parse_line
from deepseek.monitor.units import number


class Window(NamedTuple):
    step: Any
    low: Any
    high: Any
    mean: Any
    raw: bool


class Replay:
    def __init__(self, path: Path) -> None:
        self.path, self._offset = path, 0
        self._rows: dict[int, dict[str, float]] = {}
        self._names: dict[str, None] = {}

    def refresh(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            event = parse_line(line)
            if event is not None and isinstance(event.get("step"), int):
                row = dict(flatten(event))
                if row:
                    self._rows.setdefault(event["step"], {}).update(row)
                    self._names.update(dict.fromkeys(row))

    def names(self) -> list[str]:
        return list(self._names)

    def steps(self) -> tuple[int | None, int | None]:
        return (min(self._rows), max(self._rows)) if self._rows else (None, None)

    def last(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for step in sorted(self._rows)[-200:]:
            found.update(self._rows[step])
        return found

    def raw(self, name: str, start: int | None = None, stop: int | None = None) -> tuple[Any, Any]:
        steps = sorted(
            s for s, row in self._rows.items()
            if name in row and (start is None or s >= start) and (stop is None or s < stop)
        )  # fmt: skip
        return np.array(steps, np.int64), np.array([self._rows[s][name] for s in steps], np.float32)

    def read(
        self, name: str, start: int | None = None, stop: int | None = None, points: int = 1500
    ) -> Window:
        steps, values = self.raw(name, start, stop)
        if len(steps) <= points:
            return Window(steps, values, values, values, True)
        edges = np.linspace(0, len(steps), points + 1).astype(int)[:-1]
        low, high = np.minimum.reduceat(values, edges), np.maximum.reduceat(values, edges)
        mean = np.add.reduceat(values, edges) / np.diff(np.append(edges, len(values)))
        return Window(steps[edges], low, high, mean.astype(np.float32), False)


def flatten(event: EventDict) -> Iterator[tuple[str, float]]:
    name = event["event"]
    if name == "train":
        yield from _numbers("train", event)
        yield from _numbers("time", event.get("seconds"))
        for layer, loads in enumerate(event.get("load") or []):
            yield from ((f"expert/{layer}/{e}/load", float(v)) for e, v in enumerate(loads))
        for layer, heads in (event.get("gates") or {}).items():
            yield from ((f"attention/{layer}/{h}/gate", float(v)) for h, v in enumerate(heads))
    elif name == "evaluate":
        yield from _numbers("eval", event)


def _numbers(group: str, values: Any) -> Iterator[tuple[str, float]]:
    for key, value in (values or {}).items():
        if key in ("step", "time", "event"):
            continue
        found = float(value) if isinstance(value, bool) else number(value)
        if found is not None:
            yield (
                f"{group}/{key}",
                found if abs(found) < 1e38 or math.isnan(found) else math.copysign(math.inf, found),
            )
