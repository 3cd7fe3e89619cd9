"""Back to a checkpoint, and past the batches that did the damage.

A spike that a batch caused comes back if the batch does; so one goes back to a checkpoint before it and leaves the
batches of the bad window out (PaLM, arXiv 2204.02311, section 5.1, did it by hand, 20 times).

*What a step number means afterwards.* ``skip = [120, 125]`` names steps of the run as it went. Rolled back to step
100, steps 101 … 119 are done again with the batches they had; step 120 gets the batch that step 126 had, and so on:
step numbers have no gap, the schedule of the learning rate follows the step number, the data are six batches further
on. A later ``skip`` names steps of the run as it went then.

What was left out is written in ``RUN/skips.jsonl`` before anything else happens, by the number of the batch in the
order of the data. It is the run's own memory: every resume, from whatever checkpoint, leaves out the same. An entry is
``settled`` once the run stands at its checkpoint; a process that dies before that leaves a run whose next resume
finishes the rollback.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepseek.data.quarantine import Skips, delivered_index, merged
from deepseek.errors import RunError
from deepseek.files import write_atomic
from deepseek.weights import checkpoint
from deepseek.weights.reader import step_of

FILE = "skips.jsonl"


@dataclass(frozen=True)
class Rewind:
    """One rollback of a run.

    Attributes:
        to_step: the checkpoint it goes back to. from_step: the last step done before.
        steps: first and last step whose batches are left out, as the run counted then; ``None``: none.
        batches: the same as ranges of batch numbers. settled: it has been carried out.
    """

    to_step: int
    from_step: int
    steps: tuple[int, int] | None
    batches: Skips
    by: str = ""
    incident: str | None = None
    time: float = 0.0
    settled: bool = False


def read_rewinds(run: Path) -> list[Rewind]:
    """The rollbacks of a run, oldest first. Raises ``RunError`` where the file is damaged."""
    path = run / FILE
    if not path.is_file():
        return []
    try:
        return [_rewind(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} is damaged: {error!r}; without it this run would train on other data"
        ) from None


def _rewind(value: dict[str, Any]) -> Rewind:
    steps = value["steps"]
    value = {**value, "steps": None if steps is None else (int(steps[0]), int(steps[1]))}
    return Rewind(**{**value, "batches": merged(value["batches"])})


def write_rewind(run: Path, rewind: Rewind) -> None:
    """Add a rollback to the run's memory."""
    _write(run, [*read_rewinds(run), replace(rewind, time=round(time.time(), 3))])


def settle(run: Path) -> None:
    """The run stands where its rollbacks wanted it."""
    held = read_rewinds(run)
    if any(not r.settled for r in held):
        _write(run, [replace(r, settled=True) for r in held])


def forget(run: Path) -> None:
    """A run that starts anew has left nothing out."""
    (run / FILE).unlink(missing_ok=True)


def _write(run: Path, rewinds: list[Rewind]) -> None:
    write_atomic(run / FILE, "".join(json.dumps(asdict(r)) + "\n" for r in rewinds))


def skips_of(run: Path) -> Skips:
    """The batches that a run leaves out."""
    return merged(r for rewind in read_rewinds(run) for r in rewind.batches)


def unfinished(run: Path) -> Rewind | None:
    """A rollback during which the process died: the one that wants to go back furthest."""
    return min((r for r in read_rewinds(run) if not r.settled), key=lambda r: r.to_step, default=None)


def checkpoint_before(run: Path, step: int, to_step: int | None = None) -> Path:
    """The checkpoint to go back to from an incident at ``step``: the newest before it, or ``to_step``'s.

    Raises:
        RunError: there is none.
    """
    held = {step_of(p): p for p in checkpoint.list_checkpoints(run)}
    has = f"it has: {', '.join(map(str, held))}" if held else "it has none"
    if to_step is not None:
        if to_step not in held:
            raise RunError(f"{run} has no checkpoint of step {to_step}; {has}")
        return held[to_step]
    earlier = [p for s, p in held.items() if s < step]
    if not earlier:
        raise RunError(
            f"{run} has no checkpoint before step {step}; {has}. Set checkpoint.every, and the next incident "
            "has one; here only a new run can leave those batches out"
        )
    return earlier[-1]


def resume_point(run: Path, step: int | None, skip: tuple[int, int] | None) -> Path:
    """The checkpoint to go on from: of ``step``, the newest before ``skip``, where a rollback ended, or the newest.

    Raises:
        RunError: there is none.
    """
    if skip is not None:
        if step is not None and step >= skip[0]:
            raise RunError(f"--from {step} does not lie before the first step to skip, {skip[0]}")
        return checkpoint_before(run, skip[0], step)
    if step is not None:
        return run / f"step-{step:06d}"
    if (pending := unfinished(run)) is not None:
        return checkpoint_before(run, pending.to_step + 1, pending.to_step)
    if (at := checkpoint.latest(run)) is None:
        raise RunError(f"{run} has no checkpoint to resume from; start it again with `deepseek pretrain`")
    return at


def resumed(run: Path, found: checkpoint.Checkpoint, skip: tuple[int, int]) -> Rewind:
    """The rollback that a resume from ``found`` with ``skip`` is."""
    state, newest = found.state["loader"], checkpoint.latest(run)
    skips = merged([*state.get("skips", ()), *skips_of(run)])
    from_step = step_of(newest) if newest is not None else found.step
    return Rewind(found.step, from_step, skip, batches_of(state, found.step, skip, skips), by="resume")


def batch_number(state: dict[str, Any], step: int, at: int, skips: Skips) -> int:
    """The number of the batch of ``at``, counted on from the loader's state after ``step``."""
    return delivered_index(skips, int(state["batch"]), at - step - 1)


def batches_of(state: dict[str, Any], step: int, skip: Sequence[int], skips: Skips) -> Skips:
    """The batches of the steps ``[first, last]`` as ranges; what was left out before is not among them."""
    numbers = [batch_number(state, step, at, skips) for at in range(skip[0], skip[1] + 1)]
    return merged([n, n] for n in numbers)
