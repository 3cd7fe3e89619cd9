"""``RunStore``: everything that is known of a run and is not in ``events.jsonl``, in the directory ``RUN/monitor``.

Series are files of their own (``deepseek.monitor.series``). What is rare and must be searched and changed (alerts,
incidents, notes, commands, lineage, samples) is in one SQLite database with a write-ahead log, which any number of
processes use at once. A run directory is self-contained; looking at one writes nothing into it.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time as clock
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any
from urllib.parse import quote

from deepseek.errors import RunError
from deepseek.monitor.commands import DATABASE, Command, Commands, Status, open_database
from deepseek.monitor.series import SeriesReader, SeriesWriter

TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS alerts (id INTEGER PRIMARY KEY, time REAL NOT NULL, step INTEGER, name TEXT NOT NULL,
    severity TEXT NOT NULL, text TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS incidents (id TEXT PRIMARY KEY, time REAL NOT NULL, step INTEGER, status TEXT NOT NULL,
    data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS notes (id INTEGER PRIMARY KEY, time REAL NOT NULL, step INTEGER, by TEXT NOT NULL,
    text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS lineage (id INTEGER PRIMARY KEY, time REAL NOT NULL, step INTEGER, kind TEXT NOT NULL,
    data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS samples (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, data TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS samples_by_step ON samples (step);
"""
STATUSES = ("open", "acknowledged", "resolved")  #: of incidents
SEVERITIES = ("info", "warning", "critical")
#: what is found out about an incident after it was reported; a report that lacks it does not take it away
LEARNT = ("samples", "actions", "gradient_map")


