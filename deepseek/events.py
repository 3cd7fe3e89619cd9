"""``emit(name, step, **values)``: the only telemetry call. Nothing leaves the machine.

A training step emits what it knows and goes on; sinks decide what to do with it. Values may be device
tensors: ``emit`` does not read them, so telemetry adds no synchronisation. A sink that needs numbers calls
``plain`` when it drains, every few steps.
"""

from __future__ import annotations

import json
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Event:
    """Something that happened: ``name`` ('train', 'checkpoint', ...), the step, a Unix time, and values."""

    name: str
    step: int | None
    values: dict[str, Any]
    time: float = field(default_factory=time.time)


class Sink(ABC):
    """Receives events, from any thread but one at a time. ``write`` must be cheap; ``close`` flushes."""

    @abstractmethod
    def write(self, event: Event) -> None: ...

    def close(self) -> None:  # noqa: B027 - sinks without resources need no close
        """Flush and release resources."""


_sinks: list[Sink] = []
_lock = threading.RLock()  # a signal handler may emit while its own thread is in ``emit``


def emit(name: str, step: int | None = None, /, **values: Any) -> None:
    """Tell every attached sink that ``name`` happened at ``step``."""
    if _sinks:
        event = Event(name, step, values)
        with _lock:
            for sink in tuple(_sinks):
                sink.write(event)


@contextmanager
def attached(*sinks: Sink) -> Iterator[None]:
    """Attach ``sinks`` for the length of a ``with`` block, then detach and close them, the last one first.

    What a sink tells while it closes (what was found in the last step, say) is heard by those before it.
    """
    with _lock:
        _sinks.extend(sinks)
    try:
        yield
    finally:
        with ExitStack() as closing:
            for sink in sinks:
                closing.callback(_detach, sink)  # every sink is closed, even if another one fails to


def _detach(sink: Sink) -> None:
    with _lock:
        _sinks.remove(sink)
    sink.close()  # without the lock: a sink may wait for a thread of its own that emits


def plain(value: Any) -> Any:
    """``value`` with tensors and arrays as Python numbers and lists (this synchronises with the device)."""
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


class MemorySink(Sink):
    """Keeps events in a list: for tests and notebooks."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def write(self, event: Event) -> None:
        self.events.append(event)

    def series(self, name: str, key: str) -> list[Any]:
        """Every ``key`` of the events called ``name``, in order, as plain numbers."""
        return [plain(e.values[key]) for e in self.events if e.name == name and key in e.values]


#: Events for who watches a run and for no text file: numbers for charts, hundreds a step; ``busy`` says that no steps
#: come for a while, and that it is meant.
SERIES_ONLY = frozenset({"probe", "ranks", "data", "busy"})


class JsonlSink(Sink):
    """Appends one JSON object a line to ``path``; drains every ``every`` events and on anything but 'train'.

    ``SERIES_ONLY`` events are left out.

    Infinities and NaN, which JSON lacks, are written as the strings ``"inf"``, ``"-inf"`` and ``"nan"``;
    what JSON cannot hold at all is written as its ``str``. A line that a killed process left torn is
    closed first.

    A disk that is full, or gone, ends no run: that is told once, as a warning, and what could not be written is tried
    again with every later drain. Of more than 16 MiB the oldest is left out, and counted in ``dropped`` (lines).
    """

    MOST = 16 << 20  #: bytes that may wait for the disk

    def __init__(self, path: Path, every: int = 10) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        self.path, self.dropped = path, 0
        self._file = path.open("ab", buffering=0)
        self._left = b"\n" if torn else b""  #: not yet on the disk
        self._every, self._pending, self._told = every, list[Event](), False

    def write(self, event: Event) -> None:
        if event.name in SERIES_ONLY:
            return
        self._pending.append(event)
        if event.name != "train" or len(self._pending) >= self._every:
            self.drain()

    def drain(self) -> None:
        lines = [
            json.dumps(
                {**_finite(plain(e.values)), "event": e.name, "step": e.step, "time": round(e.time, 3)},
                default=str,
            )
            for e in self._pending
        ]
        self._pending.clear()
        self._left += "".join(f"{line}\n" for line in lines).encode()
        try:
            while self._left:
                self._left = self._left[self._file.write(self._left) or 0 :]
        except OSError as error:
            self._shorten()
            if not self._told:
                self._told = True
                text = f"{self.path} cannot be written: {error.strerror or error}; it is tried again later"
                emit("warning", text=f"{text}, training goes on, and this is not said again")

    def _shorten(self) -> None:
        """Leave out the oldest lines if too many wait; the first may be half on the disk, and stays."""
        if len(self._left) > self.MOST:
            first, _, rest = self._left.partition(b"\n")
            cut = rest.find(b"\n", len(rest) - self.MOST // 2) + 1
            self.dropped += rest.count(b"\n", 0, cut)
            self._left = first + b"\n" + rest[cut:]

    def close(self) -> None:
        self.drain()
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The events of a ``JsonlSink`` file. Torn lines (the writer was killed) are left out."""
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value
