"""``State``: what the last events said, and the panel that shows it."""

from __future__ import annotations

import math
import time
from collections import deque
from itertools import groupby
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from deepseek.events import Event, plain
from deepseek.monitor.history import gates_of, rows_of
from deepseek.monitor.narrator import (
    ACCENT,
    BAD,
    GOOD,
    QUIET,
    WARN,
    Glyphs,
    encodable,
    glyphs,
    sparkline,
)
from deepseek.monitor.units import (
    MISSING,
    duration,
    finite,
    fixed,
    flops,
    number,
    one_line,
    percent,
    si,
    significant,
    size,
    timestamp,
)

STARVED, CROWDED = 0.25, 2.0  #: shares of the mean load below and above which an expert is coloured
PENDING = 256  #: losses kept as tensors before they are read, however slow the drawing


class State:
    """What the last events said, and how to draw it."""

    def __init__(self, console: Console) -> None:
        self.console, self.marks = console, glyphs(console)
        self.run: dict[str, Any] = {}
        self.latest: dict[str, Any] = {}
        self.step, self.total, self.steps_seen = 0, 0, 0
        self.tokens = 0.0
        self.losses: deque[float] = deque(maxlen=2000)
        self.speeds: deque[float] = deque(maxlen=200)
        self.messages: deque[tuple[float, str, str, Event | None]] = deque(maxlen=4)
        self.compressors: dict[str, float] = {}
        self.held_out: float | None = None
        self.preparing = ""
        self.stopped_text = ""
        self._pending: deque[Any] = deque(maxlen=PENDING)
        self._unread: Event | None = None
        self._times: deque[tuple[float, int]] = deque(maxlen=200)
        self._incidents: set[tuple[str, str]] = set()
        self._first_time: float | None = None
        self._last_time: float | None = None

    def keep(self, event: Event) -> None:
        """Take a training step without reading any tensor."""
        self.steps_seen += 1
        self._unread = event
        tokens = event.values.get("tokens")
        self.tokens += tokens if isinstance(tokens, (int, float)) and math.isfinite(tokens) else 0
        if "loss" in event.values:
            self._pending.append(event.values["loss"])
        if isinstance(event.step, int):
            self.step = event.step
            self._times.append((event.time, event.step))
        self._first_time = event.time if self._first_time is None else self._first_time
        self._last_time = event.time

    def read(self) -> None:
        """Turn what was kept into numbers; this synchronises with the device."""
        for loss in self._pending:
            found = finite(loss)
            if found is not None:
                self.losses.append(found)
        self._pending.clear()
        if self._unread is not None:
            values, self._unread = self._unread.values, None
            self.latest = {str(k): plain(v) for k, v in values.items()}
            speed = finite(self.latest.get("tokens_per_second"))
            if speed is not None:
                self.speeds.append(speed)
            if self.latest.get("skipped") is True:
                self.say(f"step {self.step} skipped: the gradient was not finite", WARN)

    def note(self, event: Event) -> None:
        """Take any other event."""
        values = {str(k): plain(v) for k, v in event.values.items()}
        if event.name == "run":
            self.run.update(values)
            self.total = int(finite(values.get("total_steps")) or self.total)
            self._times.clear()
        elif event.name == "prepare":
            done, total = finite(values.get("done")), finite(values.get("total"))
            share = f" of {si(total)} ({done / total:.0%})" if done is not None and total else ""
            counted = f": {si(done)}{share}" if done is not None else ""
            self.preparing = f"corpus {one_line(values.get('stage', 'preparing'))}{counted}"
        elif event.name == "evaluate":
            self.held_out = finite(values.get("bits_per_byte")) or self.held_out
        elif event.name == "compress" and finite(values.get("bits_per_byte")) is not None:
            how = f", {one_line(values['how'])}" if values.get("how") else ""
            self.compressors[one_line(values.get("name", "?")) + how] = float(values["bits_per_byte"])
        text, style = message(event.name, event.step, values, self.marks)
        if event.name == "incident":
            key = (str(values.get("id")), str(values.get("verdict")))
            if key in self._incidents:  # told again, as more is known of it
                return
            self._incidents.add(key)
        if text:
            self.say(text, style, event)

    def say(self, text: str, style: str = QUIET, event: Event | None = None) -> None:
        self.messages.append((event.time if event else time.time(), one_line(text), style, event))

    def elapsed(self) -> float | None:
        if self._first_time is None or self._last_time is None:
            return None
        return self._last_time - self._first_time

    def median_speed(self) -> float | None:
        return sorted(self.speeds)[len(self.speeds) // 2] if self.speeds else None

    def remaining(self) -> float | None:
        """Seconds to the last step at the pace of the last 200 steps."""
        if len(self._times) < 2 or self.total <= self.step:
            return 0.0 if self.total and self.step >= self.total else None
        (t0, s0), (t1, s1) = self._times[0], self._times[-1]
        return (t1 - t0) / (s1 - s0) * (self.total - s1) if s1 > s0 else None

    def line(self) -> str:
        """One plain line: the state of the run."""
        v = self.latest
        parts = [f"step {step_text(self.step, self.total)}"]
        if self.total:
            parts.append(f"{self.step / self.total:4.0%}")
        parts += [f"loss {fixed(v.get('loss'))}", f"bpb {fixed(v.get('bits_per_byte'), 3)}"]
        parts += [f"{si(v.get('tokens_per_second'))} tok/s", f"mfu {percent(v.get('mfu'))}"]
        parts += [f"lr {significant(v.get('lr'))}", f"|g| {significant(v.get('grad_norm'))}"]
        if finite(v.get("max_vio")) is not None:
            parts.append(f"maxvio {significant(v['max_vio'], 2)}")
        parts.append(f"eta {duration(self.remaining())}")
        return "  ".join(parts)

    def panel(self, width: int, height: int = 50) -> RenderableType:
        """The live view: ``width`` columns at most, and ``height`` lines if leaving out layers can do it."""
        width = max(min(width, 120), 40)
        v = self.latest
        rows = [self._title(width), self._progress(width), Text("")]
        rows += self._numbers(width)
        loads, gates = rows_of(v.get("load")), gates_of(v.get("gates"))
        room = max((height - 13 - len(self.messages)) // (2 if loads and gates else 1), 1)
        if loads or gates:
            rows.append(Text(""))
        if loads:
            rows += self._experts(loads, width, room)
        if gates:
            rows += self._gates(gates, width, room)
        if self.messages:
            rows.append(Text(""))
            rows += [self._message(m, width) for m in self.messages]
        for row in rows:
            row.no_wrap, row.overflow = True, "crop"
            encodable(row, self.console)
        return Group(*rows)

    def _title(self, width: int) -> Text:
        run = self.run
        name = Text().append(one_line(run.get("run") or "training", 40), f"bold {ACCENT}")
        facts = [one_line(run[k], 30) for k in ("preset", "device", "dtype") if run.get(k)]
        if finite(run.get("parameters")) is not None:
            active = si(run.get("active_parameters"))
            facts.append(
                f"{si(run['parameters'])} parameters" + (f", {active} active" if active != MISSING else "")
            )
        name.append("  " + f" {self.marks.dot} ".join(facts), style=QUIET)
        name.truncate(width, overflow="ellipsis")
        return name

    def _progress(self, width: int) -> Text:
        share = min(self.step / self.total, 1.0) if self.total else 0.0
        left = f" {step_text(self.step, self.total)}  {share:4.0%}  {duration(self.elapsed())} "
        left += f"{self.marks.dot} {duration(self.remaining())} left"
        room = max(width - len(left) - 1, 8)
        filled = round(share * room)
        bar = Text(self.marks.track * filled, style=GOOD if share >= 1 else ACCENT)
        return bar.append(self.marks.track * (room - filled), style=QUIET).append(left)

    def _numbers(self, width: int) -> list[Text]:
        v, dot = self.latest, f" {self.marks.dot} "
        room = width - 41
        loss = number(v.get("loss"))
        broken = loss is not None and not math.isfinite(loss)
        recent = [math.log(x) if x > 0 else 0.0 for x in list(self.losses)[len(self.losses) // 5 :]]
        spark = Text(sparkline(recent, room, self.marks), style=ACCENT)
        peak = finite(self.run.get("peak_flops"))
        of_peak = f"of {flops(peak)}" if peak else ""
        if of_peak and self.run.get("peak_source"):
            of_peak += f" ({one_line(self.run['peak_source'], max(room - len(of_peak) - 3, 8))})"
        notes = [f"{si(self.tokens)} tokens"]
        notes += [f"held-out {fixed(self.held_out, 3)}"] if self.held_out is not None else []
        clipped = v.get("clipped") is True
        rows: list[tuple[Any, ...]] = [
            (
                "loss",
                fixed(loss),
                BAD if broken else "",
                "bits/byte",
                fixed(v.get("bits_per_byte"), 3),
                "",
                spark,
            ),
            ("tokens/s", si(v.get("tokens_per_second")), "", "MFU", percent(v.get("mfu")), "", of_peak),
            (
                "lr",
                significant(v.get("lr")),
                "",
                "grad norm",
                significant(v.get("grad_norm")),
                clipped,
                notes,
            ),
        ]
        lines = []
        for label, value, style, label2, value2, warn, rest in rows:
            line = Text().append(f"{label:<9}", QUIET).append(f"{value:>9}", style or "bold")
            line.append(f"   {label2:<9}", QUIET).append(f"{value2:>8}", WARN if warn else "bold").append(
                "   "
            )
            shown = dot.join(rest) if isinstance(rest, list) else rest
            lines.append(line.append_text(shown if isinstance(shown, Text) else Text(shown, QUIET)))
        return lines

    def _experts(self, loads: list[list[float]], width: int, room: int) -> list[Text]:
        v = self.latest
        head = Text().append("experts", QUIET)
        for key, label in (("coverage", "coverage"), ("max_vio", "MaxVio"), ("router_entropy", "entropy")):
            if finite(v.get(key)) is not None:
                shown = percent(v[key]) if key == "coverage" else significant(v[key], 3)
                head.append(f"  {label} ", style=QUIET).append(shown)
        return (
            [head]
            + [self._load_line(i, shares, width) for i, shares in enumerate(loads[:room])]
            + more(loads, room)
        )

    def _load_line(self, layer: int, shares: list[float], width: int) -> Text:
        line, mean = Text(f"  {layer:>2} ", style=QUIET), sum(shares) / len(shares)
        ratios = [s / mean if mean > 0 else 0.0 for s in shares]
        room = width - 24
        cells = [self._load_cell(max(g, key=lambda r: abs(r - 1))) for g in _groups(ratios, room)]
        for style, same in groupby(cells, key=lambda cell: cell[1]):
            line.append("".join(height for height, _ in same), style)
        line.append(f"  {min(ratios):.2f}–{max(ratios):.2f}×", style=QUIET)
        return line

    def _load_cell(self, ratio: float) -> tuple[str, str]:
        height = self.marks.heights[min(max(int(ratio / CROWDED * 8), 0), 7)]
        return height, BAD if ratio > CROWDED else WARN if ratio < STARVED else GOOD

    def _gates(self, gates: dict[str, list[float]], width: int, room: int) -> list[Text]:
        head = Text("gates", style=QUIET).append("    local 0 … 1 global, one bar a head", style=QUIET)
        lines = [head]
        for layer, heads in list(gates.items())[:room]:
            line = Text(f"  {one_line(layer, 4):>2} ", style=QUIET)
            bars = (self.marks.heights[min(max(int(gate * 8), 0), 7)] for gate in heads[: width - 24])
            line.append("".join(bars), "magenta")
            lines.append(line.append(f"  mean {sum(heads) / len(heads):.2f}", style=QUIET))
        return lines + more(list(gates), room)

    def _message(self, entry: tuple[float, str, str, Event | None], width: int) -> Text:
        when, text, style, _ = entry
        line = Text(timestamp(when, "%H:%M:%S ", local=True), style=QUIET).append(text, style=style)
        line.truncate(width, overflow="ellipsis")
        return line


def message(name: str, step: int | None, v: dict[str, Any], marks: Glyphs) -> tuple[str, str]:
    """One line about an event that is not a step, and its style; an empty line for events nobody needs."""
    at = f" at step {step}" if step is not None else ""
    if name == "evaluate":
        return (
            f"evaluation{at}: {fixed(v.get('bits_per_byte'), 3)} bits per byte, loss {fixed(v.get('loss'))}",
            ACCENT,
        )
    if name == "compress":
        return f"{v.get('name')}: {fixed(v.get('bits_per_byte'), 3)} bits per byte ({v.get('how')})", QUIET
    if name == "checkpoint":
        stall = f", training waited {duration(v['stall_seconds'])}" if "stall_seconds" in v else ""
        return (
            f"{marks.done} checkpoint{at}: {size(v.get('bytes'))} in {duration(v.get('seconds'))}{stall}",
            GOOD,
        )
    if name == "interrupted":
        return f"interrupted{at} by {v.get('signal', 'a signal')}", WARN
    if name == "resume":
        loss = f", loss was {fixed(v['previous_loss'])}" if "previous_loss" in v else ""
        return f"resumed{at}{loss}", ACCENT
    if name == "rollback":
        out = f", without the batches of steps {v['steps'][0]} to {v['steps'][1]}" if v.get("steps") else ""
        return f"rolled back from step {v.get('from_step')} to step {step}{out}", WARN
    if name == "action":
        detail = v.get("detail") or {}
        text = detail.get("text") or detail.get("error") or v.get("status")
        who = f" by {v['by']}" if v.get("by") else ""
        return f"{v.get('action')}{who}: {text}", WARN if v.get("status") == "failed" else ACCENT
    if name == "incident":
        sure = f" ({v['confidence']:.0%})" if isinstance(v.get("confidence"), float) else ""
        verdict = f": {v['verdict']}{sure}" if v.get("verdict") else ""
        title = str(v.get("title") or v.get("kind"))
        return f"{marks.warning} {title}{'' if ' at step ' in title else at}{verdict}", WARN
    if name == "warning":
        return f"{marks.warning} {v.get('text')}", WARN
    if name == "bad_record":
        return f"skipped {v.get('path')} at byte {v.get('offset')}: {v.get('reason')}", WARN
    if name == "export":
        return f"{marks.done} exported {v.get('path')}", GOOD
    if name == "done":
        return f"{marks.done} done{at} after {duration(v.get('seconds'))}", GOOD
    return "", QUIET


def step_text(step: int, total: int) -> str:
    return f"{step:,}/{total:,}" if total else f"{step:,}"


def more(items: list[Any], shown: int) -> list[Text]:
    return [Text(f"     and {len(items) - shown} more layers", style=QUIET)] if len(items) > shown else []


def _groups(values: list[float], room: int) -> list[list[float]]:
    """``values`` one by one, or neighbours together when there are more than ``room``."""
    each = max(math.ceil(len(values) / max(room, 1)), 1)
    return [values[i : i + each] for i in range(0, len(values), each)]
