"""Record a few steps of a live run, and say what bounds them.

    RUN/monitor/traces/step-000120/
        trace.json.gz      the profiler's Chrome trace, for Perfetto or chrome://tracing
        speedscope.json    the same as a flame graph
        verdict.json       phases, shares, verdict, the operators with most time

``TraceCapture`` is a hook of ``fit`` that does nothing until ``capture`` is called, from any thread. In a loop of one's
own, call ``start``, ``step`` after every step, and ``finish``. Only rank 0 records. Files are written by a thread; the
training goes on.
"""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from deepseek.errors import ConfigError, RunError
from deepseek.events import emit
from deepseek.files import write_atomic
from deepseek.monitor.inspect.bottleneck import bottleneck
from deepseek.monitor.inspect.speedscope import to_speedscope
from deepseek.monitor.inspect.timeline import PHASE, STEP, read_trace

MOST_STEPS = 50  #: more makes traces that no viewer opens
Answer = dict[str, Any]
Done = Callable[[Answer], None]


class TraceCapture:
    """Records the next steps when asked. A hook of ``fit``: put it last, so that what follows it is the next step.

    Args:
        run: the run directory. train_step: the ``TrainStep`` whose phases are to be told apart; without it, only
            operators are recorded. rank: only rank 0 records.
        flops_per_token, peak_flops: of the model and of the device (all ranks), for the share of the peak; 0: unknown.
    """

    def __init__(
        self,
        run: Path | str,
        train_step: Any = None,
        *,
        rank: int = 0,
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
    ) -> None:
        self.run, self.train_step, self.rank = Path(run), train_step, rank
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self._lock = threading.Lock()
        self._wanted: tuple[int, Done | None] | None = None
        self._recording: _Recording | None = None
        self._writer: threading.Thread | None = None
        self._last, self._usual = time.perf_counter(), 0.0

    def capture(self, steps: int = 3, done: Done | None = None) -> Answer:
        """Arm a recording of the next ``steps`` steps; returns at once with what was arranged.

        Args:
            done: called with the verdict when the files are written, from the thread that writes them.

        Raises:
            ConfigError: ``steps`` is out of range. RunError: a recording is under way.
        """
        if not 1 <= steps <= MOST_STEPS:
            raise ConfigError(f"capture.steps={steps} must lie between 1 and {MOST_STEPS}")
        with self._lock:
            if self._wanted is not None or self._recording is not None:
                raise RunError("a trace of this run is being recorded; wait until it is there")
            if self.rank == 0:
                self._wanted = steps, done
        return {"steps": steps, "directory": str(trace_directory(self.run))}

    def __call__(self, step: int, result: Any) -> None:
        """The hook: begins, goes on with, or ends a recording."""
        now = time.perf_counter()
        if self._recording is None:
            self._usual = now - self._last
        self._last = now
        if self._recording is not None:
            self.step(step, getattr(result, "tokens", 0))
        elif self._wanted is not None:
            with self._lock:
                wanted, self._wanted = self._wanted, None
            assert wanted is not None
            self.start(*wanted, at=step)

    def start(self, steps: int = 3, done: Done | None = None, *, at: int = 0) -> None:
        """Begin to record; ``at`` is the number of the last step done."""
        self._recording = _Recording(self.train_step, steps, done, at, self._usual)
        self._recording.begin_step()

    def step(self, step: int | None = None, tokens: int = 0) -> bool:
        """A step is done. True while the recording goes on; with the last step it is finished by itself."""
        recording = self._recording
        if recording is None:
            return False
        recording.end_step(tokens)
        if recording.done_steps < recording.steps:
            recording.begin_step()
            return True
        self.finish(wait=False)
        return False

    def finish(self, wait: bool = True) -> None:
        """End the recording now, if one is under way, and write it; ``wait`` until the files are there."""
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.stop()
            if recording.done_steps:
                work = threading.Thread(target=self._write, args=(recording,), name="trace")
                self._writer = work
                work.start()
        if wait and self._writer is not None:
            self._writer.join()

    def _write(self, recording: _Recording) -> None:
        last = recording.first + recording.done_steps
        path = trace_directory(self.run) / f"step-{recording.first + 1:06d}"
        try:
            answer = write_trace(recording, path, self.flops_per_token, self.peak_flops)
        except Exception as error:  # a full disk must not end the run
            answer = {"id": path.name, "error": f"{type(error).__name__}: {error}"}
            emit("warning", last, text=f"the trace could not be written: {answer['error']}")
        else:
            emit(
                "trace",
                last,
                **{k: answer[k] for k in ("id", "verdict", "reason", "seconds", "shares", "phases")},
            )
        if recording.done is not None:
            recording.done(answer)


