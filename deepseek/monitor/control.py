"""Actions on a run: ask for one from any process, and read what came of it.

    id = request("runs/mine", "rollback_skip", {"skip": [120, 125]})
    wait("runs/mine", id).result

A request is checked, and lies in the run's store until the trainer takes it between two steps
(``deepseek.recipes.control``). Of a run that is not training, a quarantine is written down at once and a replay done
by a process of its own; for the rest the answer has the command to go on with.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.assemble import Run
from deepseek.data.quarantine import FILE as QUARANTINE
from deepseek.data.quarantine import Quarantined, add_to_quarantine
from deepseek.errors import ConfigError, RunError, did_you_mean
from deepseek.monitor.commands import Command, Commands, open_commands

#: What can be asked for, and the arguments it takes.
ACTIONS: dict[str, tuple[str, ...]] = {
    "pause": (),
    "continue": (),
    "stop": (),
    "checkpoint": (),
    "replay": ("step", "at"),
    "rollback_skip": ("skip", "to_step"),
    "quarantine": ("documents", "reason"),
    "capture": ("steps",),
}
ALWAYS = ("incident",)  #: an argument of every action: the incident it answers
MAX_DOCUMENTS = 10_000
MAX_CAPTURED = 20
MAX_SKIPPED = 100_000  #: steps; each one's batch is looked up while the run waits


def request(run: Path | str, action: str, arguments: Mapping[str, Any] | None = None, by: str = "") -> int:
    """Ask a run for ``action``; returns the number of the request.

    Args:
        run: its directory. by: who asks, for the record.

    Raises:
        ConfigError: an unknown action or argument, or one that is not of its form.
        RunError: the run is not training; the message has the command that does the same offline.
    """
    path, checked = Run.open(run).path, validate(action, arguments or {})
    if trainer(path) is None:
        if action not in _OFFLINE:
            raise RunError(not_training(path, action, checked))
        return _OFFLINE[action](path, checked, by)
    with open_commands(path) as commands:
        return commands.enqueue(action, checked, by)


def wait(run: Path | str, number: int, timeout: float = 60.0) -> Command:
    """What came of a request, once it is done or has failed.

    Raises:
        RunError: there is no such request, or nothing came of it in ``timeout`` seconds.
    """
    until = time.monotonic() + timeout
    with open_commands(Path(run)) as commands:
        while True:
            found = next((c for c in commands.commands() if c.id == number), None)
            if found is None:
                raise RunError(f"{run} has no request number {number}")
            if found.finished:
                return found
            if time.monotonic() > until:
                raise RunError(
                    f"request {number} ({found.action}) is still {found.status} after {timeout:g} s"
                )
            time.sleep(0.05)


def validate(action: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` in their usual form. Raises ``ConfigError`` for anything that ``action`` does not take."""
    if action not in ACTIONS:
        raise ConfigError(
            f"unknown action {action!r}{did_you_mean(action, ACTIONS)}; one of {', '.join(ACTIONS)}"
        )
    allowed = (*ACTIONS[action], *ALWAYS)
    for name in arguments:
        if name not in allowed:
            takes = ", ".join(ACTIONS[action]) or "no arguments"
            raise ConfigError(
                f"{action} has no argument {name!r}{did_you_mean(name, allowed)}; it takes {takes}"
            )
    given = {k: v for k, v in arguments.items() if v is not None}
    return given | _CHECKS.get(action, lambda _: {})(given)


@dataclass(frozen=True)
class Rollback:
    """What ``rollback_skip`` is asked for: the checkpoint to go back to, if named, and the steps to leave out."""

    to_step: int | None
    skip: tuple[int, int] | None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Rollback:
        to_step, skip = arguments.get("to_step"), arguments.get("skip")
        if to_step is None and skip is None:
            raise ConfigError("rollback_skip needs skip: [first, last], to_step, or both")
        if to_step is not None:
            _count("rollback_skip", "to_step", to_step, 1)
        if skip is None:
            return cls(to_step, None)
        if not isinstance(skip, (list, tuple)) or len(skip) != 2 or not all(type(n) is int for n in skip):
            raise ConfigError(f"rollback_skip.skip is [first step, last step], not {skip!r}")
        first, last = skip
        if not 1 <= first <= last:
            raise ConfigError(
                f"rollback_skip.skip=[{first}, {last}]: steps count from 1, and last is not before first"
            )
        if last - first >= MAX_SKIPPED:
            raise ConfigError(f"rollback_skip.skip=[{first}, {last}]: at most {MAX_SKIPPED:,} steps at once")
        if to_step is not None and to_step >= first:
            raise ConfigError(
                f"rollback_skip.to_step={to_step} does not lie before the first step to skip, {first}"
            )
        return cls(to_step, (first, last))


def parse_skip(text: str) -> tuple[int, int]:
    """``'120:125'`` or ``'120'`` as steps, both inclusive. Raises ``ConfigError`` for anything else."""
    first, _, last = text.partition(":")
    try:
        skip = int(first), int(last or first)
    except ValueError:
        raise ConfigError(f"--skip={text!r} is not FIRST:LAST, two step numbers such as 120:125") from None
    Rollback.of({"skip": skip})
    return skip


