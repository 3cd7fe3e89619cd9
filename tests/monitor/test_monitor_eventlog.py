"""``EventLog``: a growing file read in pieces says the same as the file read at once."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from monitor_runs import events

from deepseek.monitor import eventlog
from deepseek.monitor.eventlog import EventLog
from deepseek.monitor.history import parse


def test_in_whatever_pieces_the_file_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = events(150, stop=80)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    rng = random.Random(1)
    for _ in range(5):
        monkeypatch.setattr(eventlog, "CHUNK", rng.choice([7, 100, 5000]))
        path = tmp_path / "events.jsonl"
        path.write_bytes(b"")
        log, at, told = EventLog(path), 0, []
        while at < len(data):
            size = rng.randrange(1, 4000)
            with path.open("ab") as file:
                file.write(data[at : at + size])
            at += size
            told += log.refresh()
        whole = [e for e in parse(data)[0] if e["event"] != "train"]
        assert log.rare == whole
        assert told == whole
        assert log.last("train") == [r for r in rows if r["event"] == "train"][-1]
        assert log.named("resume") == [r for r in rows if r["event"] == "resume"]
        path.unlink()


def test_a_torn_last_step_gives_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "train", "step": 1}\n{"event": "train", "step": \n{"event": "train", "st')
    log = EventLog(path)
    assert log.refresh() == []
    assert log.last("train")["step"] == 1
    assert log.last("evaluate") == {}


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "a"}\n{"event": "b"}\n')
    log = EventLog(path)
    log.refresh()
    path.write_text('{"event": "c"}\n')  # shorter
    assert [e["event"] for e in log.refresh()] == ["c"]
    other = tmp_path / "other"
    other.write_text('{"event": "d"}\n{"event": "e"}\n{"event": "f"}\n')
    other.replace(path)  # longer, and another file
    log.refresh()
    assert [e["event"] for e in log.rare] == ["d", "e", "f"]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        EventLog(tmp_path / "none").refresh()


def test_what_is_no_event_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(
        b'[1]\n{"event": 3}\n\n  \nnonsense\n{"event": "ok", "text": "\\"event\\": \\"train\\""}\n'
    )
    log = EventLog(path)
    log.refresh()
    assert log.unreadable == 3
    assert [e["event"] for e in log.rare] == ["ok"]
