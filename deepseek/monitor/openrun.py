"""``OpenRun``: one run directory as the dashboard reads it. Its files may grow, tear or vanish at any moment."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from deepseek.errors import RunError
from deepseek.monitor.catalogue import describe, group_of
from deepseek.monitor.commands import DATABASE
from deepseek.monitor.eventlog import EventLog
from deepseek.monitor.follow import newest_step
from deepseek.monitor.history import EVENTS_FILE, EventDict
from deepseek.monitor.replay import Replay
from deepseek.monitor.runs import SILENT, status_of
from deepseek.monitor.series import Latest, SeriesReader, Window
from deepseek.monitor.store import RunStore
from deepseek.monitor.units import finite

STORE = "monitor"  #: the directory in a run that holds its store
LOSSES = (
    "train/loss",
    "loss",
    "eval/loss",
)  #: what stands for a run in the list of runs: the first that it has
SPARK = 48  #: points of the small loss curve in the list of runs
FRESH = 0.1  #: seconds for which what was read of the files is good
MOST_KEPT = 1_000_000  #: points of windows that are kept in memory
MOST_CELLS = 500_000  #: of the heat maps of one answer
CONFIG_BYTES = 256 << 10


class OpenRun:
    """One run. Thread-safe.

    Raises (every method):
        OSError: the directory vanished or cannot be read.
        RunError: its store is damaged.
    """

    def __init__(self, name: str, path: Path, cache: Path | None = None) -> None:
        self.name, self.path, self.cache = name, path, cache
        self.lock = RLock()
        self.log = EventLog(path / EVENTS_FILE)
        self._refreshed, self._inodes = -FRESH, (0, 0)
        self._spark: tuple[int, list[float | None]] = (-1, [])
        self._windows: dict[tuple[Any, ...], Window] = {}
        self._windows_of, self._windows_size = (0, -1), 0
        self._store: RunStore | None = None
        self._incidents: tuple[tuple[int, ...], list[dict[str, Any]]] = ((), [])
        self._replay: Replay | None = None
        self._reader: SeriesReader | None = None

    @property
    def reader(self) -> SeriesReader:
        """The run's series; those of a run that keeps none are rebuilt from its events."""
        with self.lock:
            if self._reader is None or (self._replay is not None and _has_series(self.path / STORE)):
                self._open()
            assert self._reader is not None
            return self._reader

    def _open(self) -> None:
        own = self.path / STORE
        if _has_series(own) or not (self.path / EVENTS_FILE).exists():
            self._close_replay()
            self._reader = SeriesReader(own)
        else:
            self._replay = Replay(self.path / EVENTS_FILE, self.cache)
            self._replay.catch_up()
            self._reader = SeriesReader(self._replay.directory)

    def refresh(self) -> None:
        """Look at the files again, unless that was a moment ago.

        Raises:
            FileNotFoundError: the run is gone.
        """
        with self.lock:
            if time.monotonic() - self._refreshed < FRESH:
                return
            self._look_for_itself()
            with contextlib.suppress(FileNotFoundError):
                self.log.refresh()
            reader = self.reader
            if self._replay is not None:
                self._replay.catch_up()
            reader.refresh()
            self._refreshed = time.monotonic()

    def _look_for_itself(self) -> None:
        """A directory that is gone, or another one of the same name: nothing known of the old one holds."""
        try:
            inodes = (self.path.stat().st_ino, _stamp(self.path / STORE)[2])
        except OSError:
            self.close()
            raise FileNotFoundError(errno.ENOENT, "no such run", str(self.path)) from None
        if any(old and old != new for old, new in zip(self._inodes, inodes)):
            self.close()
        self._inodes = inodes

    def wait(self) -> None:
        """Until a store that is rebuilt from events is complete."""
        self.refresh()
        while self._replay is not None and self._replay.busy:
            time.sleep(0.05)
        self._refreshed = -FRESH
        self.refresh()

    def close(self) -> None:
        with self.lock:
            self._close_replay()
            self._reader, self._windows, self._incidents = None, {}, ((), [])
            if self._store is not None:
                self._store.close()
                self._store = None

    def _close_replay(self) -> None:
        if self._replay is not None:
            self._replay.close()
            self._replay = None

    def facts(self) -> EventDict:
        """Every field ever given by a ``run`` event, the latest value of each."""
        merged: EventDict = {}
        for event in self.log.named("run"):
            merged.update({k: v for k, v in event.items() if v is not None and k != "event"})
        return merged

    def summary(self) -> dict[str, Any]:
        """The row of this run in the list of runs. ``loss`` in nats per token, times as Unix seconds."""
        with self.lock:
            self.refresh()
            facts, train, latest = self.facts(), self.log.last("train"), self.reader.latest()
            rare = self.log.rare
            seen = [finite(e.get("time")) for e in [*rare[:1], *rare[-1:], train]]
            times = [t for t in seen if t is not None]
            times += [newest.time for newest in latest.values()]
            updated = max(times, default=None)
            step = self.step
            return {
                "id": self.name,
                "name": self.name.replace("~", "/"),
                "status": self._status(rare, train, updated),
                "step": step,
                "total_steps": facts.get("total_steps"),
                "loss": _value(latest, *LOSSES),
                "tokens_per_second": _value(latest, "train/tokens_per_second"),
                "started": min(times, default=None),
                "updated": updated,
                **self._open_incidents(),
                "device": facts.get("device"),
                "parameters": facts.get("parameters"),
                "spark": self._spark_of(step),
            }

    def detail(self) -> dict[str, Any]:
        """The summary, with the facts, the config, the checkpoints and the pages that have content."""
        return {
            **self.summary(),
            "facts": self.facts(),
            "config": self._config(),
            "checkpoints": self._checkpoints(),
            "pages": self._pages(),
            "breaks": [e for e in self.log.rare if e["event"] in ("interrupted", "resume", "done")],
        }

    @property
    def step(self) -> int | None:
        """The newest step, ``None`` before the first."""
        return newest_step(self.reader)

    def series(self) -> list[dict[str, Any]]:
        """Every series with its group, unit, description, newest value and the step of it."""
        with self.lock:
            self.refresh()
            return [_described(name, newest) for name, newest in self.reader.latest().items()]

    def window(self, name: str, start: int | None, stop: int | None, points: int) -> dict[str, Any]:
        """One series between two steps at no more than ``points`` points, as the page draws it."""
        with self.lock:
            return window_dict(self._read(name, start, stop, points))

    def _read(self, name: str, start: int | None, stop: int | None, points: int) -> Window:
        """A window, kept for who asks for the same of the same state: another client, another look."""
        state = (id(self.reader), self.reader.version)
        if state != self._windows_of:
            self._windows_of, self._windows, self._windows_size = state, {}, 0
        key = (name, start, stop, points)
        found = self._windows.get(key)
        if found is None:
            found = self._windows[key] = self.reader.read(name, start, stop, points=points)
            self._windows_size += len(found)
            while self._windows_size > MOST_KEPT and len(self._windows) > 1:
                self._windows_size -= len(self._windows.pop(next(iter(self._windows))))
        return found

    def table(
        self, names: list[str], label: str, start: int | None, stop: int | None, points: int
    ) -> dict[str, Any]:
        """Several series on one axis: ``{"steps": [n], label: [names][n]}``, the mean of each point."""
        with self.lock:
            windows = [self._read(name, start, stop, points) for name in names]
        steps = np.unique(np.concatenate([w.step for w in windows])) if windows else np.empty(0, np.int64)
        values = np.full((len(windows), len(steps)), np.nan, np.float32)
        for row, window in zip(values, windows):
            row[np.searchsorted(steps, window.step)] = window.mean
        return {"steps": steps, label: values}

    def experts(self, start: int | None, stop: int | None, points: int) -> list[dict[str, Any]]:
        """For every expert layer the newest load of each expert, the router's figures, and the load over time."""
        with self.lock:
            self.refresh()
            last, layers = self.reader.last(), dict[int, list[tuple[int, str]]]()
            for name in self.reader.names():
                parts = name.split("/")
                if len(parts) == 4 and parts[0] == "expert" and parts[3] == "load":
                    layers.setdefault(int(parts[1]), []).append((int(parts[2]), name))
            points = min(points, MOST_CELLS // max(1, sum(map(len, layers.values()))))
            found = []
            for index, experts in sorted(layers.items()):
                names = [name for _, name in sorted(experts)]
                router = {
                    k: last.get(f"router/{index}/{k}") for k in ("entropy", "max_vio", "dead", "coverage")
                }
                history = self.table(names, "load", start, stop, max(points, 2))
                biases = [last.get(name.removesuffix("load") + "bias") for name in names]
                load = [last.get(name) for name in names]
                found.append({"index": index, "load": load, "bias": biases, **router, "history": history})
            return found

    @property
    def store(self) -> RunStore:
        """What is known of the run beside its series and events. Reading it makes no files."""
        with self.lock:
            if self._store is None:
                self._store = RunStore(self.path)
            return self._store

    def stamp(self) -> tuple[int, ...]:
        """Changes whenever another process changes the store's database."""
        return tuple(x for suffix in ("", "-wal") for x in _stamp(self.path / f"{DATABASE}{suffix}"))

    def incidents(self) -> list[dict[str, Any]]:
        """Every incident, by step."""
        with self.lock:
            stamp = self.stamp()
            if stamp != self._incidents[0]:
                self._incidents = stamp, self.store.incidents()
            return self._incidents[1]

    def _status(self, rare: list[EventDict], train: EventDict, updated: float | None) -> str:
        """What became of the run. Of one on another machine, whose processes cannot be seen, its silence tells."""
        status = status_of(rare, train, self.log.last("run"), updated)
        writers = self.reader.writers()
        if status not in ("crashed", "empty") or not writers:
            return status
        newest = max(writers, key=lambda w: finite(w.get("created")) or 0.0)
        if newest.get("host") != socket.gethostname():
            quiet = time.time() - (updated or 0.0)
            return "running" if quiet < SILENT else "finished" if status == "empty" else status
        if status == "empty":  # a store without events: somebody's own loop
            return status_of(
                [{"event": "run", **newest}], train, {**newest, "time": newest.get("created")}, updated
            )
        return status

    def _open_incidents(self) -> dict[str, Any]:
        """A database that is damaged hides its incidents and nothing else of the run."""
        try:
            return {"incidents_open": sum(i.get("status") == "open" for i in self.incidents())}
        except RunError as error:
            return {"incidents_open": None, "store_error": str(error)}

    def _spark_of(self, step: int | None) -> list[float | None]:
        name = _first(self.reader.latest(), LOSSES)
        if step is None or name is None:
            return []
        if step != self._spark[0]:
            mean = self.reader.read(name, points=SPARK).mean
            self._spark = (step, [finite(float(v)) for v in mean])
        return self._spark[1]

    def _config(self) -> str:
        try:
            with (self.path / "config.toml").open(encoding="utf-8", errors="replace") as file:
                return file.read(CONFIG_BYTES)
        except OSError:
            return ""

    def _checkpoints(self) -> list[dict[str, Any]]:
        saved = {e.get("step"): e for e in self.log.named("checkpoint")}
        found = []
        for path in sorted(self.path.glob("step-*/manifest.json")):
            digits = path.parent.name.removeprefix("step-")
            if digits.isdigit():
                event = saved.get(int(digits), {})
                keys = ("time", "bytes", "seconds", "metric")
                found.append({"step": int(digits), **{k: event[k] for k in keys if k in event}})
        return found

    def _pages(self) -> list[str]:
        names = self.reader.names()
        starts = {"experts": ("expert/", "router/"), "data": ("data/",), "precision": ("precision/",),
                  "alignment": ("align/",)}  # fmt: skip
        found = [page for page, prefixes in starts.items() if any(n.startswith(prefixes) for n in names)]
        with contextlib.suppress(RunError):
            found += ["lineage"] if self.store.lineage() or self.log.named("rollback") else []
        return found + (["inspect"] if self._checkpoints() else [])


def light(incident: dict[str, Any]) -> dict[str, Any]:
    """An incident without what is heavy; that comes when it is opened."""
    return {key: value for key, value in incident.items() if key not in ("gradient_map", "samples")}


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_mtime_ns, status.st_size, status.st_ino)


