"""``import deepseek.monitor as wandb``: ``init``, ``log`` and ``finish`` in anybody's own loop.

    import deepseek.monitor as wandb

    wandb.init(project="mine", config={"lr": 3e-4})
    for step in range(1000):
        wandb.log({"loss": loss, "layer": {"0": {"grad_norm": norm}}})
    wandb.finish()

Each run is a directory below ``runs/`` with a store of its own; nothing leaves the machine. ``deepseek monitor`` shows
it while it goes on. Several runs may be open at once, and several processes may log into one run: they give the same
``id``. A process that ends without ``finish`` is finished by Python, and one that is killed loses nothing it logged.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from deepseek.errors import RunError
from deepseek.monitor.session_config import Config, options_of
from deepseek.monitor.store import RunStore

SUMMARIES = ("last", "min", "max", "mean", "none")  #: what ``define_metric`` can ask for
LEVELS = {
    "info": "info",
    "warn": "warning",
    "warning": "warning",
    "error": "critical",
    "critical": "critical",
}
LONGEST = 80  #: characters of a directory's name

_logger = logging.getLogger(__name__)
_open: list[Run] = []
_lock = threading.RLock()


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
        self, path: Path, name: str, config: Mapping[str, Any], facts: Mapping[str, Any], writes: bool
    ) -> None:
        self.id, self.name, self.path, self.dir = path.name, name, path, str(path)
        self.project, self.tags = str(facts.get("project") or ""), tuple(facts.get("tags") or ())
        self._store, self._writes, self._finished, self._pid = RunStore(path), writes, False, os.getpid()
        self._lock = threading.RLock()
        self._writer = self._store.writer(str(facts.get("job_type") or ""))
        self._summaries: dict[str, str] = {}
        self._ignored: set[str] = set()
        first, last = self._store.series.steps() if writes else (0, -1)
        self.step = last + 1 if last >= first else 0
        self.resumed = self.step > 0
        self.config = Config(path / "config.toml" if writes else None, config)
        self.summary = Summary(self)
        if writes:
            self._store.set_meta("session", {"name": name, **facts})
            self._tell("run", self.step, run=path.name, name=name, pid=os.getpid(), command=" ".join(sys.argv),
                       resumed_from=self.step or None, **facts)  # fmt: skip

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
        with self._lock:
            if self._finished:
                raise RunError(
                    f"the run '{self.id}' is finished; call init(id='{self.id}', resume=True) to go on with it"
                )
            at = self.step if step is None else step
            if self._writes:
                try:
                    self._writer.log(at, data)
                except (TypeError, ValueError):
                    self._writer.log(at, self._numbers(data))
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
        with self._lock:
            if self._finished or self._pid != os.getpid():
                return
            self._finished = True
            with _lock:
                _open[:] = [run for run in _open if run is not self]
            if self._writes:
                self._writer.close()
                self._store.series.refresh()
                self._store.set_meta("summary", dict(self.summary))
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
        found = {}
        for name, last in reader.last().items():
            kind = self._summary_of(name)
            if kind == "last":
                found[name] = last
            elif kind != "none":
                values = reader.raw(name)[1]
                found[name] = float(getattr(values.astype("f8"), kind)())
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


def init(
    project: str | None = None,
    name: str | None = None,
    *,
    id: str | None = None,
    dir: Path | str | None = None,
    config: Any = None,
    tags: Iterable[str] | None = None,
    notes: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
    resume: bool | str | None = None,
    mode: Literal["online", "offline", "disabled"] | None = None,
    **ignored: Any,
) -> Run:
    """Start a run, which ``log`` then logs into.

    Args:
        project, name: the directory is called after them; without, after the time. A name that is taken gets a number.
        id: the exact name of the directory. It may exist: the run is gone on with, and processes that give the same
            ``id`` at the same time write one run.
        dir: where the runs are; by default ``$DEEPSEEK_RUNS``, or ``runs``.
        config: a dictionary, a namespace or a dataclass.
        resume: with ``name``: go on with the run of that name if there is one ('must': it has to be there).
        mode: 'disabled' keeps nothing, for the ranks that do not log.
        ignored: other options of the original.

    Raises:
        RunError: the directory cannot be made, or ``resume='must'`` and it is not there.
    """
    root = Path(dir if dir is not None else os.environ.get("DEEPSEEK_RUNS") or "runs")
    given = _safe(id or (name if resume and resume != "never" else "") or "")
    label = name or id or _named_by_time(project)
    facts = {
        "project": project,
        "tags": list(tags or ()),
        "notes": notes,
        "group": group,
        "job_type": job_type,
    }
    facts = {k: v for k, v in facts.items() if v}
    writes = mode != "disabled" and os.environ.get("WANDB_MODE") != "disabled"
    path = root / (given or _safe(label))
    if resume == "must" and not path.is_dir():
        raise RunError(f"there is no run '{path.name}' in {root} to go on with")
    if writes:
        try:
            path = _made(path, shared=bool(given))
        except OSError as error:
            raise RunError(f"{path} cannot be a run directory: {error.strerror or error}") from error
    made = Run(path, label, options_of(config), facts, writes)
    with _lock:
        if not _open:
            atexit.unregister(_finish_all)
            atexit.register(_finish_all)
        _open.append(made)
    return made


def current() -> Run | None:
    """The run that ``init`` started last and that is not finished."""
    return _open[-1] if _open else None


def log(
    data: Mapping[str, Any], step: int | None = None, commit: bool | None = None, sync: bool | None = None
) -> None:
    """``Run.log`` of the current run.

    Raises:
        RunError: ``init`` was not called.
    """
    _current().log(data, step, commit, sync)


def define_metric(
    name: str, step_metric: str | None = None, summary: str | None = None, **ignored: Any
) -> None:
    """``Run.define_metric`` of the current run. Raises as ``log``."""
    _current().define_metric(name, step_metric, summary, **ignored)


def alert(title: str, text: str = "", level: Any = "info", wait_duration: Any = None) -> None:
    """``Run.alert`` of the current run. Raises as ``log``."""
    _current().alert(title, text, level, wait_duration)


def finish(exit_code: int | None = None, quiet: bool | None = None) -> None:
    """Finish the current run, if there is one; the one started before it is then the current one."""
    run = current()
    if run is not None:
        run.finish(exit_code, quiet)


def login(*args: Any, **ignored: Any) -> bool:
    """There is no account, and nothing is sent anywhere."""
    return True


def current_config() -> Config:
    """The config of the current run. Raises as ``log``."""
    return _current().config


def current_summary() -> Summary:
    """The summary of the current run. Raises as ``log``."""
    return _current().summary


def _current() -> Run:
    run = current()
    if run is None:
        raise RunError("no run is open: call init() first")
    return run


def _finish_all() -> None:
    """At the end of the process: with an exception under way the runs count as interrupted."""
    failed = getattr(sys, "last_value", None) is not None
    for run in list(_open):
        try:
            run.finish(exit_code=1 if failed else 0)
        except Exception as error:  # Python is about to end; the rows themselves are safe
            _logger.warning("the run '%s' could not be finished: %s", run.id, error)


def _made(path: Path, shared: bool) -> Path:
    """The directory; unless it may be ``shared``, one that did not exist before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if shared:
        path.mkdir(exist_ok=True)
        return path
    for number in range(1, 100_000):
        free = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            free.mkdir()
            return free
        except FileExistsError:
            continue
    raise RunError(f"{path} and its numbered names are all taken")


def _named_by_time(project: str | None) -> str:
    return f"{project or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _safe(name: str) -> str:
    """A name as one directory."""
    safe = "".join(c if c.isalnum() or c in "._- " else "-" for c in name).strip(" .-")
    return safe[:LONGEST]


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
