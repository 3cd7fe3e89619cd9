"""Helpers for the rest of the command line."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deepseek.monitor.narrator import Narrator, comparison, headline, sparkline, table


def plain_console(width: int = 80, tty: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=tty, _environ={"TERM": "xterm-256color"})


def printed(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_table_aligns_numbers_and_keeps_markup_as_text() -> None:
    out = plain_console()
    table([{"name": "[red]a[/red]", "tokens": 1234567}, {"name": "b", "tokens": 5}], out)
    lines = printed(out).splitlines()
    assert "[red]a[/red]" in lines[1]
    assert lines[1].rstrip().endswith("1,234,567")
    assert lines[2].rstrip().endswith("        5")
    table([], out)


def test_comparison_bars_are_in_proportion() -> None:
    out = plain_console()
    comparison(
        "Held-out", [("model", 1.0), ("gzip -9", 2.0), ("xz", None), ("nan", float("nan"))], console=out
    )
    lines = printed(out).splitlines()[1:]
    assert abs(lines[0].count("█") * 2 - lines[1].count("█")) <= 1
    assert "1.000" in lines[0]
    assert lines[2].rstrip().endswith("–")
    assert lines[3].rstrip().endswith("–")


def test_narrator_ticks_and_times_steps() -> None:
    out = plain_console()
    narrator = Narrator("Quickstart", out)
    with narrator.step("Reading the corpus") as step:
        step.note = "1,843 files"
    with narrator.step("Training", live=True):
        narrator.say("a line of detail")
    text = printed(out)
    assert "✓  1 Reading the corpus" in text
    assert "1,843 files" in text
    assert "✓  2 Training" in text
    assert " ms" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("tty", [True, False])
def test_narrator_marks_failures_and_lets_them_through(tty: bool) -> None:
    out = plain_console(tty=tty)
    with pytest.raises(ValueError, match="no tokens"), Narrator(console=out).step("Training a tokenizer"):
        raise ValueError("no tokens\x1b[2J")
    text = printed(out)
    assert "✗" in text
    assert "ValueError: no tokens [2J" in text
    assert "\x1b[2J" not in text


def test_quiet_narrator_prints_failures_only() -> None:
    out = plain_console()
    narrator = Narrator("Quickstart", out, quiet=True)
    with narrator.step("one"):
        pass
    assert printed(out) == ""
    with pytest.raises(RuntimeError), narrator.step("two"):
        raise RuntimeError("x")
    assert "two" in printed(out)


def test_headline_and_ascii() -> None:
    raw = io.BytesIO()
    out = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=60)
    headline("Doctor", "what this machine has", out)
    comparison("bits – é", [("a", 1.0), ("ü", None)], console=out)
    table([{"größe": "1 × 2"}], out)
    with Narrator(console=out).step("x…") as step:
        step.note = "≥ 3 · 漢"
    out.file.flush()
    assert raw.getvalue().isascii()
    assert b"Doctor" in raw.getvalue()


def test_sparkline_shows_a_single_spike() -> None:
    values = [1.0] * 500
    values[321] = 9.0
    line = sparkline(values, 40)
    assert len(line) == 40
    assert line.count("█") == 1
    assert line.index("█") == 321 * 40 // 500
    assert sparkline([], 10) == ""
    assert sparkline([2.0, 2.0], 10) == "▁▁"
