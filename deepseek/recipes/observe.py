"""``Observer``: everything that watches a pretraining run, as one object that a recipe holds.

    observer = Observer(config.monitor, run, rank)
    with attached(*sinks, *observer.sinks):
        observer.begin(train_step, loader, tokenizer)
        fit(..., hooks=[..., observer, ...])

It keeps the series store, runs the probes, looks for incidents, finds the documents behind one and, if the config says
so, asks the run to act. It never ends a run: what fails is told once, as a warning, and is silent from then on.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.data import Loader, Tokenizer
from deepseek.dist import comm
from deepseek.errors import RunError
from deepseek.events import Event, Sink, emit
from deepseek.monitor.alerts import AlertSink, receivers_of
from deepseek.monitor.config import MonitorConfig
from deepseek.monitor.control import request
from deepseek.monitor.detect import Watch
from deepseek.monitor.inspect.trace import TraceCapture
from deepseek.monitor.probe_documents import explain, source_losses, worst
from deepseek.monitor.probe_memory import MemoryProbe
from deepseek.monitor.probe_ranks import RankProbe
from deepseek.monitor.probes import Cadence, SampledProbe, StepProbe
from deepseek.monitor.sink import StoreSink
from deepseek.monitor.store import RunStore
from deepseek.recipes.siblings import META as ORDER
from deepseek.recipes.siblings import data_order, find_siblings
from deepseek.train import StepResult, TrainStep

#: Incidents that a batch may have caused: its documents are named, and leaving it out may help.
OF_DATA = frozenset({"loss_spike", "gradient_spike", "divergence", "nan", "data_drift"})
SEVERITY = ("info", "warning", "critical")
REMEMBERED = 4096  #: steps whose batches can be explained
MOST_ACTIONS = 3  #: times that a run acts by itself
STORE = "the series store"
MEMORY = "watch"  #: key of the store under which detectors keep what they know


class Observer:
    """Watches one run on one rank; a hook of ``fit``.

    Args:
        run: its directory; the store is in ``run/monitor``. rank: this process's; 0 keeps the store.
        resumed: the run goes on, and so does what the detectors know of it.

    Attributes:
        sinks: to attach while the run goes on.
        tracer: records some steps when asked; a hook to be put last.
        seconds: that the probes took on the host so far.
    """

    def __init__(self, config: MonitorConfig, run: Path, rank: int = 0, resumed: bool = False) -> None:
        self.config, self.run, self.rank, self.resumed = config, run, rank, resumed
        self.watch = Watch(config.detection) if config.enabled and config.detect and rank == 0 else None
        self.seconds = 0.0
        self.sinks: list[Sink] = []
        self.tracer = TraceCapture(run, rank=rank)
        self._ear = Ear()
        self._failed: dict[str, Exception | None] = {}
        self._batches: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)
        self._unexplained: deque[dict[str, Any]] = deque()
        self._explained: set[Any] = set()
        self._acted_on: set[Any] = set()
        self._step: TrainStep | None = None
        self._cost: Cost
        if config.enabled:
            self.sinks = [*(self._sinks() if rank == 0 else ()), self._ear]

    def _sinks(self) -> list[Sink]:
        """Who keeps series and incidents, and who tells people about them."""
        c, found = self.config, list[Sink]()
        if self.watch is not None:
            found.append(Guarded(WatchMemory(self.watch, self.run, self.resumed), "what detectors remember"))
        self._safely(STORE, lambda: found.append(Guarded(StoreSink(self.run, self.watch), STORE)))
        if receivers := receivers_of(c.webhook, c.command):
            found.append(Guarded(AlertSink(self.run, receivers, severity=c.alert_from), "telling people"))
        return found

    def begin(
        self, step: TrainStep, loader: Loader, tokenizer: Tokenizer | None = None, start: int = 0
    ) -> None:
        """Training is about to go on after step ``start`` with these."""
        self._loader, self._tokenizer = loader, tokenizer
        self.tracer.train_step = step
        self._ear.acting = False
        for what, error in self._failed.items():
            if error is not None:  # before anybody listened
                _tell(what, error)
        self._failed = dict.fromkeys(self._failed)
        if not self.config.enabled:
            return
        self._step = step
        self.ranks = RankProbe(step)
        self.cadence = Cadence(self.config.overhead, self.config.every)
        self.cadence.begin(start)
        self.each, self.memory = StepProbe(step), MemoryProbe(step)
        self.sampled = SampledProbe(step, self.config.rows, self.config.queries)
        self._prepared, self._costs = 0, list[Cost]()
        self._nonfinite = torch.zeros((), device=step.device)
        self._policy, self._switches = step.policy.name, 0
        if self.rank == 0:
            self._safely("runs with the same data", self._find_siblings)

    def _find_siblings(self) -> None:
        order = data_order(self._loader)
        with suppress(RunError), RunStore(self.run) as store:  # a store that is broken says so elsewhere
            store.set_meta(ORDER, order)
        if self.watch is not None:
            self.watch.siblings = tuple(find_siblings(self.run, order))

    def __call__(self, step: int, result: StepResult) -> None:
        if self._step is None:
            return
        began = time.perf_counter()
        if self._loader.last is not None:
            self._batches.append((step, self._loader.last.number))
        self._safely("the times of ranks", self.ranks, step, self._ear.seconds)
        if self.ranks.heard:
            self._explain_together(self.ranks.heard)
        if self.rank:
            return
        self._safely("the probes of every step", self._every_step, step, result)
        self._safely("the sampled probes", self._some_steps, step)
        self._safely("what incidents are answered with", self._answer)
        self.seconds += time.perf_counter() - began

    def end(self) -> None:
        """The last step is done; on every rank."""
        if self._step is None:
            return
        self.ranks.flush()
        self._safely("what incidents are answered with", self._answer)
        while step := self.ranks.heard or comm.from_first(self.ranks.ask):
            self.ranks.heard = self.ranks.ask = 0
            self._explain_together(step)

    def _every_step(self, step: int, result: StepResult) -> None:
        assert self._step is not None
        now = self._step.policy
        self._switches += now.name != self._policy
        self._policy = now.name
        self._nonfinite = self._nonfinite + result.skipped
        reading = self.each(result)
        emit(
            "probe", step, names=reading.names, values=reading.values,
            series={
                "precision/loss_scale": now.loss_scale, "precision/nonfinite": self._nonfinite,
                "precision/switches": float(self._switches),
            },
        )  # fmt: skip

    def _some_steps(self, step: int) -> None:
        """Look closer at the steps whose turn it is; the step before one is when weights are remembered."""
        self.cadence.step(sum(self._ear.seconds.values()))
        if self._prepared == step:
            with self._cost:
                self._look(step)
            self._costs.append(self._cost)
            self.cadence.done(step)
        while self._costs and (spent := self._costs[0].read()):
            self.cadence.took(spent)
            del self._costs[0]
        if self.cadence.due(step + 1):
            self._cost = Cost(self.sampled.step.device)
            with self._cost:
                self.sampled.prepare()
            self._prepared = step + 1

    def _look(self, step: int) -> None:
        last = self._loader.last
        if last is None:
            return
        reading, seen = self.sampled(last.batch)
        reading.tell(step)
        series: dict[str, float | Tensor] = dict(self.memory(last.batch))
        series |= source_losses(seen, last, self._loader)
        emit("probe", step, series=series)

    def explain(self, step: int) -> list[dict[str, Any]]:
        """The documents of this rank's part of step ``step``'s batch that lose most now; see ``probe_documents``.

        Raises:
            RunError: the step was not seen by this process, or too long ago.
            DataError: its batch cannot be made again.
        """
        number = next((batch for s, batch in reversed(self._batches) if s == step), None)
        if number is None or self._step is None:
            seen = f"{self._batches[0][0]} to {self._batches[-1][0]}" if self._batches else "none"
            raise RunError(f"the batch of step {step} is not known here; steps known: {seen}")
        last = self._loader.last
        delivery = last if last is not None and last.number == number else self._loader.peek(number)
        return explain(self._step, delivery, self._loader, self._tokenizer, self.config.samples)

    def _answer(self) -> None:
        """What was found since the last step: do what the config says, and have the documents named."""
        while self._ear.incidents:
            incident = self._ear.incidents.popleft()
            key = incident.get("id")
            if self.config.on_incident != "none" and _severe(incident, self.config.act_from):
                self._safely("what is done about incidents", self._act, incident)
            named = incident.get("samples") or incident.get("kind") not in OF_DATA or key in self._explained
            if self.config.explain and self.config.samples and not named:
                self._explained.add(key)  # it is told again when more is known of it
                self._unexplained.append(incident)
        if self._unexplained:
            self.ranks.ask = int(self._unexplained[0]["step"])

    def _explain_together(self, step: int) -> None:
        """Every rank looks at its part of the step's batch; rank 0 puts the worst documents into the incident."""
        own: list[dict[str, Any]] = []
        self._safely("the documents behind incidents", lambda: own.extend(self.explain(step)))
        found = worst(itertools.chain(*comm.gather(own)), self.config.samples)
        waiting = [i for i in self._unexplained if int(i["step"]) == step]
        for incident in waiting:
            self._unexplained.remove(incident)
            self._safely("the documents behind incidents", self._keep, {**incident, "samples": found})
        if self._unexplained:
            self.ranks.ask = int(self._unexplained[0]["step"])

    def _keep(self, incident: Mapping[str, Any]) -> None:
        with RunStore(self.run) as store:
            store.change_incident(incident["id"], samples=incident["samples"])

    def _act(self, incident: Mapping[str, Any]) -> None:
        """Ask the run for what the config says; once at a time, and not for ever."""
        action, arguments = self.config.on_incident, {"incident": incident.get("id")}
        if action == "rollback_skip":
            if incident.get("kind") not in OF_DATA:
                return
            step = int(incident["step"])
            arguments["skip"] = [max(1, int(incident.get("first_step") or step)), step]
        if self._ear.acting or incident["id"] in self._acted_on or len(self._acted_on) > MOST_ACTIONS:
            return
        self._acted_on.add(incident["id"])
        if len(self._acted_on) > MOST_ACTIONS:
            text = (
                f"monitor: {MOST_ACTIONS} times on_incident='{action}' did not help; it is off from here on"
            )
            emit("warning", int(incident["step"]), text=text)
            return
        self._ear.acting = True
        request(self.run, action, arguments, by="monitor.on_incident")

    def _safely(self, what: str, do: Callable[..., None], *args: Any) -> None:
        """Do it; what fails is told, and not done again."""
        if what in self._failed:
            return
        try:
            do(*args)
        except Exception as error:
            heard = self._step is not None
            self._failed[what] = None if heard else error
            if heard:
                _tell(what, error)


