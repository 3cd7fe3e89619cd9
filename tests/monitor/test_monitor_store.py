"""The database of a run: kept, changed by several processes, damaged."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from deepseek.errors import RunError
from deepseek.monitor.commands import open_commands
from deepseek.monitor.store import RunStore

INCIDENT = {
    "id": "spike-31",
    "step": 31,
    "kind": "loss_spike",
    "severity": "critical",
    "status": "open",
    "samples": [],
}


def test_looking_at_a_run_writes_nothing(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert store.alerts() == store.incidents() == store.notes() == store.lineage() == store.samples(1) == []
    assert store.commands() == []
    assert store.take_command() is None
    assert store.meta("x", 3) == 3
    assert store.series.names() == []
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_everything_kept_is_read_back_by_another_store(tmp_path: Path) -> None:
    with RunStore(tmp_path) as store:
        first = store.add_alert("train/loss", "8.0 is unusual", step=31, severity="critical", value=8.0)
        second = store.add_alert("train/loss", "still")
        store.add_note("looks odd", step=31, by="ann")
        store.add_lineage("checkpoint", 20, path="step-000020", bytes=12)
        store.add_samples(
            31, [{"row": 0, "path": "a.txt", "loss": 9.5}, {"row": 1, "path": "b.txt", "loss": 1.5}]
        )
        store.set_meta("name", {"title": "mine"})
        with store.writer("rank0") as writer:
            writer.log(1, {"x": 1.0})
    with RunStore(tmp_path) as store:
        alerts = store.alerts()
        assert [a["id"] for a in alerts] == [first, second]
        assert alerts[0]["data"] == {"value": 8.0}
        assert alerts[0]["severity"] == "critical"
        assert store.alerts(after=first) == alerts[1:]
        assert [(n["text"], n["step"], n["by"]) for n in store.notes()] == [("looks odd", 31, "ann")]
        assert store.lineage()[0]["data"] == {"path": "step-000020", "bytes": 12}
        assert [s["path"] for s in store.samples(31)] == ["a.txt", "b.txt"]
        assert store.samples(0, 30) == []
        assert store.meta("name") == {"title": "mine"}
        assert store.series.last() == {"x": 1.0}


def test_an_incident_keeps_what_was_learnt_of_it(tmp_path: Path) -> None:
    with RunStore(tmp_path) as store:
        assert store.put_incident(INCIDENT) == "spike-31"
        store.set_status("spike-31", "acknowledged")
        store.change_incident("spike-31", samples=[{"row": 3}])
        store.put_incident({**INCIDENT, "summary": "it went on"})  # the detector reports it again
        found = store.incident("spike-31")
        assert (found["status"], found["samples"], found["summary"]) == (
            "acknowledged",
            [{"row": 3}],
            "it went on",
        )
        store.put_incident({**INCIDENT, "status": "resolved"})
        assert store.incidents("resolved")[0]["id"] == "spike-31"
        other = store.put_incident({"step": 5, "kind": "slow"})
        assert [i["id"] for i in store.incidents()] == [other, "spike-31"]
        for wrong in (lambda: store.incident("none"), lambda: store.set_status(other, "closed")):
            with pytest.raises(RunError):
                wrong()
        store.put_incident({"id": 7, "step": 1})
        assert store.incident(7)["step"] == 1  # the store is not left inside a transaction


def test_commands_are_taken_once(tmp_path: Path) -> None:
    with RunStore(tmp_path) as asks, RunStore(tmp_path) as trains:
        assert trains.take_command() is None
        number = asks.enqueue("checkpoint", {"why": "now"}, by="page")
        taken = trains.take_command()
        assert taken is not None
        assert (taken.id, taken.action, taken.arguments, taken.by) == (
            number,
            "checkpoint",
            {"why": "now"},
            "page",
        )
        assert asks.take_command() is None
        trains.finish_command(number, "done", {"path": "step-000003"})
        assert asks.commands("done")[0].result == {"path": "step-000003"}


def test_a_store_is_read_where_nothing_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a read-only file system SQLite cannot make the files that a write-ahead log needs."""
    with RunStore(tmp_path) as store:
        store.put_incident(INCIDENT)
        store.enqueue("pause", {"a": 1})
    monkeypatch.setattr(os, "access", lambda *args: False)
    connect, asked = sqlite3.connect, list[str]()

    def readonly(address: str, **options: object) -> sqlite3.Connection:
        asked.append(str(address))
        if "immutable=1" not in str(address):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(address, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(sqlite3, "connect", readonly)
    with RunStore(tmp_path) as store:
        assert store.incidents()[0]["id"] == "spike-31"
        assert store.commands()[0].arguments == {"a": 1}
        assert store.notes() == []
        with pytest.raises(RunError, match="unable to open"):
            store.add_note("x")
    assert "mode=ro" in asked[0]


def test_tables_that_were_never_made_are_empty(tmp_path: Path) -> None:
    with open_commands(tmp_path) as commands:  # makes the database, with a table of its own
        commands.enqueue("pause", {})
    with RunStore(tmp_path) as store:
        assert store.incidents() == store.alerts() == []
        assert len(store.commands("queued")) == 1
        store.add_note("x")
        assert len(store.notes()) == 1


def test_threads_and_processes_write_at_once(tmp_path: Path) -> None:
    code = f"""
    from deepseek.monitor.store import RunStore
    with RunStore({str(tmp_path)!r}) as store:
        for i in range(50):
            store.add_note(f"process {{i}}")
            store.put_incident({{"id": "shared", "step": i}})
    """
    processes = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)]) for _ in range(2)]
    with RunStore(tmp_path) as store:

        def work() -> None:
            for i in range(50):
                store.add_note(f"thread {i}")
                store.change_incident(store.put_incident({"id": "shared", "step": i}), text=str(i))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [p.wait(60) for p in processes] == [0, 0]
        assert len(store.notes()) == 200
        assert len(store.incidents()) == 1


def test_a_damaged_database_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with RunStore(tmp_path) as store:
        store.add_note("x")
    (tmp_path / "monitor" / "monitor.db").write_bytes(b"no database at all" * 300)
    with RunStore(tmp_path) as store:
        for use in (
            store.notes,
            store.alerts,
            lambda: store.add_note("y"),
            lambda: store.put_incident(INCIDENT),
        ):
            with pytest.raises(RunError, match="move it away"):
                use()
        with pytest.raises(RunError):
            store.commands()