class RunStore:
    """The store of one run. Threads may share it. Use as a context manager, or ``close`` it.

    Raises (every method but ``series`` and ``writer``):
        RunError: the database is damaged, or cannot be read or written.
    """

    def __init__(self, run: Path | str) -> None:
        self.run = Path(run)
        self.path = self.run / DATABASE
        self._lock = RLock()
        self._db: sqlite3.Connection | None = None
        self._has_tables = False  #: and may be written
        self._queue: Commands | None = None
        self._reader: SeriesReader | None = None
        self._pid = os.getpid()

    @property
    def series(self) -> SeriesReader:
        """The run's series, as they were when this was first asked for; ``refresh`` them for what is new."""
        with self._lock:
            if self._reader is None:
                self._reader = SeriesReader(self.path.parent)
            return self._reader

    def writer(self, label: str = "", *, mapped: bool = True) -> SeriesWriter:
        """A new writer of series; each process, or rank, has its own.

        ``label`` says whose: 'rank3'; ``mapped`` as for ``SeriesWriter``.
        """
        return SeriesWriter(self.path.parent, label=label, mapped=mapped)

    def add_alert(
        self,
        name: str,
        text: str,
        *,
        step: int | None = None,
        severity: str = "warning",
        time: float | None = None,
        **data: Any,
    ) -> int:
        """Write down that ``name`` (a series, a rule, ...) needs attention; returns the alert's number."""
        if severity not in SEVERITIES:
            raise RunError(f"severity {severity!r} is none of {', '.join(SEVERITIES)}")
        values = (_now(time), step, name, severity, text, _json(data))
        return self._insert("alerts", ("time", "step", "name", "severity", "text", "data"), values)

    def alerts(self, after: int = 0) -> list[dict[str, Any]]:
        """Alerts with a number above ``after``, oldest first: id, time, step, name, severity, text, data."""
        columns = ("id", "time", "step", "name", "severity", "text", "data")
        return self._select("alerts", columns, "WHERE id > ? ORDER BY id", after)

    def put_incident(self, incident: Mapping[str, Any], time: float | None = None) -> str:
        """Keep an incident, or the new state of one with the same ``id``; returns the id.

        A status that a person has set, and samples and actions already known, are kept.
        """
        found = dict(incident)
        key = str(found.get("id") or secrets.token_hex(6))
        with self._lock:
            self._run("BEGIN IMMEDIATE", write=True)
            try:
                before = self._one(key)
                if before is not None:
                    found.update({k: before[k] for k in LEARNT if before.get(k) and not found.get(k)})
                    if found.get("status", "open") == "open":
                        found["status"] = before["status"]
                found = {"status": "open", **found, "id": key}
                found.setdefault("time", before["time"] if before else _now(time))
                self._run(
                    "INSERT OR REPLACE INTO incidents (id, time, step, status, data) VALUES (?, ?, ?, ?, ?)",
                    key, found["time"], found.get("step"), found["status"], _json(found),
                )  # fmt: skip
            except BaseException:
                self._run("ROLLBACK")
                raise
            self._run("COMMIT")
        return key

    def incidents(self, status: str | None = None) -> list[dict[str, Any]]:
        """Every incident, or those of one status, by step and time."""
        where = "" if status is None else "WHERE status = ? "
        rows = self._run(
            f"SELECT data FROM incidents {where}ORDER BY step, time, id",
            *([] if status is None else [status]),
        )
        return [_loads(row[0]) for row in rows]

    def incident(self, key: str | int) -> dict[str, Any]:
        """One incident.

        Raises:
            RunError: there is none with this id.
        """
        found = self._one(str(key))
        if found is None:
            raise RunError(f"{self.run} has no incident '{key}'")
        return found

    def set_status(self, key: str | int, status: str) -> dict[str, Any]:
        """Mark an incident as open, acknowledged or resolved; returns it.

        Raises:
            RunError: there is no such incident or status.
        """
        if status not in STATUSES:
            raise RunError(f"an incident is {', '.join(STATUSES)}, not {status!r}")
        return self.change_incident(key, status=status)

    def change_incident(self, key: str | int, **values: Any) -> dict[str, Any]:
        """Set fields of an incident (``samples=...``, ``actions=...``); returns it. Raises as ``incident``."""
        with self._lock:
            self._run("BEGIN IMMEDIATE", write=True)
            try:
                found = {**self.incident(key), **values}
                self._run(
                    "UPDATE incidents SET data = ?, status = ? WHERE id = ?",
                    _json(found),
                    found["status"],
                    str(key),
                )
            except BaseException:
                self._run("ROLLBACK")
                raise
            self._run("COMMIT")
            return found

    def add_note(self, text: str, *, step: int | None = None, by: str = "", time: float | None = None) -> int:
        """Keep a remark about the run, or about one step of it; returns its number."""
        return self._insert("notes", ("time", "step", "by", "text"), (_now(time), step, by, text))

    def notes(self) -> list[dict[str, Any]]:
        """Every note, oldest first: id, time, step, by, text."""
        return self._select("notes", ("id", "time", "step", "by", "text"), "ORDER BY id")

    def add_lineage(self, kind: str, step: int | None = None, time: float | None = None, **data: Any) -> int:
        """Write down where the run comes from or what it made: 'run', 'resume', 'checkpoint', 'export', ..."""
        return self._insert(
            "lineage", ("time", "step", "kind", "data"), (_now(time), step, kind, _json(data))
        )

    def lineage(self) -> list[dict[str, Any]]:
        """Every line, oldest first: id, time, step, kind, data."""
        return self._select("lineage", ("id", "time", "step", "kind", "data"), "ORDER BY id")

    def add_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Keep what is known of documents of a step's batch: row, source, path, offset, loss, text, ..."""
        with self._lock:
            for sample in samples:
                self._insert("samples", ("step", "data"), (step, _json(dict(sample))))

    def samples(self, start: int, stop: int | None = None) -> list[dict[str, Any]]:
        """Samples of the steps from ``start`` to ``stop`` (by default only ``start``), each with its ``step``."""
        where = "WHERE step BETWEEN ? AND ? ORDER BY step, id"
        rows = self._select("samples", ("step", "data"), where, start, start if stop is None else stop)
        return [{**row["data"], "step": row["step"]} for row in rows]

    def set_meta(self, key: str, value: Any) -> None:
        """Keep one value (anything JSON can hold) under ``key``."""
        self._run("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", key, _json(value), write=True)

    def meta(self, key: str, default: Any = None) -> Any:
        """The value kept under ``key``."""
        rows = self._run("SELECT value FROM meta WHERE key = ?", key)
        return _loads(rows[0][0]) if rows else default

    def enqueue(self, action: str, arguments: Mapping[str, Any] | None = None, by: str = "") -> int:
        """Ask the trainer for ``action``; returns the number of the request (see ``monitor.control``)."""
        return self._commands().enqueue(action, dict(arguments or {}), by)

    def commands(self, status: Status | None = None) -> list[Command]:
        """Requests, oldest first, or those of one status."""
        columns = ("id", "action", "arguments", "by", "status", "result", "created", "finished")
        rows = self._select("commands", columns, "ORDER BY id")
        found = [
            Command(**{**row, "arguments": _loads(row["arguments"]), "result": _loads(row["result"])})
            for row in rows
        ]
        return [command for command in found if status is None or command.status == status]

    def take_command(self) -> Command | None:
        """The oldest request that nobody took; it is taken by this."""
        return self._commands().take_command() if self.path.exists() else None

    def finish_command(self, number: int, status: Status, result: Mapping[str, Any] | None = None) -> None:
        """Write down what came of a request."""
        self._commands().finish_command(number, status, dict(result or {}))

    def close(self) -> None:
        """Close the database. Whatever is called later opens it again."""
        with self._lock:
            if self._pid == os.getpid():
                for opened in (self._db, self._queue):
                    if opened is not None:
                        opened.close()
            self._db = self._queue = self._reader = None
            self._has_tables = False

    def __enter__(self) -> RunStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _commands(self) -> Commands:
        with self._lock:
            self._check_process()
            if self._queue is None:
                self._queue = Commands(self.run)
            return self._queue

    def _one(self, key: str) -> dict[str, Any] | None:
        rows = self._run("SELECT data FROM incidents WHERE id = ?", key)
        return _loads(rows[0][0]) if rows else None

    def _insert(self, table: str, columns: tuple[str, ...], values: tuple[Any, ...]) -> int:
        marks = ", ".join("?" * len(columns))
        statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks}) RETURNING id"
        return int(self._run(statement, *values, write=True)[0][0])

    def _select(self, table: str, columns: tuple[str, ...], rest: str, *values: Any) -> list[dict[str, Any]]:
        rows = [
            dict(zip(columns, row))
            for row in self._run(f"SELECT {', '.join(columns)} FROM {table} {rest}", *values)
        ]
        for row in rows:
            if "data" in row:
                row["data"] = _loads(row["data"])
        return rows

    def _run(self, statement: str, *values: Any, write: bool = False) -> list[Any]:
        with self._lock:
            try:
                database = self._open(write)
                return [] if database is None else database.execute(statement, values).fetchall()
            except (sqlite3.Error, OSError) as error:
                if not write and str(error).startswith("no such table"):
                    return []  # what was never kept
                raise RunError(self._why(error)) from None

    def _open(self, write: bool) -> sqlite3.Connection | None:
        """The database; reading one that is not there makes none."""
        self._check_process()
        if self._db is not None and write and not self._has_tables:
            self._db.close()
            self._db = None
        if self._db is None and write:
            self._db, self._has_tables = open_database(self.path, TABLES), True
        elif self._db is None and self.path.exists():
            self._db = _readable(self.path)
        return self._db

    def _check_process(self) -> None:
        """A forked child has connections that only its parent may use."""
        if self._pid != os.getpid():
            self._pid, self._db, self._queue, self._has_tables = os.getpid(), None, None, False

    def _why(self, error: Exception) -> str:
        text = f"{self.path}: {error}"
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            text += (
                "; move it away to go on without its incidents and notes (series and events are not in it)"
            )
        return text


def _connected(address: str, uri: bool = False) -> sqlite3.Connection:
    database = sqlite3.connect(address, timeout=10.0, isolation_level=None, check_same_thread=False, uri=uri)
    try:
        database.execute("SELECT name FROM sqlite_master").fetchall()  # it can be read
    except BaseException:
        database.close()
        raise
    return database


def _readable(path: Path) -> sqlite3.Connection:
    """A database to read from, also where nothing may be written."""
    if os.access(path.parent, os.W_OK):
        return _connected(str(path))
    address = f"file:{quote(str(path.absolute()))}"
    try:
        return _connected(f"{address}?mode=ro", uri=True)
    except sqlite3.OperationalError:  # the write-ahead log's index cannot be made
        return _connected(f"{address}?immutable=1", uri=True)


def _now(time: float | None) -> float:
    return clock.time() if time is None else time


def _json(value: Any) -> str:
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON lacks: NumPy's and torch's numbers and arrays as Python's, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {}


__all__ = ["DATABASE", "SEVERITIES", "STATUSES", "RunStore"]