class Ear(Sink):
    """Remembers where the last step's time went, incidents that nobody has looked at yet, and whether an action that
    was asked for is still to be done."""

    def __init__(self) -> None:
        self.seconds: Mapping[str, float] = {}
        self.incidents: deque[dict[str, Any]] = deque()
        self.acting = False

    def write(self, event: Event) -> None:
        if event.name == "train":
            self.seconds = event.values.get("seconds", {})
        elif event.name == "action" and event.values.get("status") in ("done", "failed"):
            self.acting = False
        elif event.name == "incident":
            self.incidents.append({**event.values, "step": event.values.get("step", event.step)})


class WatchMemory(Sink):
    """Keeps what a watch has learnt to think usual, from one process of a run to the next.

    To be attached before the sink that feeds the watch: sinks are closed in reverse order.
    """

    def __init__(self, watch: Watch, run: Path, resumed: bool) -> None:
        self.watch, self.run, self.waiting = watch, run, resumed

    def write(self, event: Event) -> None:
        if self.waiting:  # the first event comes before the first row
            self.waiting = False
            state = None
            with suppress(RunError), RunStore(self.run) as store:
                state = store.meta(MEMORY)
            if state is not None:
                self.watch.load_state_dict(state)

    def close(self) -> None:
        with suppress(RunError), RunStore(self.run) as store:
            store.set_meta(MEMORY, self.watch.state_dict())


