"""``History``: what the events of one run say, whatever the file looks like.

A run may have been stopped, killed and resumed, so a step can appear twice: the work after the last
checkpoint is done again. The later event is the one that became part of the model, and it replaces the
earlier one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from deepseek.errors import RunError
from deepseek.monitor.units import finite, number, numbers

EVENTS_FILE = "events.jsonl"
HUGE = 1e100  #: a value beyond this is an overflow like an infinity; no scale can hold it

EventDict = dict[str, Any]
Points = list[tuple[float, float]]


class Break(NamedTuple):
    """Where a run stopped and went on: the steps, the losses (nats per token) around it, and why."""

    stopped: float
    resumed: float
    loss_before: float | None
    loss_after: float | None
    reason: str


@dataclass(frozen=True)
class History:
    """The events of a run directory in file order, and how many lines could not be read."""

    directory: Path
    events: list[EventDict]
    unreadable: int = 0
    config_text: str = ""
    steps: list[EventDict] = field(default_factory=list)  #: 'train' events, one a step, in order of steps

    @classmethod
    def read(cls, directory: Path | str) -> History:
        """Raises ``RunError`` when ``directory`` is not a run directory."""
        directory = Path(directory)
        path = directory / EVENTS_FILE
        if not path.is_file():
            raise RunError(not_a_run(directory))
        events, unreadable = parse(path.read_bytes())
        return cls(directory, events, unreadable, _text(directory / "config.toml"), _one_a_step(events))

    def named(self, name: str) -> list[EventDict]:
        return [e for e in self.events if e["event"] == name]

    def last(self, name: str) -> EventDict:
        """The last event called ``name``, or an empty one."""
        return next((e for e in reversed(self.events) if e["event"] == name), {})

    @property
    def run(self) -> EventDict:
        """Every field ever given by a ``run`` event, the latest value of each."""
        merged: EventDict = {}
        for event in self.named("run"):
            merged.update({k: v for k, v in event.items() if v is not None})
        return merged

    def series(self, name: str, *keys: str) -> Points:
        """``(step, value)`` of a number in the events called ``name``, NaN and infinities included.

        ``keys`` lead to the number: ``series("train", "seconds", "data")``.
        """
        events = self.steps if name == "train" else self.named(name)
        points = []
        for event in events:
            value: Any = event
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            step, found = finite(event.get("step")), number(value)
            if step is not None and found is not None:
                points.append((step, math.copysign(math.inf, found) if abs(found) > HUGE else found))
        return points

    def load(self) -> list[list[tuple[float, list[float]]]]:
        """For every MoE layer, ``(step, share of each expert)``."""
        layers: list[list[tuple[float, list[float]]]] = []
        for event in self.steps:
            for layer, shares in enumerate(rows_of(event.get("load"))):
                if layer == len(layers):
                    layers.append([])
                layers[layer].append((float(event["step"]), shares))
        return layers

    def gates(self) -> dict[str, list[tuple[float, list[float]]]]:
        """For every hybrid layer by its index, ``(step, mean gate of each head)``; 1 is all global."""
        layers: dict[str, list[tuple[float, list[float]]]] = {}
        for event in self.steps:
            for layer, heads in gates_of(event.get("gates")).items():
                layers.setdefault(layer, []).append((float(event["step"]), heads))
        return dict(sorted(layers.items(), key=lambda item: (len(item[0]), item[0])))

    def breaks(self) -> list[Break]:
        """Each place where the run stopped and was resumed, in order."""
        found = []
        last: EventDict = {}
        reason, resumed_at, before = "killed", None, None
        for event in self.events:
            name, step = event["event"], finite(event.get("step"))
            if name == "interrupted":
                reason = str(event.get("signal") or "stopped")
            elif name == "rollback":
                reason = "rolled back"
            elif name == "resume" or (name == "run" and finite(event.get("resumed_from")) is not None):
                resumed_at = step if name == "resume" else finite(event.get("resumed_from"))
                before = finite(event.get("previous_loss")) or before
            elif name == "train" and step is not None:
                if resumed_at is not None:
                    stopped = finite(last.get("step"))
                    before = before if before is not None else finite(last.get("loss"))
                    after = finite(event.get("loss"))
                    stopped = resumed_at if stopped is None else stopped
                    found.append(Break(stopped, resumed_at, before, after, reason))
                    reason, resumed_at, before = "killed", None, None
                last = event
        return found

    def wall_seconds(self) -> float:
        """Time in which a process was at work on the run: the sum over sessions of last minus first event."""
        total, first, last = 0.0, None, None
        for event in self.events:
            when = finite(event.get("time"))
            if when is None:
                continue
            if event["event"] == "run" and first is not None and last is not None:
                total, first = total + max(last - first, 0.0), None
            first = when if first is None else first
            last = when
        return total + (max(last - first, 0.0) if first is not None and last is not None else 0.0)


def rows_of(load: Any) -> list[list[float]]:
    """The ``load`` field as one list of shares for each MoE layer; anything else gives ``[]``."""
    rows = [numbers(row) for row in load] if isinstance(load, (list, tuple)) else []
    return [row for row in rows if row]


def gates_of(gates: Any) -> dict[str, list[float]]:
    """The ``gates`` field as layer index -> mean gate of each head; anything else gives ``{}``."""
    found = {str(k): numbers(v) for k, v in gates.items()} if isinstance(gates, dict) else {}
    return {k: v for k, v in found.items() if v}


def parse(data: bytes) -> tuple[list[EventDict], int]:
    """The readable events among the lines of ``data`` and the number of other non-empty lines."""
    events, unreadable = [], 0
    for line in data.split(b"\n"):
        if not line.strip():
            continue
        event = parse_line(line)
        if event is None:
            unreadable += 1
        else:
            events.append(event)
    return events, unreadable


def parse_line(line: bytes) -> EventDict | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def not_a_run(directory: Path) -> str:
    """Why ``directory`` is no run directory, what was expected, and which runs are near."""
    expected = f"expected a run directory with {EVENTS_FILE} in it (like runs/NAME)"
    if not directory.exists():
        near = directory.parent
        problem = f"no directory {directory}"
    else:
        near = directory
        problem = f"{directory} is not a run: it has no {EVENTS_FILE}"
    names = sorted(p.parent.name for p in near.glob(f"*/{EVENTS_FILE}"))[:5] if near.is_dir() else []
    return f"{problem}; {expected}" + (f"; {near} holds the runs {', '.join(names)}" if names else "")


def _one_a_step(events: list[EventDict]) -> list[EventDict]:
    latest: dict[float, EventDict] = {}
    for event in events:
        step = finite(event.get("step"))
        if event["event"] == "train" and step is not None:
            latest[step] = event
    return [latest[step] for step in sorted(latest)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
