"""``Controller``: the trainer's end of the actions that people, the dashboard and other processes ask for.

It is a hook of ``fit``. Between two steps, at most every ``EVERY`` seconds, rank 0 looks into the run's store; all
ranks then do the same thing, so a run on many processes is paused, saved, rolled back as one. A rollback ends the loop
for a moment (``rewind`` says where to) and the recipe begins it again at the checkpoint.

An action that fails says so to whoever asked; it never ends the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from deepseek.data import Corpus, Loader
from deepseek.data.quarantine import FILE as QUARANTINE
from deepseek.data.quarantine import Quarantined, Skips, add_to_quarantine, find_documents
from deepseek.dist import comm
from deepseek.errors import DeepseekError, RunError
from deepseek.events import emit
from deepseek.models import Transformer
from deepseek.monitor.commands import Command, Commands, Status, open_commands
from deepseek.monitor.control import Rollback, validate
from deepseek.monitor.store import RunStore
from deepseek.recipes.plan import Plan, PretrainConfig
from deepseek.recipes.provenance import open_data
from deepseek.recipes.replay import ReplayResult, replay, weights_at, weights_of
from deepseek.recipes.rollback import Rewind, batches_of, checkpoint_before
from deepseek.train import StepResult, Stop
from deepseek.weights import checkpoint
from deepseek.weights.checkpoint import Checkpoint, Checkpointer

EVERY = 0.2  #: seconds between two looks into the store, at least
PAUSED = 0.1  #: seconds between two looks while the run is paused
RETRY = 10.0  #: seconds before the store is tried again, after it could not be read
MOST_STEPS = 1000  #: between two looks of several ranks, however short the steps are

Answer = dict[str, Any]
T = TypeVar("T")


class Trainer(Protocol):
    """What an action may touch of the run that it acts on."""

    path: Path
    rank: int
    world: int
    config: PretrainConfig
    plan: Plan
    corpus: Corpus
    loader: Loader
    model: Transformer
    checkpointer: Checkpointer
    stop: Stop

    def save(self, step: int, result: StepResult, wait: bool = False) -> None: ...


class Controller:
    """Takes commands from the run's store between steps. Use as a context manager around the training.

    Args:
        trainer: the run that is acted on.
        capture: ``capture(steps, done)`` arms a trace of the next steps; ``done(answer)`` is called, from any thread,
            when it is written. ``None``: there is none.

    Attributes:
        rewind: the rollback that was asked for, and ``found``, the checkpoint it goes back to, already read and
            verified: the caller goes there, then calls ``rewound``.
    """

    def __init__(
        self, trainer: Trainer, capture: Callable[[int, Callable[[Answer], None]], Answer] | None = None
    ) -> None:
        self.trainer, self.capture = trainer, capture
        self.rewind: Rewind | None = None
        self.found: Checkpoint | None = None
        self.step = 0
        self._result: StepResult | None = None
        self._commands: Commands | None = None
        self._pending: Command | None = None
        self._again, self._warned = 0.0, False
        self._paused, self._alone = False, comm.world() == 1
        self._looked, self._looked_at, self._next = time.monotonic(), 0, 0

    def __call__(self, step: int, result: StepResult) -> None:
        """Look whether something is asked for, and do it. The hook of ``fit``."""
        self.step, self._result = step, result
        if self._alone:
            if time.monotonic() - self._looked < EVERY:
                return
        elif step < self._next:
            return
        self._look()
        self._work(self._take())
        while self._paused and not self._ending():
            time.sleep(PAUSED)
            self._work(self._take())

    def _look(self) -> None:
        """When to look again: ranks agree on a step, from the pace that rank 0 has seen."""
        now = time.monotonic()
        pace = max(1, self.step - self._looked_at) / max(now - self._looked, 1e-6)
        self._next = self.step + comm.from_first(max(1, min(MOST_STEPS, round(EVERY * pace))))
        self._looked, self._looked_at = now, self.step

    def _take(self) -> Command | None:
        """The next command, the same on every rank. Rank 0 alone sees the store."""
        found = None
        if self.trainer.rank == 0 and time.monotonic() >= self._again:
            try:
                commands = self._commands = self._commands or open_commands(self.trainer.path)
                found = commands.take_command() if commands.changed() else None
            except Exception as error:  # a full or foreign disk, or a damaged row, must not end the run
                self._tell(f"actions cannot be read: {error}")
                self._again = time.monotonic() + RETRY
            else:
                self._warned = False
        return comm.from_first(found)

    def _work(self, command: Command | None) -> None:
        while command is not None:
            self._do(command)
            if self._ending():
                return
            command = self._take()

    def _ending(self) -> bool:
        """Whether the loop ends after this step; a signal during a pause counts."""
        stop = self.trainer.stop
        stop.agreed = stop.agreed or self.rewind is not None or comm.agree(bool(stop.reason))
        return stop.agreed

    def _do(self, command: Command) -> None:
        try:
            arguments = validate(command.action, command.arguments)
            answer = getattr(self, f"_do_{command.action}")(command, arguments)
        except DeepseekError as error:
            self._answer(command, "failed", {"error": str(error)})
        except Exception as error:
            self._answer(command, "failed", {"error": f"{type(error).__name__}: {error}"})
        else:
            if answer is None:  # answered when it is through
                emit(
                    "action", self.step, action=command.action, status="started", id=command.id, by=command.by
                )
            else:
                self._answer(command, "done", answer)

    def _answer(self, command: Command, status: Status, answer: Answer) -> None:
        told = {k: v for k, v in answer.items() if k != "documents"}
        emit(
            "action", self.step, action=command.action, status=status, detail=told, id=command.id, by=command.by,
            incident=command.arguments.get("incident"),
        )  # fmt: skip
        if self._commands is not None:
            try:
                self._commands.finish_command(command.id, status, answer)
                self._note(command, status, answer)
            except Exception as error:  # whatever is wrong with the store, the run goes on
                emit("warning", self.step, text=f"the answer to {command.action} cannot be written: {error}")

    def _note(self, command: Command, status: Status, answer: Answer) -> None:
        """Beside the incident that an action answers, write what was done; keep the losses that a replay found."""
        key = command.arguments.get("incident")
        with RunStore(self.trainer.path) as store:
            if command.action == "replay" and status == "done":
                store.add_samples(answer["step"], answer["documents"])
            if key is None or all(incident["id"] != str(key) for incident in store.incidents()):
                return
            done = {"action": command.action, "status": status, "id": command.id, "by": command.by}
            done |= {"step": self.step, "text": answer.get("text") or answer.get("error", "")}
            store.change_incident(key, actions=[*store.incident(key).get("actions", []), done])
            if command.action == "replay" and status == "done":
                store.change_incident(key, samples=answer["documents"])

    def _do_pause(self, command: Command, arguments: Answer) -> Answer:
        self._paused = True
        return {"step": self.step, "text": f"paused after step {self.step}"}

    def _do_continue(self, command: Command, arguments: Answer) -> Answer:
        was, self._paused = self._paused, False
        return {"step": self.step, "text": "goes on" if was else "was not paused"}

    def _do_stop(self, command: Command, arguments: Answer) -> None:
        self._paused = False
        self.trainer.stop.request(f"stopped by {command.by}" if command.by else "stopped on request")
        self.trainer.stop.agreed = True
        self._pending = command

    def _do_checkpoint(self, command: Command, arguments: Answer) -> Answer:
        assert self._result is not None
        self.trainer.save(self.step, self._result, wait=True)
        path = self.trainer.path / f"step-{self.step:06d}"
        return {"step": self.step, "path": str(path), "text": f"saved {path.name}"}

    def _do_quarantine(self, command: Command, arguments: Answer) -> Answer:
        t, documents = self.trainer, [Quarantined.of(d) for d in arguments["documents"]]
        find_documents(t.loader.stores, documents)  # what is not there is refused before anything is written
        write = partial(
            add_to_quarantine, t.path / QUARANTINE, documents, from_step=self.step + 1, by=command.by,
            reason=str(arguments.get("reason", "")),
        )  # fmt: skip
        together(write if t.rank == 0 else None)
        added = t.loader.exclude(documents)
        text = f"{added} documents are left out from step {self.step + 1} on"
        return {"added": added, "from_step": self.step + 1, "text": text}

    def _do_replay(self, command: Command, arguments: Answer) -> Answer:
        return self._replay(arguments["step"], arguments["at"]).to_dict()

    def _replay(self, step: int, at: str | int) -> ReplayResult:
        t, policy = self.trainer, self.trainer.plan.policy
        if step > t.config.train.steps:
            raise RunError(f"step {step} lies beyond the run's {t.config.train.steps}")
        micro = t.config.train.micro_rows
        together(t.checkpointer.wait)
        data = together(partial(open_data, t.path, step, corpus=t.corpus, rank=t.rank, world=t.world))
        assert data is not None
        with data:
            delivery = data.loader.peek(data.state, data.ahead)
            if at == "current":
                return replay(t.model, delivery, data.loader, t.corpus, policy, micro, step, self.step)
            path = weights_at(t.path, step, at)
            found = together(partial(checkpoint.load, path, groups=("model",)))
            assert found is not None
            with weights_of(t.model, found):
                return replay(t.model, delivery, data.loader, t.corpus, policy, micro, step, found.step)

    def _do_capture(self, command: Command, arguments: Answer) -> None:
        if self.capture is None:
            raise RunError("this run cannot capture traces")
        self.capture(arguments["steps"], partial(self._captured, command))

    def _captured(self, command: Command, answer: Answer) -> None:
        text = answer.get(
            "error"
        ) or f"{answer.get('verdict', 'recorded')}: {answer.get('reason', '')}".rstrip(": ")
        self._answer(command, "failed" if "error" in answer else "done", {**answer, "text": text})

    def _do_rollback_skip(self, command: Command, arguments: Answer) -> None:
        """Everything that can fail happens here, before anything has changed."""
        t, asked = self.trainer, Rollback.of(arguments)
        together(t.checkpointer.wait)
        first = asked.skip[0] if asked.skip else self.step + 1
        if first > self.step + 1:
            raise RunError(f"the run is at step {self.step}: steps from {first} on have not been done yet")
        path = checkpoint_before(t.path, first, asked.to_step)
        found = together(partial(checkpoint.load, path))
        assert found is not None
        batches: Skips = ()
        if asked.skip:
            batches = batches_of(found.state["loader"], found.step, asked.skip, t.loader.skips)
        self.found = found
        self.rewind = Rewind(
            found.step, self.step, asked.skip, batches, command.by, command.arguments.get("incident")
        )
        self._paused, self._pending = False, command

    def rewound(self) -> None:
        """The run stands at the checkpoint that ``rewind`` names: tell whoever asked, and forget it."""
        rewind, command = self.rewind, self._pending
        assert rewind is not None
        self.rewind = self.found = self._pending = None
        self.trainer.stop.agreed = False
        emit(
            "rollback", rewind.to_step, from_step=rewind.from_step, steps=rewind.steps, batches=rewind.batches,
            by=rewind.by, incident=rewind.incident,
        )  # fmt: skip
        if command is not None:
            self.step = rewind.to_step
            self._answer(command, "done", _told(rewind))

    def __enter__(self) -> Controller:
        if self.trainer.rank == 0:
            try:
                self._commands = open_commands(self.trainer.path)
                self._tidy(self._commands, "the process ended before it was done", "running")
            except Exception as error:
                self._tell(f"this run takes no actions: {error}")
        return self

    def _tell(self, text: str) -> None:
        """A warning, once for as long as it lasts."""
        if not self._warned:
            self._warned = True
            emit("warning", self.step, text=text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pending is not None and error is None:
            text = f"stopped after step {self.step}; go on with: deepseek resume {self.trainer.path}"
            self._answer(self._pending, "done", {"step": self.step, "text": text})
        if self._commands is not None:
            ended = f"the run ended at step {self.step}" + (f": {error}" if error else "")
            try:
                self._tidy(self._commands, ended, "running", "queued")
            except Exception as problem:  # the run is done, or fails for a reason of its own
                emit("warning", self.step, text=f"what was asked for cannot be answered: {problem}")
            finally:
                self._commands.close()
                self._commands = None

    def _tidy(self, commands: Commands, why: str, *statuses: str) -> None:
        for status in statuses:
            for command in commands.commands(status):
                commands.finish_command(command.id, "failed", {"error": why})


def together(do: Callable[[], T] | None) -> T | None:
    """``do()`` on every rank that has something to do; what fails on one rank fails on all.

    Raises:
        DeepseekError, OSError: on the ranks where it failed, as it was there. RunError: on the others.
    """
    failed: Exception | None = None
    value = None
    try:
        value = do() if do is not None else None
    except (DeepseekError, OSError) as error:
        failed = error
    problems = comm.gather("" if failed is None else str(failed) or type(failed).__name__)
    if failed is not None:
        raise failed
    if any(problems):
        raise RunError(next(p for p in problems if p))
    return value


def _told(rewind: Rewind) -> Answer:
    back = f"back at step {rewind.to_step}, from {rewind.from_step}"
    if rewind.steps is None:
        return {"to_step": rewind.to_step, "from_step": rewind.from_step, "text": back}
    first, last = rewind.steps
    return {
        "to_step": rewind.to_step, "from_step": rewind.from_step, "steps": [first, last],
        "batches": [list(r) for r in rewind.batches],
        "text": f"{back}; the batches that steps {first} to {last} had are left out",
    }  # fmt: skip