def _has_series(directory: Path) -> bool:
    return any(directory.glob("*.journal"))


def _described(name: str, newest: Latest) -> dict[str, Any]:
    """A row of the list of series."""
    metric = describe(name)
    return {
        "name": name, "group": group_of(name), "unit": metric.unit if metric else "",
        "better": metric.better if metric else "",
        "description": {"en": metric.en, "zh": metric.zh} if metric else {},
        "last": np.float32(newest.value), "step": newest.step,
    }  # fmt: skip


def _first(latest: dict[str, Latest], names: Iterable[str]) -> str | None:
    return next((name for name in names if name in latest), None)


def _value(latest: dict[str, Latest], *names: str) -> Any:
    name = _first(latest, names)
    return None if name is None else np.float32(latest[name].value)


def window_dict(window: Window) -> dict[str, Any]:
    """A ``Window`` for the page: arrays, and ``nonfinite`` as ``[[step, "nan" | "inf" | "-inf"], …]``."""
    low, high, mean = (np.ascontiguousarray(a) for a in (window.low, window.high, window.mean))
    bad = [[step, str(value)] for step, value in zip(window.bad_steps.tolist(), window.bad_values.tolist())]
    return {"step": np.ascontiguousarray(window.step), "low": low, "high": high, "mean": mean, "raw": window.raw,
            "nonfinite": bad, "nonfinite_total": window.bad}  # fmt: skip
