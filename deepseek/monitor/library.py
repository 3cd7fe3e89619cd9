"""``Library``: the runs below a directory.

A run is known by its path below the root with ``~`` for ``/``. Ids are looked up among the runs that a scan found and
never joined to a path, so an id cannot lead out of the root.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path
from threading import RLock

from deepseek.errors import DeepseekError, RunError
from deepseek.monitor.history import EVENTS_FILE
from deepseek.monitor.openrun import STORE, OpenRun

DEPTH = 3  #: levels below the root in which runs are looked for
RESCAN = 2.0  #: seconds for which the list of runs is good


class UnknownRun(RunError):
    """There is no run of that id below the root."""


class Library:
    """The runs below ``root``, which may itself be one run. Directories may come and go at any time.

    Raises:
        RunError: ``root`` is a file.
    """

    def __init__(self, root: Path | str, cache: Path | None = None) -> None:
        self.root, self.cache = Path(root), cache
        if self.root.is_file():
            raise RunError(f"{root} is a file; expected a run directory, or a directory of runs like runs/")
        self._lock = RLock()
        self._open: dict[str, OpenRun] = {}
        self._found: dict[str, Path] = {}
        self._scanned, self._closed = -RESCAN, False

    def ids(self) -> list[str]:
        """The ids of all runs, in the order of their names."""
        with self._lock:
            if time.monotonic() - self._scanned >= RESCAN:
                self._scan()
            return list(self._found)

    def run(self, name: str) -> OpenRun:
        """The run called ``name``, kept open between calls. Raises ``UnknownRun``."""
        with self._lock:
            if name not in self._found or not _is_run(self._found[name]):
                self._scan()
            if name not in self._found:
                raise UnknownRun(f"no run {name[:200]!r} below {self.root}")
            if name not in self._open:
                self._open[name] = OpenRun(name, self._found[name], self.cache)
            return self._open[name]

    def warm(self) -> None:
        """Open every run, so that who asks first does not wait for it; ends when the library is closed."""
        for name in self.ids():
            if self._closed:
                return
            with contextlib.suppress(OSError, DeepseekError, sqlite3.Error):
                self.run(name).summary()

    def close(self) -> None:
        self._closed = True
        with self._lock:
            for run in self._open.values():
                run.close()
            self._open.clear()

    def _scan(self) -> None:
        if _is_run(self.root):
            self._found = {_id(Path(self.root.resolve().name or "run")): self.root}
        else:
            self._found = {_id(p.relative_to(self.root)): p for p in _runs(self.root, DEPTH)}
        for name in self._open.keys() - self._found.keys():
            self._open.pop(name).close()
        self._scanned = time.monotonic()


def _id(path: Path) -> str:
    """A name for a URL and for JSON: bytes that are no UTF-8 are written as such."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace").replace("/", "~")


def _is_run(path: Path) -> bool:
    return (path / EVENTS_FILE).is_file() or (path / STORE).is_dir()


def _runs(root: Path, depth: int) -> list[Path]:
    """Run directories below ``root``; nothing inside a run and nothing hidden is looked at."""
    found = []
    try:
        with os.scandir(root) as entries:
            below = sorted(Path(e.path) for e in entries if not e.name.startswith(".") and e.is_dir())
    except OSError:
        return []
    for path in below:
        if _is_run(path):
            found.append(path)
        elif depth > 1:
            found += _runs(path, depth - 1)
    return found
