"""The terminal view: plain in a pipe, a panel in a terminal, and never in the way of training."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor_runs import events
from rich.console import Console

from deepseek.events import Event, attached, emit
from deepseek.monitor.terminal import TerminalSink


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def console(tty: bool, width: int = 80, height: int = 40) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=tty,
        width=width,
        height=height,
        _environ={"TERM": "xterm-256color"},
    )


def play(sink: TerminalSink, clock: Clock, rows: list[dict[str, Any]]) -> str:
    for row in rows:
        clock.now = row["time"]
        values = {k: v for k, v in row.items() if k not in {"event", "step", "time"}}
        sink.write(Event(row["event"], row["step"], values, row["time"]))
    sink.close()
    return sink.console.file.getvalue()  # type: ignore[attr-defined]


def test_pipe_gets_plain_lines_and_a_summary() -> None:
    clock = Clock()
    text = play(TerminalSink(console(False), every_seconds=20, clock=clock), clock, events(300, stop=150))
    assert not any(ord(c) < 32 and c != "\n" for c in text)
    lines = text.splitlines()
    steps = [x for x in lines if x.startswith("step ") and "%" in x]
    assert 3 <= len(steps) <= 6
    assert "loss" in steps[0]
    assert "tok/s" in steps[0]
    assert "interrupted at step 150 by SIGTERM" in text
    assert "resumed at step 150" in text
    assert any(x.startswith("step 300/300") for x in lines)
    assert "this model" in text
    assert "gzip -9, each file" in text


def test_events_of_series_are_not_read_and_an_incident_is_one_line_until_its_verdict_changes() -> None:
    sink = TerminalSink(console(False))
    unread = torch.zeros(3, device="meta")  # reading it raises
    for name in ("probe", "ranks", "data"):
        sink.write(Event(name, 5, {"names": ("a", "b", "c"), "values": unread}))
    assert not sink.state.messages
    for verdict, confidence in (("UNKNOWN", 0.3), ("DATA", 0.9), ("DATA", 0.95)):
        incident = {
            "id": "5-loss_spike-1",
            "title": "Loss spike" if verdict == "UNKNOWN" else "Loss spike at step 5",
            "verdict": verdict,
            "confidence": confidence,
        }
        sink.write(Event("incident", 5, incident))
    told = [text for _, text, _, _ in sink.state.messages]
    assert len(told) == 2
    assert "Loss spike at step 5: UNKNOWN (30%)" in told[0]
    assert "Loss spike at step 5: DATA (90%)" in told[1]  # the step is not told twice


def test_every_steps_adds_lines() -> None:
    clock = Clock()
    sink = TerminalSink(console(False), every_seconds=1e9, every_steps=25, clock=clock)
    text = play(sink, clock, [r for r in events(100, stop=None) if r["event"] in {"run", "train"}])
    assert [x.split()[1] for x in text.splitlines() if "%" in x][1:] == [
        "25/100",
        "50/100",
        "75/100",
        "100/100",
    ]


@pytest.mark.parametrize("width", [40, 80, 140])
def test_panel_fits_and_shows_the_run(width: int) -> None:
    sink = TerminalSink(console(True, width))
    for row in events(200, stop=None)[:190]:
        values = {k: v for k, v in row.items() if k not in {"event", "step", "time"}}
        (sink.state.keep if row["event"] == "train" else sink.state.note)(
            Event(row["event"], row["step"], values, row["time"])
        )
    sink.state.read()
    out = Console(file=io.StringIO(), width=width)
    out.print(sink.state.panel(width, 24))
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) <= 24
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "/200" in text
    assert "loss" in text
    assert any(c in text for c in "▃▄▅")
    if width >= 80:
        assert "grad norm" in text
        assert "left" in text
        assert "coverage 9" in text or "coverage 100" in text


def test_experts_far_from_the_mean_are_coloured() -> None:
    sink = TerminalSink(console(True))
    sink.state.keep(Event("train", 1, {"loss": 1.0, "load": torch.tensor([[0.7, 0.02, 0.14, 0.14]])}, 0.0))
    sink.state.read()
    line = next(t for t in sink.state.panel(80).renderables if "×" in t.plain)  # type: ignore[union-attr]
    styles = {line.plain[s.start : s.end]: str(s.style) for s in line.spans}
    assert styles["█"] == "red"
    assert styles["▁"] == "yellow"
    assert styles["▅▅" if "▅▅" in styles else "▃▃"] == "green"


def test_terminal_is_drawn_seldom_and_given_back() -> None:
    clock = Clock()
    sink = TerminalSink(console(True), clock=clock, budget=1e9)
    rows = [r for r in events(400, stop=None) if r["event"] in {"run", "train"}]
    for i, row in enumerate(rows):
        row["time"] = i * 0.01
    text = play(sink, clock, rows)
    assert sink.drawings <= 400 * 0.01 / 0.25 + 2
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_a_flood_of_warnings_is_not_a_flood_of_drawings() -> None:
    clock = Clock()
    sink = TerminalSink(console(True), clock=clock, budget=1e9)
    sink.write(Event("train", 1, {"loss": 1.0}))
    for _ in range(500):
        sink.write(Event("warning", 1, {"text": "again"}))
        sink.write(Event("bad_record", 1, {"path": "x"}))
    assert sink.drawings == 1
    sink.close()


def test_slow_drawing_waits_longer() -> None:
    clock = Clock()
    sink = TerminalSink(console(True), clock=clock, budget=1e-9)
    play(sink, clock, [r for r in events(300, stop=None) if r["event"] == "train"])
    assert sink.drawings == 1


def test_writing_a_step_reads_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    sink = TerminalSink(console(False), every_seconds=1e9, clock=clock)
    sink.write(Event("train", 1, {"loss": torch.tensor(2.0)}))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("a tensor was read"))
    for step in range(2, 50):
        sink.write(Event("train", step, {"loss": torch.tensor(2.0), "load": torch.ones(2, 4)}))
    monkeypatch.undo()
    sink.close()
    assert len(sink.state.losses) == 49


ODD = [
    None,
    "nan",
    "inf",
    float("nan"),
    float("inf"),
    -1,
    1e300,
    10**400,
    "text",
    b"x",
    [],
    {},
    [[]],
    {"a": None},
    True,
]
ODD += [torch.tensor(float("nan")), torch.empty(0), torch.ones(2, 2, 2), object(), "\x1b[31m[bold]x"]


@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize("value", ODD, ids=lambda v: type(v).__name__)
def test_odd_values_never_raise(tty: bool, value: Any) -> None:
    clock = Clock()
    sink = TerminalSink(console(tty), every_seconds=0, clock=clock)
    keys = {k for row in events(100, stop=50) for k in row} - {"event", "step", "time"}
    for name in (
        "run",
        "prepare",
        "train",
        "evaluate",
        "compress",
        "checkpoint",
        "resume",
        "warning",
        "done",
        "new",
    ):
        for key in keys:
            clock.now += 10
            sink.write(Event(name, 1 if key != "loss" else value, {key: value}))
    clock.now += 10
    sink.write(Event("train", 2, dict.fromkeys(keys, value)))
    sink.close()
    text = sink.console.file.getvalue()  # type: ignore[attr-defined]
    assert "step" in text
    if not tty:
        assert "\x1b" not in text


def test_quiet_prints_only_warnings() -> None:
    clock = Clock()
    rows = [*events(60, stop=None), {"event": "warning", "step": 60, "time": 0.0, "text": "disk nearly full"}]
    assert (
        play(TerminalSink(console(False), quiet=True, clock=clock), clock, rows)
        == "warning: disk nearly full\n"
    )


def test_ascii_console_gets_ascii() -> None:
    raw = io.BytesIO()
    out = Console(file=io.TextIOWrapper(raw, encoding="ascii"), force_terminal=False, width=80)
    sink = TerminalSink(out, clock=Clock())
    for row in events(120, stop=60):
        values = {k: v for k, v in row.items() if k not in {"event", "step", "time"}}
        sink.write(Event(row["event"], row["step"], values, row["time"]))
    sink.close()
    out.print(sink.state.panel(80))
    sink.state.latest = {"load": [[0.5, 0.5]], "gates": {"1": [0.5]}}
    out.print(sink.state.panel(40))
    out.file.flush()
    assert raw.getvalue().isascii()
    assert b"step 120/120" in raw.getvalue()


def _emit_and_interrupt() -> None:
    emit("train", 1, loss=1.0)
    raise KeyboardInterrupt


def test_attached_sink_closes_on_exceptions() -> None:
    sink = TerminalSink(console(True), clock=Clock())
    with pytest.raises(KeyboardInterrupt), attached(sink):
        _emit_and_interrupt()
    assert sink.console.file.getvalue().rstrip().count("\x1b[?25h") == 1  # type: ignore[attr-defined]


PROGRAM = """
import signal, time
from deepseek.events import attached, emit
from deepseek.monitor.terminal import TerminalSink
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
with attached(TerminalSink()):
    for step in range(10_000):
        emit("train", step, loss=1.0)
        time.sleep(0.01)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_sigint_gives_a_real_terminal_back(tmp_path: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=follower,
        stdout=follower,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(follower)
    seen, deadline = b"", time.monotonic() + 120
    while b"loss" not in seen and time.monotonic() < deadline:
        seen += os.read(leader, 4096)
    process.send_signal(signal.SIGINT)
    while time.monotonic() < deadline:
        try:
            part = os.read(leader, 4096)
        except OSError:
            break
        if not part:
            break
        seen += part
    process.wait(60)
    os.close(leader)
    assert b"\x1b[?25l" in seen
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")
