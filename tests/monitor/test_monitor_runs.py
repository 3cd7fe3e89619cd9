"""The list of runs and what became of each."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from monitor_runs import START, events, write_run
from rich.console import Console

from deepseek.errors import RunError
from deepseek.monitor.runs import list_runs, render, summarize


def until(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Events up to the first one called ``name``, that one included."""
    return rows[: next(i for i, r in enumerate(rows) if r["event"] == name) + 1]


def with_pid(rows: list[dict[str, Any]], pid: int, when: float | None = None) -> list[dict[str, Any]]:
    return [{**r, "pid": pid, "time": when or r["time"]} if r["event"] == "run" else r for r in rows]


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_status_from_events_and_process(tmp_path: Path, dead_pid: int) -> None:
    rows = events(60, stop=30)
    half = rows[: next(i for i, r in enumerate(rows) if r["event"] == "interrupted")]
    now = 4e9  # later than the birth of this process, so the id is believed
    write_run(tmp_path / "finished", with_pid(rows, dead_pid))
    write_run(tmp_path / "crashed", with_pid(half, dead_pid))
    write_run(tmp_path / "interrupted", with_pid(until(rows, "interrupted"), dead_pid))
    write_run(tmp_path / "running", with_pid(half, os.getpid(), now))
    write_run(tmp_path / "resumed", with_pid([r for r in rows if r["event"] != "done"], os.getpid(), now))
    write_run(tmp_path / "empty", [])
    (tmp_path / "notes").mkdir()
    expected = {n: n for n in ("finished", "crashed", "interrupted", "running", "empty")} | {
        "resumed": "running"
    }
    assert {run.name: run.status for run in list_runs(tmp_path)} == expected


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_recycled_process_id_is_not_believed(tmp_path: Path) -> None:
    half = until(events(60, stop=30), "interrupted")[:-1]
    write_run(tmp_path / "old", with_pid(half, os.getpid()))  # this process was born long after START
    assert list_runs(tmp_path)[0].status == "crashed"


def test_summary_numbers_and_json(tmp_path: Path) -> None:
    rows = events(60, stop=30)
    directory = write_run(tmp_path / "r", rows)
    (directory / "step-000060").mkdir()
    (directory / "step-000060" / "model.safetensors").write_bytes(b"0" * 5000)
    (run,) = list_runs(tmp_path)
    last = [r for r in rows if r["event"] == "train"][-1]
    assert (run.step, run.total_steps, run.loss) == (60, 60, last["loss"])
    assert run.tokens_per_second == last["tokens_per_second"]
    assert run.started == START
    assert run.size == sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
    assert json.loads(json.dumps(run.to_dict()))["status"] == "finished"
    assert list_runs(directory) == [run] or list_runs(directory)[0].step == 60


def test_torn_last_lines_fall_back_to_the_step_before(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "r", events(20, stop=None)[:15])
    with (directory / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "train", "step": 99, "loss"')
    (run,) = list_runs(tmp_path)
    assert run.step is not None
    assert run.step < 20


def test_render_is_a_table_and_latest_comes_first(tmp_path: Path) -> None:
    write_run(tmp_path / "old", events(20, stop=None))
    write_run(tmp_path / "new", [{**r, "time": r["time"] + 1000} for r in events(20, stop=None)])
    out = Console(file=io.StringIO(), width=100)
    render(list_runs(tmp_path), out, now=START + 1600)
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [x.split()[0] for x in lines] == ["run", "new", "old"]
    assert "finished" in lines[1]
    assert "20/20" in lines[1]
    assert "ago" in lines[1]


def test_no_runs_and_wrong_root(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "none") == []
    out = Console(file=io.StringIO(), width=100)
    render([], out)
    assert "deepseek quickstart" in out.file.getvalue()  # type: ignore[attr-defined]
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file; expected a directory of runs"):
        list_runs(tmp_path / "file")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="where /proc tells")
def test_a_process_that_nobody_has_buried_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    try:
        while " Z " not in Path(f"/proc/{process.pid}/stat").read_text():
            time.sleep(0.01)
        directory = tmp_path / "run"
        directory.mkdir()
        event = {"event": "run", "step": 0, "pid": process.pid, "time": time.time()}
        (directory / "events.jsonl").write_text(json.dumps(event) + "\n")
        assert summarize(directory).status == "crashed"
    finally:
        process.wait()