class _Recording:
    """One recording: the profiler, the ranges that name steps and phases, and what they are hung on."""

    def __init__(self, train_step: Any, steps: int, done: Done | None, first: int, usual: float) -> None:
        self.steps, self.done, self.first, self.usual = steps, done, first, usual
        self.done_steps, self.tokens, self.began = 0, 0, time.time()
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or the profiler writes into the run's terminal
        activities = [ProfilerActivity.CPU]
        device = getattr(train_step, "device", None)
        self._cuda = device is not None and device.type == "cuda"  # a CPU run beside a GPU leaves that alone
        if self._cuda:
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities, acc_events=True)
        self._step: Any = None
        self._data: Any = None
        self._patched: list[tuple[Any, str]] = []
        self._hang(train_step)
        self.profiler.start()

    def _hang(self, train_step: Any) -> None:
        """Wrap the parts of a step on this one object, for as long as the recording takes."""
        optimizer = getattr(train_step, "optimizer", None)
        for owner, name, phase in (
            (train_step, "loss_fn", "forward"),
            (train_step, "micro", "backward"),
            (train_step, "finish", "optimizer"),
            (optimizer, "fill", ""),
        ):
            if hasattr(owner, name):
                had = name in vars(owner)
                setattr(owner, name, self._named(getattr(owner, name), phase))
                self._patched.append((owner, name if not had else f"={name}"))

    def _named(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def called(*args: Any, **values: Any) -> Any:
            self._end_data()
            if not phase:
                return function(*args, **values)
            with record_function(PHASE + phase):
                return function(*args, **values)

        called.__wrapped__ = function  # type: ignore[attr-defined]
        return called

    def begin_step(self) -> None:
        self._step = record_function(f"{STEP}{self.first + self.done_steps + 1}")
        self._step.__enter__()
        if self._patched:
            self._data = record_function(PHASE + "data")
            self._data.__enter__()

    def _end_data(self) -> None:
        if self._data is not None:
            self._data.__exit__(None, None, None)
            self._data = None

    def end_step(self, tokens: int) -> None:
        if self._cuda:
            torch.cuda.synchronize()  # the last kernels belong to this step
        self._end_data()
        self._step.__exit__(None, None, None)
        self._step = None
        self.done_steps += 1
        self.tokens += tokens

    def stop(self) -> None:
        self._end_data()
        if self._step is not None:
            self._step.__exit__(None, None, None)
        self.profiler.stop()
        for owner, name in self._patched:
            if name.startswith("="):
                name = name[1:]
                setattr(owner, name, getattr(owner, name).__wrapped__)
            else:
                delattr(owner, name)
        self._patched.clear()


def trace_directory(run: Path) -> Path:
    """Where a run's traces are."""
    return run / "monitor" / "traces"


def write_trace(recording: _Recording, path: Path, flops_per_token: float, peak_flops: float) -> Answer:
    """Write the three files of a recording into ``path``; the verdict, last, makes it count. Returns the verdict."""
    path.mkdir(parents=True, exist_ok=True)
    raw = path / ".trace.json"
    recording.profiler.export_chrome_trace(str(raw))
    data = raw.read_bytes()
    raw.unlink()
    (path / "trace.json.gz").write_bytes(gzip.compress(data, 6))
    timeline = read_trace(json.loads(data))
    flops = flops_per_token * recording.tokens / recording.done_steps
    found = bottleneck(timeline, flops_per_step=flops or None, peak_flops=peak_flops or None)
    first, last = recording.first + 1, recording.first + recording.done_steps
    name = f"{path.parents[2].name}, steps {first} to {last}"
    write_atomic(path / "speedscope.json", json.dumps(to_speedscope(timeline, name), separators=(",", ":")))
    answer = {
        "id": path.name, "step": first, "last_step": last, "time": recording.began, **found.to_dict(),
        "usual_seconds": recording.usual or None,  # of the step before: what recording costs shows beside it
        "path": str(path), "pid": os.getpid(),
    }  # fmt: skip
    write_atomic(path / "verdict.json", json.dumps(answer, indent=1))
    return answer


def list_traces(run: Path) -> list[Answer]:
    """The verdicts of a run's traces, newest first."""
    found = []
    for path in sorted(trace_directory(run).glob("*/verdict.json"), reverse=True):
        with suppress(OSError, ValueError):
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


FORMS = {"speedscope": "speedscope.json", "verdict": "verdict.json", "chrome": "trace.json.gz"}


def trace_file(run: Path, trace: str, form: str = "speedscope") -> Path:
    """The file of one trace. Raises ``RunError`` for one that is not there, ``ConfigError`` for an unknown form."""
    if form not in FORMS:
        raise ConfigError(f"a trace has no form '{form}'; it has {', '.join(FORMS)}")
    known = [t["id"] for t in list_traces(run)]
    if trace not in known:
        raise RunError(f"no trace '{trace}' of {run}; there are: {', '.join(known) or 'none'}")
    return trace_directory(run) / trace / FORMS[form]