def parse_document(text: str) -> dict[str, Any]:
    """``SOURCE:PATH:OFFSET``, or ``SOURCE:PATH`` for all of a file, as a document. Raises ``ConfigError``."""
    source, _, rest = text.partition(":")
    path, _, offset = rest.rpartition(":")
    if not (path and offset.isdigit()):
        path, offset = rest, ""
    if not source or not path:
        raise ConfigError(f"--document={text!r} is not SOURCE:PATH:OFFSET, such as web:part-3.jsonl:10412")
    return {"source": source, "path": path, "offset": int(offset) if offset else None}


def trainer(run: Path) -> str | None:
    """The id of the process that trains in ``run`` now, ``None`` if there is none."""
    return Run(run).trainer()


def not_training(run: Path, action: str, arguments: Mapping[str, Any]) -> str:
    """Why ``action`` cannot be done now, and the way out."""
    from deepseek.monitor.runs import summarize

    try:
        summary = summarize(run)
        state = f"{summary.status} at step {summary.step}" if summary.step is not None else summary.status
    except OSError:
        state = "never started"
    return f"{run.name} is not training ({state}): nothing to {_VERBS[action]}. {_way_out(run, action, arguments)}"


def _way_out(run: Path, action: str, arguments: Mapping[str, Any]) -> str:
    if action == "rollback_skip":
        asked = Rollback.of(arguments)
        options = f" --from {asked.to_step}" if asked.to_step is not None else ""
        options += f" --skip {asked.skip[0]}:{asked.skip[1]}" if asked.skip else ""
        return f"Do it as you go on: deepseek resume {run}{options}"
    return f"Go on with: deepseek resume {run}"


_VERBS = {
    "pause": "pause", "continue": "continue", "stop": "stop", "checkpoint": "save", "rollback_skip": "roll back",
    "capture": "capture",
}  # fmt: skip


def _quarantine_offline(path: Path, arguments: Mapping[str, Any], by: str) -> int:
    documents = [Quarantined.of(d) for d in arguments["documents"]]
    step = max([int(p.name[5:11]) for p in path.glob("step-*") if p.name[5:11].isdigit()], default=0)
    new = add_to_quarantine(
        path / QUARANTINE, documents, from_step=step + 1, by=by, reason=str(arguments.get("reason", ""))
    )
    with open_commands(path) as commands:
        number = commands.enqueue("quarantine", dict(arguments), by)
        text = f"{len(new)} documents; the run is not training, it leaves them out when it goes on"
        commands.finish_command(number, "done", {"added": len(new), "from_step": step + 1, "text": text})
    return number


def _replay_offline(path: Path, arguments: Mapping[str, Any], by: str) -> int:
    """A process of its own: the weights of a checkpoint do not belong into whoever asks."""
    with open_commands(path) as commands:
        number = commands.enqueue("replay", dict(arguments), by, status="running")
    command = [
        sys.executable,
        "-m",
        "deepseek",
        "replay",
        str(path.resolve()),
        "--step",
        str(arguments["step"]),
    ]
    command += ["--at", str(arguments["at"]), "--answer", str(number)]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    threading.Thread(target=_see_it_end, args=(process, path, number), daemon=True).start()
    return number


def _see_it_end(process: subprocess.Popen[bytes], path: Path, number: int) -> None:
    """A process that was killed has answered nothing: say so in its place."""
    status = process.wait()
    with contextlib.suppress(RunError), open_commands(path) as commands:
        if any(c.id == number for c in commands.commands("running")):
            commands.finish_command(number, "failed", {"error": f"the process ended with status {status}"})


_OFFLINE = {"quarantine": _quarantine_offline, "replay": _replay_offline}


def _count(action: str, name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{action}.{name} is a whole number of {least} or more, not {value!r}")
    return value


def _check_replay(given: Mapping[str, Any]) -> dict[str, Any]:
    if "step" not in given:
        raise ConfigError("replay needs the step whose batch it computes again")
    at = given.get("at", "before")
    if at not in ("before", "current"):
        _count("replay", "at", at, 1)
    return {"step": _count("replay", "step", given["step"], 1), "at": at}


def _check_rollback(given: Mapping[str, Any]) -> dict[str, Any]:
    asked = Rollback.of(given)
    return {} if asked.skip is None else {"skip": list(asked.skip)}


def _check_quarantine(given: Mapping[str, Any]) -> dict[str, Any]:
    documents = given.get("documents")
    if not isinstance(documents, (list, tuple)) or not 1 <= len(documents) <= MAX_DOCUMENTS:
        raise ConfigError(
            f"quarantine needs documents: a list of 1 to {MAX_DOCUMENTS} {{source, path, offset}}"
        )
    try:
        found = [Quarantined.of(d) for d in documents]
    except ValueError as error:
        raise ConfigError(f"quarantine.documents: {error}") from None
    return {"documents": [{"source": q.source, "path": q.path, "offset": q.offset} for q in found]}


def _check_capture(given: Mapping[str, Any]) -> dict[str, Any]:
    steps = _count("capture", "steps", given.get("steps", 3), 1)
    if steps > MAX_CAPTURED:
        raise ConfigError(
            f"capture.steps={steps}: at most {MAX_CAPTURED}, or the trace grows too large to open"
        )
    return {"steps": steps}


_CHECKS = {
    "replay": _check_replay,
    "rollback_skip": _check_rollback,
    "quarantine": _check_quarantine,
    "capture": _check_capture,
}

__all__ = [
    "ACTIONS",
    "Command",
    "Commands",
    "Rollback",
    "not_training",
    "request",
    "trainer",
    "validate",
    "wait",
]
