"""The look of everything the command line prints: headlines, tables, bar comparisons, and a list of steps.

All of it goes through one ``rich`` console, so colours and width follow the terminal, and a pipe gets plain
text without control codes. Where the output cannot encode block characters, plain ASCII takes their place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek.monitor.units import duration, finite, one_line

ACCENT, GOOD, BAD, WARN, QUIET = "cyan", "green", "red", "yellow", "bright_black"


class Glyphs(NamedTuple):
    """The marks to draw with: eight heights, eight left parts of a cell, and symbols."""

    heights: str
    parts: str
    done: str
    failed: str
    busy: str
    rule: str
    dot: str
    track: str
    warning: str
    up: str


UNICODE = Glyphs("▁▂▃▄▅▆▇█", "▏▎▍▌▋▊▉█", "✓", "✗", "▸", "─", "·", "━", "!", "≥")
ASCII = Glyphs("_.,-=+*#", "-------#", "ok", "x", ">", "-", "|", "-", "!", ">=")


def glyphs(console: Console) -> Glyphs:
    """Block characters where the console's encoding has them, else ASCII."""
    try:
        "".join(UNICODE).encode(console.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


PLAIN = str.maketrans("–…×·≥✓✗▸─━", "-.x|>+x>--")


def encodable(text: Text, console: Console) -> Text:
    """``text`` with what the console's encoding lacks replaced, one character for one."""
    encoding = console.encoding or "ascii"
    try:
        text.plain.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        text.plain = text.plain.translate(PLAIN).encode("ascii", "replace").decode()
    return text


def headline(text: str, detail: str = "", console: Console | None = None) -> None:
    """A bold line, a quiet detail beside it, and a rule below."""
    console = console or Console()
    line = Text().append(one_line(text), f"bold {ACCENT}")
    if detail:
        line.append("  " + one_line(detail), style=QUIET)
    console.print()
    console.print(encodable(line, console))
    console.print(Text(glyphs(console).rule * min(console.width, max(line.cell_len, 24)), style=QUIET))


def table(rows: Sequence[Mapping[str, Any]], console: Console | None = None, title: str = "") -> None:
    """Rows as columns named by the keys of the first row; columns of numbers are set to the right."""
    console = console or Console()
    if not rows:
        return
    grid = Table(title=title or None, box=None, pad_edge=False, header_style="bold", title_justify="left")
    for name in rows[0]:
        aligned = all(_looks_numeric(row.get(name)) for row in rows)
        grid.add_column(
            encodable(Text(one_line(name)), console), justify="right" if aligned else "left", overflow="fold"
        )
    for row in rows:
        grid.add_row(*(encodable(_cell(row.get(name)), console) for name in rows[0]))
    console.print(grid)


def comparison(
    title: str,
    rows: Sequence[tuple[str, float | None]],
    unit: str = "",
    *,
    best: str = "low",
    console: Console | None = None,
) -> None:
    """One bar a row, all from zero on one scale; the best row (``best``: "low" or "high") is marked.

    ``comparison("Held-out files", [("this model", 1.31), ("gzip -9", 1.72)], "bits per byte")``
    """
    console = console or Console()
    marks, known = glyphs(console), [v for _, v in rows if finite(v) is not None and v is not None]
    if title:
        console.print(encodable(Text().append(one_line(title), "bold").append(f"  {unit}", QUIET), console))
    names = max((cell_len(one_line(name)) for name, _ in rows), default=0)
    width, top = max(10, min(console.width - names - 14, 60)), max(known, default=0.0)
    winner = (min if best == "low" else max)(known, default=None)
    for name, value in rows:
        won = value is not None and value == winner
        line = Text("  ").append(f"{one_line(name):<{names}}  ", style="bold" if won else "")
        shown = finite(value)
        line.append(
            _bar(shown / top if shown and top > 0 else 0.0, width, marks), style=GOOD if won else QUIET
        )
        line.append(f" {shown:.3f}" if shown is not None else " –", style="bold" if won else "")
        console.print(encodable(line, console), no_wrap=True, crop=True)


class Narrator:
    """A list of steps, each with a tick and its time when it ends, or a cross when it raises.

    >>> narrator = Narrator("Quickstart")
    >>> with narrator.step("Training a tokenizer") as step:
    ...     step.note = "8,192 tokens"

    In a terminal a short step turns a small wheel; ``live=True`` says that the step draws for itself (a
    training panel), so it gets a heading and is left alone until it ends.
    """

    def __init__(self, title: str = "", console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console()
        self.quiet, self.count, self.seconds = quiet, 0, 0.0
        if title and not quiet:
            headline(title, console=self.console)

    @contextmanager
    def step(self, text: str, *, live: bool = False) -> Iterator[Step]:
        """Times what happens inside; exceptions pass through."""
        self.count += 1
        current, start, busy = Step(one_line(text)), time.perf_counter(), None
        if not self.quiet:
            busy = self._begin(current, live)
        try:
            yield current
        except BaseException as error:
            current.note = one_line(f"{type(error).__name__}: {error}".rstrip(": "), 160)
            self._end(current, busy, start, failed=True)
            raise
        self._end(current, busy, start, failed=False)

    def say(self, text: str) -> None:
        """One indented line between steps."""
        if not self.quiet:
            self.console.print(encodable(Text("      " + one_line(text, 1000), style=QUIET), self.console))

    def _begin(self, step: Step, live: bool) -> Any:
        label = Text().append(f"{self.count:>2} ", QUIET).append(step.text, "bold" if live else "")
        label = encodable(label, self.console)
        if live or not self.console.is_terminal:
            if live:
                self.console.print(Text(f"{glyphs(self.console).busy} ", style=ACCENT).append_text(label))
            return None
        spinner = "dots" if glyphs(self.console) is UNICODE else "line"
        busy = self.console.status(label, spinner=spinner, refresh_per_second=4)
        busy.start()
        return busy

    def _end(self, step: Step, busy: Any, start: float, failed: bool) -> None:
        step.seconds = time.perf_counter() - start
        self.seconds += step.seconds
        if busy is not None:
            busy.stop()
        if self.quiet and not failed:
            return
        marks = glyphs(self.console)
        mark = marks.failed if failed else marks.done
        line = Text(f"{mark} ", style=BAD if failed else GOOD).append(f"{self.count:>2} ", style=QUIET)
        line.append(f"{step.text:<28}")
        if step.note:
            line.append("  " + one_line(step.note, 300), style=BAD if failed else QUIET)
        took = duration(step.seconds)
        room = min(self.console.width, 100) - line.cell_len - len(took)
        line.append(" " * max(room, 2) + took, style=QUIET)
        self.console.print(encodable(line, self.console), soft_wrap=not self.console.is_terminal)


@dataclass
class Step:
    """What ``Narrator.step`` hands out: set ``note`` to say what came out of it."""

    text: str
    note: str = ""
    seconds: float = 0.0


def sparkline(values: Sequence[float], width: int, marks: Glyphs = UNICODE) -> str:
    """``values`` as ``width`` bars between their smallest and largest; a bucket shows its extreme, so that a
    spike of one step stays visible."""
    clean = [v for v in values if math.isfinite(v)]
    if not clean or width < 1:
        return ""
    low, high = min(clean), max(clean)
    if len(clean) > width:
        edges = [round(i * len(clean) / width) for i in range(width + 1)]
        clean = [_extreme(clean[a:b], clean[max(a - 1, 0)]) for a, b in pairwise(edges)]
    span = high - low or 1.0
    return "".join(marks.heights[min(int((v - low) / span * 8), 7)] for v in clean)


def _extreme(bucket: list[float], previous: float) -> float:
    return max(bucket, key=lambda v: abs(v - previous))


def _bar(share: float, width: int, marks: Glyphs) -> str:
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    if share > 0 and eighths == 0:
        eighths = 1
    full, part = divmod(eighths, 8)
    bar = marks.parts[7] * full + (marks.parts[part - 1] if part else "")
    return bar + " " * (width - len(bar))


def _cell(value: Any) -> Text:
    if isinstance(value, float):
        return Text(f"{value:,.4g}")
    if isinstance(value, int) and not isinstance(value, bool):
        return Text(f"{value:,}")
    return value if isinstance(value, Text) else Text("" if value is None else one_line(value, 500))


def _looks_numeric(value: Any) -> bool:
    if value is None or isinstance(value, (int, float)):
        return True
    return str(value)[:1].isdigit() or str(value) in {"–", ""}
