"""``StoreSink``: what a run tells, as series in its store, without the run waiting for it.

``write`` puts the event on a list and returns. A thread reads the tensors of several steps at once (one copy from
the device), writes the rows, and shows them to a ``Watch``, whose incidents are kept in the store and told as
events. Whatever goes wrong here costs telemetry, never a step: it is counted, and said once.
"""

from __future__ import annotations

import os
import threading
import time as clock
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from deepseek.events import Event, Sink, emit
from deepseek.monitor.rows import MEASURED, Row, RowMaker, read_tensors
from deepseek.monitor.series import SeriesReader
from deepseek.monitor.store import RunStore

BACK = frozenset({"resume", "rollback"})  #: events after whose step everything is void
LINEAGE = BACK | {"run", "checkpoint", "export", "interrupted", "done"}
ENDED = frozenset({"done", "interrupted"})
MOST_WAITING = 100_000  #: events; a device that hangs must not fill the memory


class Found(Protocol):
    """An incident as a ``Watch`` returns it."""

    def to_dict(self) -> dict[str, Any]: ...


class Watching(Protocol):
    """Looks at rows as they come; steps rise, but for a run that went back."""

    def update(self, step: int, row: Mapping[str, float], time: float) -> Sequence[Found]: ...


class StoreSink(Sink):
    """Writes the series of ``run`` to its store.

    Args:
        watch: is shown every row once it is complete. If it has a method ``tick(time)`` it is called, too, when
            nothing happens though a step is due, so that it can notice a run that hangs: not after a ``busy`` event
            (an evaluation, say) until the next one, and not once a run has ended.
        every: training steps whose tensors are read together.
        seconds: an event waits no longer than this.

    Attributes:
        dropped: events that could not be kept.
    """

    def __init__(
        self, run: Path | str, watch: Watching | None = None, *, every: int = 10, seconds: float = 0.5
    ) -> None:
        self.store = RunStore(run)
        self.dropped = 0
        self._watch, self._every, self._seconds = watch, every, seconds
        # Its thread has the time for a system call, and a run must not end because somebody emptied a file.
        self._writer, self._rows = self.store.writer("rank0", mapped=False), RowMaker()
        self._waiting: deque[Event] = deque()
        self._wake, self._pid = threading.Event(), os.getpid()
        self._trained, self._closing, self._due = 0, False, False
        self._told: set[str] = set()
        self._step: int | None = None
        self._row: Row = {}  #: of ``_step``, and not yet shown to the watch
        self._time = 0.0
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    def write(self, event: Event) -> None:
        """Take an event; its tensors are read later."""
        known = event.name in MEASURED or event.name in LINEAGE or event.name == "busy"
        if not known or os.getpid() != self._pid:
            return
        if len(self._waiting) >= MOST_WAITING:
            self.dropped += 1
            return
        self._waiting.append(Event(event.name, event.step, dict(event.values), event.time))
        self._trained += event.name == "train"
        if self._trained >= self._every or event.name not in ("train", "probe"):
            self._trained = 0
            self._wake.set()

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until what was written before is in the store; whether it is."""
        end = clock.monotonic() + timeout
        mark = Event("flush", None, {"done": threading.Event()})
        self._waiting.append(mark)
        self._wake.set()
        done: threading.Event = mark.values["done"]
        return done.wait(max(end - clock.monotonic(), 0.0))

    def close(self) -> None:
        """Write everything and seal the store. Safe to call twice."""
        if self._closing or os.getpid() != self._pid:
            return
        self._closing = True
        self._wake.set()
        self._thread.join()
        self._safely("the series", self._writer.close)
        self.store.close()

    def _work(self) -> None:
        while True:
            woken = self._wake.wait(self._seconds)
            self._wake.clear()
            closing = self._closing
            events = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if events:
                self._take(events)
            if closing or not (events or woken):
                self._complete()  # nothing more comes for the newest step, or it is overdue
            if closing and not self._waiting:
                return
            tick = getattr(self._watch, "tick", None)
            if tick is not None and self._due and not events:
                self._report(self._safely("the watch", tick, clock.time()))

    def _take(self, events: list[Event]) -> None:
        measured = [event for event in events if event.name in MEASURED]
        try:
            read_tensors(measured)
        except Exception as error:  # a device that failed: the run will say so itself
            self.dropped += len(measured)
            self._tell("reading what the steps said", error)
            events = [event for event in events if event.name not in MEASURED]
        for event in events:
            if event.name == "flush":
                event.values["done"].set()
            elif not self._safely("the series", self._one, event):
                self.dropped += 1

    def _one(self, event: Event) -> bool:
        """Put one event into the store."""
        self._due = event.name != "busy" and event.name not in ENDED
        row = self._rows(event)
        if event.step is not None:
            self._go_back(event)
        if event.name in LINEAGE:
            values = {k: v for k, v in event.values.items() if k not in ("kind", "step", "time")}
            self._safely(
                "lineage", lambda: self.store.add_lineage(event.name, event.step, event.time, **values)
            )
        if row and event.step is not None:
            self._writer.log(event.step, row, event.time)
            self._collect(event.step, row, event.time)
        return True

    def _go_back(self, event: Event) -> None:
        step = event.step or 0
        if event.name in BACK or (event.name == "run" and self._leads(step)):
            self._complete()
            self._step = None
            self._writer.rewind(step, event.time)

    def _leads(self, step: int) -> bool:
        """Whether the store has later steps than ``step``: of a run that began again at its start."""
        return SeriesReader(self._writer.directory).steps()[1] > step

    def _collect(self, step: int, row: Row, time: float) -> None:
        """Put together what is told of a step; what comes late counts as told of the newest."""
        if self._watch is None:
            return
        if self._step is not None and step > self._step:
            self._complete()
        self._step = step if self._step is None else max(step, self._step)
        self._row.update(row)
        self._time = time

    def _complete(self) -> None:
        """Show the newest row to the watch."""
        if self._watch is None or not self._row or self._step is None:
            return
        row, self._row = self._row, {}
        self._report(self._safely("the watch", self._watch.update, self._step, row, self._time))

    def _report(self, incidents: Sequence[Found] | None) -> None:
        for incident in incidents or ():
            found = incident.to_dict()
            self._safely("incidents", self.store.put_incident, found, self._time or clock.time())
            emit("incident", found.get("step"), **found)

    def _safely(self, what: str, do: Any, *args: Any) -> Any:
        """Do it. A failure is told once; writing is tried again the next time, a watch that failed is not."""
        try:
            return do(*args)
        except Exception as error:
            if what == "the watch":
                self._watch = None
            self._tell(what, error)
            return None

    def _tell(self, what: str, error: Exception) -> None:
        if what not in self._told:
            self._told.add(what)
            text = f"monitor: {what}: {type(error).__name__}: {error}"[:300]
            emit("warning", self._step, text=f"{text}; training goes on, this is not said again")