class Guarded(Sink):
    """A sink whose failures end nothing: the first is told, then it hears no more."""

    def __init__(self, inner: Sink, name: str) -> None:
        self.inner, self.name, self.failed = inner, name, False

    def write(self, event: Event) -> None:
        if self.failed:
            return
        try:
            self.inner.write(event)
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        try:
            self.inner.close()
        except Exception as error:
            if not self.failed:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failed = True
        _tell(self.name, error)


class Cost:
    """What a part of a step costs: the host's time or, where it is more, that of the accelerator's queue."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host = 0.0
        self._marks: list[tuple[torch.Event, torch.Event]] = []

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        if self.device.type != "cpu":
            self._start = self._mark()

    def __exit__(self, *error: object) -> None:
        self._host += time.perf_counter() - self._began
        if self.device.type != "cpu":
            self._marks.append((self._start, self._mark()))

    def _mark(self) -> torch.Event:
        mark = torch.Event(self.device, enable_timing=True)
        mark.record()
        return mark

    def read(self) -> float:
        """Seconds, once they are known; 0 until then. Waits for nothing."""
        if any(not end.query() for _, end in self._marks):
            return 0.0
        return max(self._host, sum(start.elapsed_time(end) for start, end in self._marks) / 1e3)


def _severe(incident: Mapping[str, Any], least: str) -> bool:
    severity = str(incident.get("severity", ""))
    return severity in SEVERITY and SEVERITY.index(severity) >= SEVERITY.index(least)


def _tell(what: str, error: Exception) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    emit("warning", text=f"monitor: {what} failed and is off from here on ({text}); training goes on")
