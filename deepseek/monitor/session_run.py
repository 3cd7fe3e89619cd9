"""``Run``: a run of somebody's own loop, in the shape that people know from other trackers."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from deepseek.errors import RunError
from deepseek.monitor.session_config import Config
from deepseek.monitor.store import RunStore
from deepseek.monitor.writer import LONGEST_NAME

if TYPE_CHECKING:
    from deepseek.monitor.session_watch import SessionWatch

SUMMARIES = ("last", "min", "max", "mean", "none")  #: what ``define_metric`` can ask for
LEVELS = {
    "info": "info",
    "warn": "warning",
    "warning": "warning",
    "error": "critical",
    "critical": "critical",
}

_logger = logging.getLogger(__name__)
open_runs: list[Run] = []  #: those that are not finished, in the order of their start
open_lock = threading.RLock()


class Summary(MutableMapping[str, Any]):
    """One value for each series: its newest, or what ``define_metric`` asked for, or what was set here."""

    def __init__(self, run: Run) -> None:
        self._run, self._own = run, dict[str, Any]()

    def _all(self) -> dict[str, Any]:
        return {**self._run._figures(), **self._own}

    def __getitem__(self, key: str) -> Any:
        return self._own[key] if key in self._own else self._run._figures()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._own[key] = value

    def __delitem__(self, key: str) -> None:
        del self._own[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return f"Summary({self._all()})"


class Run:
    """One run of somebody's loop; made by ``init``.

    Attributes:
        id: the name of its directory. name: for people. dir: the directory, as text. step: of the next ``log``.
        config, summary: see there. offline: always true.
    """

    offline = True

    def __init__(
        self,
        path: Path,
        name: str,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        writes: bool,
        watched: bool = True,
    ) -> None:
        self.id, self.name, self.path, self.dir = path.name, name, path, str(path)
        self.project, self.tags = str(facts.get("project") or ""), tuple(facts.get("tags") or ())
        self._store, self._writes, self._finished, self._pid = RunStore(path), writes, False, os.getpid()
        self._writer = self._store.writer(str(facts.get("job_type") or ""))
        self._summaries: dict[str, str] = {}
        self._ignored: set[str] = set()
        self._known: tuple[Any, dict[str, float]] = (None, {})
        first, last = self._store.series.steps() if writes else (0, -1)
        self.step = last + 1 if last >= first else 0
        self.resumed = self.step > 0
        self.config = Config(path / "config.toml" if writes else None, config)
        self.summary = Summary(self)
        self._watch: SessionWatch | None = None
        if writes:
            self._store.set_meta("session", {"name": name, **facts})
            self._tell("run", self.step, run=path.name, name=name, pid=os.getpid(), command=" ".join(sys.argv),
                       resumed_from=self.step or None, **facts)  # fmt: skip
            if watched:
                from deepseek.monitor.session_watch import SessionWatch

                self._watch = SessionWatch(path, self.step)

    def log(
        self,
        data: Mapping[str, Any],
        step: int | None = None,
        commit: bool | None = None,
        sync: bool | None = None,
    ) -> None:
        """Keep the numbers in ``data``.

        Args:
            data: values by name; dictionaries inside become ``outer/inner``. What is no number is left out, and said
                once.
            step: by default the one after the last. The same step may be logged several times, and steps may go back.
            commit: whether the next call without ``step`` is about the next step; by default only if this one has no
                ``step``.
            sync: taken for compatibility.

        Raises:
            RunError: the run is finished, or the disk is full.
        """
        with self._writer.lock:
            if self._finished:
                raise RunError(
                    f"the run '{self.id}' is finished; call init(id='{self.id}', resume=True) to go on with it"
                )
            at = self.step if step is None else step
            if self._writes:
                try:
                    self._writer.append(at, data)
                except (TypeError, ValueError, OverflowError, RuntimeError):
                    if not isinstance(data, Mapping):
                        raise
                    self._writer.append(at, self._numbers(data))
            self.step = at + (1 if (step is None if commit is None else commit) else 0)

    def define_metric(
        self, name: str, step_metric: str | None = None, summary: str | None = None, **ignored: Any
    ) -> None:
        """Say what ``summary`` shows of a series: 'last', 'min', 'max', 'mean' or 'none'. A name may end in ``*``.

        ``step_metric`` and other options of the original are noted in the store and change nothing: series are over
        steps.

        Raises:
            RunError: an unknown summary.
        """
        wanted = [s for s in (summary or "").split(",") if s]
        if unknown := [s for s in wanted if s not in SUMMARIES]:
            raise RunError(f"summary {unknown[0]!r} is none of {', '.join(SUMMARIES)}")
        if wanted:
            self._summaries[name] = wanted[0]
        if self._writes:
            self._store.set_meta(f"metric:{name}", {"step_metric": step_metric, "summary": summary})

    def alert(self, title: str, text: str = "", level: Any = "info", wait_duration: Any = None) -> None:
        """Keep an alert; ``level`` is 'INFO', 'WARN' or 'ERROR', ``wait_duration`` is taken for compatibility."""
        severity = LEVELS.get(str(getattr(level, "value", level)).lower(), "info")
        if self._writes:
            self._store.add_alert(
                "user", f"{title}: {text}" if text else title, step=self.step, severity=severity
            )

    def finish(self, exit_code: int | None = None, quiet: bool | None = None) -> None:
        """Seal the store; a second call does nothing. An ``exit_code`` other than 0 marks the run as interrupted."""
        with self._writer.lock:
            if self._finished or self._pid != os.getpid():
                return
            self._finished = True
            with open_lock:
                open_runs[:] = [run for run in open_runs if run is not self]
            if self._writes:
                if self._watch is not None:
                    self._watch.close()
                self._writer.close()
                self._store.series.refresh()
                self._store.set_meta("summary", self.summary._all())
                last = self._store.series.steps()[1]
                if exit_code:
                    self._tell("interrupted", max(last, 0), signal=f"exit code {exit_code}")
                else:
                    self._tell("done", max(last, 0))
            self._store.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(exit_code=0 if error is None else 1)

    def _numbers(self, data: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
        """The numbers in ``data``, dictionaries laid flat."""
        found: dict[str, float] = {}
        for key, value in data.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping):
                found.update(self._numbers(value, f"{name}/"))
            elif value is not None and not 0 < len(name) <= LONGEST_NAME:
                if "" not in self._ignored:
                    self._ignored.add("")
                    _logger.warning("'%.40s' is left out: a name has 1 to %d characters", name, LONGEST_NAME)
            elif value is not None and (number := _number(value)) is not None:
                found[name] = number
            elif value is not None and name not in self._ignored:
                self._ignored.add(name)
                _logger.warning(
                    "'%s' is a %s and is left out: only numbers are kept", name, type(value).__name__
                )
        return found

    def _figures(self) -> dict[str, float]:
        """The summary of every series."""
        if not self._writes:
            return {}
        reader = self._store.series
        reader.refresh()
        state = reader, reader.version, dict(self._summaries)
        if self._known[0] == state:  # or ``dict(summary)`` would look at every series once for each
            return self._known[1]
        found = {}
        for name, last in reader.last().items():
            kind = self._summary_of(name)
            if kind == "last":
                found[name] = last
            elif kind != "none":
                values = reader.raw(name)[1]
                found[name] = float(getattr(values.astype("f8"), kind)())
        self._known = state, found
        return found

    def _summary_of(self, name: str) -> str:
        if name in self._summaries:
            return self._summaries[name]
        stems = [s for s in self._summaries if s.endswith("*") and name.startswith(s[:-1])]
        return self._summaries[max(stems, key=len)] if stems else "last"

    def _tell(self, name: str, step: int, /, **values: Any) -> None:
        """Write an event, so that lists of runs know this one."""
        from deepseek.events import Event, JsonlSink

        sink = JsonlSink(self.path / "events.jsonl")
        sink.write(Event(name, step, {k: v for k, v in values.items() if v is not None}))
        sink.close()


def _number(value: Any) -> float | None:
    if (
        isinstance(value, str)
        or (hasattr(value, "numel") and value.numel() != 1)
        or getattr(value, "size", 1) == 0
    ):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
