"""Reading a run: repeated steps, breaks, and numbers for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monitor_runs import START, events, write_run

from deepseek.events import Event, JsonlSink
from deepseek.monitor.history import History
from deepseek.monitor.runs import list_runs
from deepseek.monitor.units import duration, finite, flops, number, numbers, one_line, si, significant, size


def row(event: str, step: int | None, time: float, **values: Any) -> dict[str, Any]:
    return {"event": event, "step": step, "time": START + time, **values}


def test_work_done_again_replaces_the_lost_work(tmp_path: Path) -> None:
    rows = [row("run", None, 0, run="r", total_steps=6)]
    rows += [row("train", s, s, loss=10.0 - s) for s in (1, 2, 3, 4)]
    rows += [row("run", None, 100, resumed_from=2), row("resume", 2, 100, previous_loss=8.0)]
    rows += [row("train", s, 100 + s, loss=9.0 - s) for s in (3, 4, 5)]
    history = History.read(write_run(tmp_path / "r", rows))
    assert history.series("train", "loss") == [(1, 9.0), (2, 8.0), (3, 6.0), (4, 5.0), (5, 4.0)]
    (stop,) = history.breaks()
    assert stop == (4, 2, 8.0, 6.0, "killed")
    assert history.wall_seconds() == pytest.approx(4 + 5)


def test_reads_what_the_sink_writes(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "r" / "events.jsonl")
    values = {"loss": torch.tensor(float("nan")), "load": torch.tensor([[0.25, 0.75]]), "gates": {3: [0.5]}}
    sink.write(Event("train", 1, values))
    sink.write(Event("train", 2, {"loss": torch.tensor(1.5), "seconds": {"data": 0.5}}))
    sink.close()
    history = History.read(tmp_path / "r")
    (_, first), (_, second) = history.series("train", "loss")
    assert first != first
    assert second == 1.5
    assert history.load() == [[(1, [0.25, 0.75])]]
    assert history.gates() == {"3": [(1, [0.5])]}
    assert history.series("train", "seconds", "data") == [(2, 0.5)]
    assert list_runs(tmp_path)[0].loss == 1.5


def test_breaks_of_a_planned_stop(tmp_path: Path) -> None:
    (stop,) = History.read(write_run(tmp_path / "r", events(60, stop=30))).breaks()
    assert (stop.stopped, stop.resumed, stop.reason) == (30, 30, "SIGTERM")


def test_numbers_for_people() -> None:
    assert [si(v) for v in (0, 7, 12.34, 999.9, 12345, 999_999, 3_412_224, 1.9e11, -4500, None, "nan")] == [
        "0", "7", "12.3", "1,000", "12.3k", "1.00M", "3.41M", "190G", "-4.50k", "–", "nan"
    ]  # fmt: skip
    assert [significant(v) for v in (0.367123, 31.0, 7.57e-4, 3e7, 0, "inf")] == [
        "0.367", "31.0", "7.57e-4", "3.00e7", "0", "inf"
    ]  # fmt: skip
    assert [duration(v) for v in (0.32, 7.5, 59.96, 90, 3723, 90_000, None)] == [
        "320 ms", "7.5 s", "1:00", "1:30", "1:02:03", "1 d 01:00", "–"
    ]  # fmt: skip
    assert [size(v) for v in (5, 1536, 41_000_000)] == ["5 B", "1.5 KiB", "39.1 MiB"]
    assert flops(1.9e11) == "190 GFLOP/s"
    assert one_line("a\nb\x1b[0m" + "c" * 300, 10) == "a b [0mcc…"


def test_numbers_out_of_odd_values() -> None:
    assert number("nan") != number("nan")
    assert number(torch.tensor([2.0])) == 2.0
    assert number(True) is None
    assert number(10**400) is None
    assert number(torch.ones(3)) is None
    assert finite("inf") is None
    assert numbers([1, "nan", None, "x"]) == [1.0, 0.0, 0.0, 0.0]
    assert numbers("x") == []
