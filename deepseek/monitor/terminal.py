"""``TerminalSink``: what a person sees while a model trains.

In a terminal it is a panel that is drawn again at most four times a second; in a pipe it is one plain line
now and then. ``write`` is called at every step, so it only keeps what it is given: values stay tensors, on
their device, until the next drawing. A drawing that turns out slow makes the next one wait, so that all
drawing together stays below ``budget`` of the time.
"""

from __future__ import annotations

import atexit
import math
import shlex
import time
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.errors import LiveError
from rich.live import Live
from rich.text import Text

from deepseek.events import SERIES_ONLY, Event, Sink
from deepseek.monitor.narrator import (
    WARN,
    comparison,
    encodable,
)
from deepseek.monitor.panel import State, step_text
from deepseek.monitor.units import (
    duration,
    fixed,
    one_line,
    si,
)

#: shown at once; anything else, floods of warnings included, waits for the next drawing
RARE = frozenset(
    {"run", "interrupted", "resume", "rollback", "action", "evaluate", "checkpoint", "done", "export"}
)


class TerminalSink(Sink):
    """Draws events on a ``rich`` console.

    Args:
        console: where to draw; by default the standard output.
        quiet: draw nothing at all, except warnings.
        every_seconds: without a terminal, the time between two lines.
        every_steps: without a terminal, also a line at each multiple of this step; 0 for none.
        budget: the share of the wall time that drawing may take.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool = False,
        every_seconds: float = 5.0,
        every_steps: int = 0,
        budget: float = 0.008,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.see: str | None = (
            None  #: how to watch the run, said once when it starts; ``None``: from the event
        )
        self.console = console or Console()
        self.quiet, self.every_seconds, self.every_steps = quiet, every_seconds, every_steps
        self.budget, self.clock = budget, clock
        self.state = State(self.console)
        self.drawings, self.drawing_seconds = 0, 0.0
        self._live: Live | None = None
        self._next = -math.inf
        self._last: Event | None = None
        self._closed = False

    def write(self, event: Event) -> None:
        """Keep ``event``; draw when it is time. Never raises."""
        try:
            self._write(event)
        except Exception as error:  # a strange value must not stop a training run
            self.state.say(f"cannot show the event '{event.name}': {one_line(error)}", WARN)

    def close(self) -> None:
        """Draw a last time, give the terminal back, and print the summary."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            if self._live is not None:
                self.state.read()
                self._live.update(self.state.panel(self.console.width, self.console.height), refresh=True)
        except Exception:
            pass  # the terminal is given back below, whatever the state holds
        finally:
            if self._live is not None:
                self._live.stop()
        if not self.quiet and self.state.steps_seen:
            self._summary()

    def _write(self, event: Event) -> None:
        if self._closed or event.name in SERIES_ONLY:
            return
        if event.name == "train":
            self.state.keep(event)
        else:
            self.state.note(event)
        if event.name == "run" and not self.quiet:
            self._say_where(event)
        now = self.clock()
        if self.quiet:
            if event.name == "warning":
                self._line(f"warning: {one_line(event.values.get('text'))}")
        elif self.console.is_terminal:
            if now >= self._next or event.name in RARE:
                self._draw(now)
        else:
            self._plain(event, now)

    def say(self, text: str) -> None:
        """Print a line above the panel; from any thread."""
        if not self.quiet and not self._closed:
            self._line(one_line(text))

    def _say_where(self, event: Event) -> None:
        directory = event.values.get("directory")
        if self.see is None and directory:
            self.say(f"to watch it in a browser: deepseek monitor {shlex.quote(str(directory))}")
        self.see = ""

    def _draw(self, now: float) -> None:
        if self._live is None and not self.state.steps_seen:
            return
        started = time.perf_counter()
        self.state.read()
        panel = self.state.panel(self.console.width, self.console.height)
        if self._live is None:
            self._start(panel)
        else:
            self._live.update(panel, refresh=True)
        took = time.perf_counter() - started
        self.drawings, self.drawing_seconds = self.drawings + 1, self.drawing_seconds + took
        self._next = now + max(0.25, took / self.budget)

    def _start(self, panel: RenderableType) -> None:
        live = Live(panel, console=self.console, auto_refresh=False, vertical_overflow="crop")
        self._live = live  # before it starts: an interrupt at this point must find it
        try:
            live.start(refresh=True)
        except LiveError:  # something else, a spinner for instance, owns the terminal at the moment
            self._live = None
            return
        atexit.register(self.close)

    def _plain(self, event: Event, now: float) -> None:
        if event.name == "train":
            step = event.step or 0
            if now >= self._next or (self.every_steps and step % self.every_steps == 0):
                self.state.read()
                self._line(self.state.line())
                self._next = now + self.every_seconds
        elif event.name == "prepare":
            if now >= self._next:
                self._line(self.state.preparing)
                self._next = now + self.every_seconds
        elif self.state.messages and self.state.messages[-1][3] is event:
            self._line(self.state.messages[-1][1])

    def _line(self, text: str) -> None:
        self.console.print(encodable(Text(text), self.console), soft_wrap=True)

    def _summary(self) -> None:
        state = self.state
        state.read()
        last = state.latest
        marks = state.marks
        parts = [
            f"step {step_text(state.step, state.total)}",
            f"loss {fixed(last.get('loss'))}",
            f"{si(state.tokens)} tokens",
            f"median {si(state.median_speed())} tokens/s",
            f"{duration(state.elapsed())}",
        ]
        self._line(f" {marks.dot} ".join(parts))
        rows = [("this model", state.held_out), *state.compressors.items()]
        if state.held_out is not None and len(rows) > 1:
            comparison("Held-out text", rows, "bits per byte, lower is better", console=self.console)
