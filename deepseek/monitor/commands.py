"""``Commands``: the queue of actions between whoever watches a run and the process that trains it.

It is the table ``commands`` of ``RUN/monitor/monitor.db`` (SQLite, write-ahead log): written by any number of
processes, taken by the trainer, each command once.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from deepseek.errors import RunError

Status = Literal["queued", "running", "done", "failed"]
DATABASE = "monitor/monitor.db"  #: in a run directory
_TABLE = """CREATE TABLE IF NOT EXISTS commands (
    id INTEGER PRIMARY KEY, action TEXT NOT NULL, arguments TEXT NOT NULL, by TEXT NOT NULL,
    status TEXT NOT NULL, result TEXT NOT NULL, created REAL NOT NULL, taken REAL, finished REAL)"""
SURE = 2.0  #: seconds after which ``changed`` says yes, whatever the files say
_COLUMNS = "id, action, arguments, by, status, result, created, finished"


@dataclass(frozen=True)
class Command:
    """One request: ``created`` and ``finished`` (``None``: not yet) are Unix times."""

    id: int
    action: str
    arguments: dict[str, Any]
    by: str
    status: Status
    result: dict[str, Any]
    created: float
    finished: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Commands:
    """The commands of one run; usable by several threads. Use as a context manager, or ``close`` it.

    Raises (every method):
        RunError: the database cannot be read or written.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / DATABASE
        self._log = self.path.with_name(self.path.name + "-wal")
        self._stamp: tuple[Any, ...] = ()
        self._asked = 0.0
        try:
            self._db = open_database(self.path, _TABLE)
        except (sqlite3.Error, OSError) as error:
            raise RunError(f"cannot open {self.path}: {error}") from None

    def enqueue(self, action: str, arguments: dict[str, Any], by: str = "", status: Status = "queued") -> int:
        """Ask for ``action``; returns the number of the request. 'running': somebody is at it already."""
        values = (action, json.dumps(arguments), by, status, "{}", time.time())
        found = self._run(
            "INSERT INTO commands (action, arguments, by, status, result, created) VALUES (?,?,?,?,?,?) RETURNING id",
            *values,
        )
        return int(found[0][0])

    def commands(self, status: str | None = None) -> list[Command]:
        """All requests, oldest first, or those of one status."""
        where, values = ("", ()) if status is None else (" WHERE status = ?", (status,))
        return [
            _command(row) for row in self._run(f"SELECT {_COLUMNS} FROM commands{where} ORDER BY id", *values)
        ]

    def take_command(self) -> Command | None:
        """The oldest request that is still queued, which is then running; ``None`` if there is none."""
        while waiting := self._run("SELECT id FROM commands WHERE status = 'queued' ORDER BY id LIMIT 1"):
            taken = self._run(
                "UPDATE commands SET status = 'running', taken = ? WHERE id = ? AND status = 'queued' "
                f"RETURNING {_COLUMNS}",
                time.time(),
                waiting[0][0],
            )
            if taken:
                return _command(taken[0])
        return None

    def finish_command(self, number: int, status: Status, result: dict[str, Any]) -> None:
        """Write down what came of a request."""
        text = json.dumps(result, default=str)
        self._run(
            "UPDATE commands SET status = ?, result = ?, finished = ? WHERE id = ?",
            status,
            text,
            time.time(),
            number,
        )

    def changed(self) -> bool:
        """Whether the database was written to since this was last asked: the look that costs least.

        Says yes every ``SURE`` seconds: the clock of a file system may be coarse.
        """
        now, stamp = time.monotonic(), tuple(_stamp(path) for path in (self.path, self._log))
        if stamp == self._stamp and now - self._asked < SURE:
            return False
        self._stamp, self._asked = stamp, now
        return True

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Commands:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, statement: str, *values: Any) -> list[Any]:
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise RunError(f"{self.path}: {error}") from None


def open_database(path: Path, tables: str) -> sqlite3.Connection:
    """A database with a write-ahead log, made if need be, with ``tables`` in it. Raises ``sqlite3.Error``, ``OSError``.

    Two that make it at the same moment would be refused: changing to the log waits for nobody, so it is tried again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for pause in (0.005, 0.02, 0.1, 0.4, 1.6, None):
        database = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            database.executescript(tables)
            return database
        except sqlite3.OperationalError:
            database.close()
            if pause is None:
                raise
            time.sleep(pause)
        except BaseException:
            database.close()
            raise
    raise AssertionError("the last try returns or raises")


@contextlib.contextmanager
def answering(run: Path | str, number: int | None) -> Iterator[dict[str, Any]]:
    """What is put into the dictionary is the answer to a request, and so is an error; ``None``: nobody asked."""
    answer: dict[str, Any] = {}
    try:
        yield answer
    except BaseException as error:
        if number is not None:
            with open_commands(Path(run)) as commands:
                commands.finish_command(number, "failed", {"error": str(error) or type(error).__name__})
        raise
    if number is not None:
        with open_commands(Path(run)) as commands:
            commands.finish_command(number, "done", answer)


def open_commands(run: Path) -> Commands:
    """The commands of a run directory."""
    return Commands(run)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _command(row: Any) -> Command:
    number, action, arguments, by, status, result, created, finished = row
    return Command(number, action, _object(arguments), by, status, _object(result), created, finished)


def _object(text: Any) -> dict[str, Any]:
    """What a row keeps as JSON. A damaged one is not empty, or the trainer would do what it does not know fully."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        found = None
    return found if isinstance(found, dict) else {"damaged": True}
