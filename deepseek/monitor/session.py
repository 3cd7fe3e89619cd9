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
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from deepseek.errors import RunError
from deepseek.monitor.session_config import Config, options_of
from deepseek.monitor.session_run import Run, Summary, open_lock, open_runs

LONGEST, LONGEST_BYTES = 80, 240  #: characters of a directory's name; a file system has 255 bytes

_logger = logging.getLogger(__name__)


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
    detect: bool = True,
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
        detect: look for what is unusual beside the loop (``session_watch``); it becomes an incident and a warning.
        ignored: other options of the original.

    Raises:
        RunError: the directory cannot be made, or ``resume='must'`` and it is not there.
    """
    root = Path(dir if dir is not None else os.environ.get("DEEPSEEK_RUNS") or "runs")
    given = _safe(str(id or (name if resume and resume != "never" else "") or ""))
    label = str(name or id or _named_by_time(project))
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
    made = Run(path, label, options_of(config), facts, writes, detect)
    with open_lock:
        if not open_runs:
            atexit.unregister(_finish_all)
            atexit.register(_finish_all)
        open_runs.append(made)
    return made


def current() -> Run | None:
    """The run that ``init`` started last and that is not finished."""
    return open_runs[-1] if open_runs else None


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
    for run in list(open_runs):
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
    """A name as one directory; '' only for ''."""
    safe = "".join(c if c.isalnum() or c in "._- " else "-" for c in name).strip(" .-")[:LONGEST]
    while len(safe.encode()) > LONGEST_BYTES:
        safe = safe[:-1]
    return safe or ("run" if name else "")
