"""The runs of a directory and what became of them, read from their events alone.

A run that was killed cannot say so. It counts as running when its process lives, and as crashed when the
process is gone without a ``done`` or ``interrupted`` event.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from deepseek.errors import RunError
from deepseek.monitor.eventlog import EventLog
from deepseek.monitor.history import EVENTS_FILE, EventDict
from deepseek.monitor.narrator import table
from deepseek.monitor.units import MISSING, duration, finite, fixed, one_line, si, size

Status = Literal["running", "finished", "interrupted", "crashed", "empty"]
SILENT = 600.0  #: seconds without an event after which a run whose process cannot be checked counts as dead
STYLES = {
    "running": "cyan",
    "finished": "green",
    "interrupted": "yellow",
    "crashed": "red",
    "empty": "bright_black",
}


@dataclass(frozen=True)
class RunSummary:
    """One run: ``loss`` in nats per token, ``bits_per_byte`` held out where evaluated, ``size`` in bytes,
    times as Unix seconds. What is not known is ``None``."""

    name: str
    path: str
    status: Status
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    started: float | None = None
    updated: float | None = None
    size: int = 0
    preset: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)

    def age(self, now: float) -> float | None:
        """Seconds since the last event."""
        return max(now - self.updated, 0.0) if self.updated is not None else None


def list_runs(root: Path | str) -> list[RunSummary]:
    """The runs in ``root``, latest first; ``root`` may itself be one run. No directory: no runs.

    Raises:
        RunError: ``root`` is a file.
    """
    root = Path(root)
    if root.is_file():
        raise RunError(f"{root} is a file; expected a directory of runs, like runs/")
    if (root / EVENTS_FILE).is_file():
        return [summarize(root)]
    found = [summarize(path.parent) for path in root.glob(f"*/{EVENTS_FILE}") if path.is_file()]
    return sorted(found, key=lambda run: (-(run.updated or 0.0), run.name))


def summarize(directory: Path) -> RunSummary:
    """Read the events of one run; only the last training step is parsed, so that long runs are quick."""
    log = EventLog(directory / EVENTS_FILE)
    log.refresh()
    others, train = log.rare, log.last("train")
    runs = [e for e in others if e["event"] == "run"]
    latest: EventDict = runs[-1] if runs else {}
    evaluations = [e for e in others if e["event"] == "evaluate"]
    times = [t for t in (finite(e.get("time")) for e in [*others, train]) if t is not None]
    updated = max(times, default=None)
    held_out = finite(evaluations[-1].get("bits_per_byte")) if evaluations else None
    return RunSummary(
        name=directory.resolve().name,
        path=str(directory),
        status=status_of(others, train, latest, updated),
        step=_integer(train.get("step")),
        total_steps=_integer(latest.get("total_steps")),
        loss=finite(train.get("loss")),
        bits_per_byte=held_out if held_out is not None else finite(train.get("bits_per_byte")),
        tokens_per_second=finite(train.get("tokens_per_second")),
        started=min(times, default=None),
        updated=updated,
        size=_size(directory),
        preset=str(latest["preset"]) if latest.get("preset") else None,
    )


def render(runs: list[RunSummary], console: Console | None = None, now: float | None = None) -> None:
    """Print ``runs`` as a table."""
    console, now = console or Console(), time.time() if now is None else now
    if not runs:
        console.print("no runs yet; `deepseek quickstart` makes one")
        return
    table([_row(run, now) for run in runs], console)


def _row(run: RunSummary, now: float) -> dict[str, Any]:
    step = MISSING if run.step is None else f"{run.step:,}"
    total = f"/{run.total_steps:,}" if run.total_steps else ""
    age = run.age(now)
    return {
        "run": Text(one_line(run.name, 40), style="bold"),
        "status": Text(run.status, style=STYLES[run.status]),
        "step": step + total,
        "loss": fixed(run.loss),
        "bits/byte": fixed(run.bits_per_byte, 3),
        "tokens/s": si(run.tokens_per_second),
        "last event": MISSING if age is None else f"{duration(age)} ago",
        "size": size(run.size),
    }


def status_of(others: list[EventDict], train: EventDict, latest: EventDict, updated: float | None) -> Status:
    """What became of a run: from its other events, its last training step, its last ``run`` event, and the
    time of the last event of all."""
    if not others and not train:
        return "empty"
    start = max((i for i, e in enumerate(others) if e["event"] == "run"), default=0)
    session = {str(e["event"]) for e in others[start:]}
    if "done" in session:
        return "finished"
    if _alive(_integer(latest.get("pid")), finite(latest.get("time")), updated):
        return "running"
    return "interrupted" if "interrupted" in session else "crashed"


def _alive(pid: int | None, started: float | None, updated: float | None) -> bool:
    """Whether process ``pid`` lives and is old enough to have written the ``run`` event at ``started``."""
    if (
        pid is None or pid <= 0 or sys.platform == "win32"
    ):  # there os.kill(pid, 0) is not a question but a deed
        return updated is not None and time.time() - updated < SILENT
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return False
    state, born = _state_and_birth(pid)
    if state in ("Z", "X"):  # dead, and nobody has asked what became of it
        return False
    return born is None or started is None or born <= started + 2.0


def _state_and_birth(pid: int) -> tuple[str, float | None]:
    """A process's state letter and when it started, in Unix seconds, where /proc tells; the time unmasks a recycled
    process id."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1]
        state, *fields = after_name.split()
        boot = next(
            x for x in Path("/proc/stat").read_text(encoding="utf-8").splitlines() if x.startswith("btime")
        )
        return state, int(boot.split()[1]) + int(fields[18]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return "", None


def _size(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # a checkpoint may be deleted while we look
            total += path.stat().st_size if path.is_file() else 0
    return total


def _integer(value: Any) -> int | None:
    found = finite(value)
    return None if found is None else int(found)
