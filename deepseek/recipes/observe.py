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
from deepseek.data.quality import DriftAlert
from deepseek.dist import comm
from deepseek.errors import RunError
from deepseek.events import Event, Sink, emit
from deepseek.monitor.alerts import AlertSink, receivers_of
from deepseek.monitor.config import MonitorConfig
from deepseek.monitor.detect import Watch
from deepseek.monitor.guard import Guarded, tell_failure
from deepseek.monitor.inspect.trace import TraceCapture
from deepseek.monitor.probe_data import DataProbe, drift_incident
from deepseek.monitor.probe_documents import explain, source_losses, worst
from deepseek.monitor.probe_memory import MemoryProbe
from deepseek.monitor.probe_ranks import RankProbe
from deepseek.monitor.probes import Cadence, Cost, SampledProbe, StepProbe
from deepseek.monitor.sink import StoreSink
from deepseek.monitor.store import RunStore
from deepseek.monitor.watch_memory import WatchMemory
from deepseek.recipes.respond import Responder
from deepseek.recipes.siblings import META as ORDER
from deepseek.recipes.siblings import data_order, find_siblings
from deepseek.train import StepResult, TrainStep

REMEMBERED = 4096  #: steps whose batches can be explained
STORE, DATA = "the series store", "what the data are like"


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
        self.responder = Responder(config, run)
        self._ear = Ear(self.close)
        self._failed: dict[str, Exception | None] = {}
        self._batches: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)
        self._step: TrainStep | None = None
        self.data: DataProbe | None = None
        self._cost: Cost
        if config.enabled:
            self.sinks = [*(self._sinks() if rank == 0 else ()), self.responder, self._ear]

    def _sinks(self) -> list[Sink]:
        """Who keeps series and incidents, and who tells people about them."""
        c, found = self.config, list[Sink]()
        receivers = receivers_of(c.webhook, c.command)
        if receivers:  # first: it hears what the others find as they close
            found.append(Guarded(AlertSink(self.run, receivers, severity=c.alert_from), "telling people"))
        if self.watch is not None:
            found.append(Guarded(WatchMemory(self.watch, self.run, self.resumed), "what detectors remember"))
        self._safely(STORE, lambda: found.append(Guarded(StoreSink(self.run, self.watch), STORE)))
        return found

    def begin(
        self,
        step: TrainStep,
        loader: Loader,
        tokenizer: Tokenizer | None = None,
        start: int = 0,
        steps: int = 0,
        *,
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
    ) -> None:
        """Training is about to go on after step ``start``, to step ``steps``, with these.

        Args:
            flops_per_token, peak_flops: of the model and of all devices, for the verdict on a trace; 0: unknown.
        """
        self._loader, self._tokenizer = loader, tokenizer
        self.tracer.train_step = step
        self.tracer.flops_per_token, self.tracer.peak_flops = flops_per_token, peak_flops
        self.responder.begin()
        for what, error in self._failed.items():
            if error is not None:  # before anybody listened
                tell_failure(what, error)
        self._failed = dict.fromkeys(self._failed)
        if not self.config.enabled:
            return
        self._step = step
        self.ranks = RankProbe(step)
        self.cadence = Cadence(self.config.overhead, self.config.every)
        self.cadence.begin(start, steps)
        self.each, self.memory = StepProbe(step), MemoryProbe(step)
        self.sampled = SampledProbe(step, self.config.rows, self.config.queries)
        self._prepared, self._costs = 0, list[Cost]()
        self._nonfinite = torch.zeros((), device=step.device)
        self._policy, self._switches = step.policy.name, 0
        if self.rank == 0:
            self._safely("runs with the same data", self._find_siblings)
            self._safely(DATA, self._watch_data)

    def _watch_data(self) -> None:
        self._stop_data()
        if self.config.data:
            self.data = DataProbe(
                self._loader, self._tokenizer if self.config.languages else None, self.run, self._drifted,
                lambda error: tell_failure(DATA, error), self.config.quality, self.resumed,
            )  # fmt: skip
        self.resumed = True  # should this process go back to a checkpoint

    def _stop_data(self) -> None:
        if self.data is not None:
            found, self.data = self.data, None
            found.close()

    def _drifted(self, step: int, alert: DriftAlert) -> None:
        """Keep a drift: in the incident that detectors made of it, or in one of its own."""
        new = drift_incident(step, alert).to_dict()
        with RunStore(self.run) as store:
            for known in store.incidents("open"):
                if known.get("kind") == "data_drift" and alert.source in str(known.get("evidence")):
                    store.change_incident(known["id"], samples=new["samples"])
                    return
            store.put_incident(new)
        emit("incident", step, **{k: v for k, v in new.items() if k != "step"})

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
        if self.data is not None and self._loader.last is not None:
            self.data(step, self._loader.last)
        self._safely("the sampled probes", self._some_steps, step)
        self._safely("what incidents are answered with", self._answer)
        self.seconds += time.perf_counter() - began

    def end(self) -> None:
        """The last step is done; on every rank."""
        if self._step is None:
            return
        self._safely(DATA, self._stop_data)
        self.ranks.flush()
        self._safely("what incidents are answered with", self._answer)
        while step := self.ranks.heard or comm.from_first(self.ranks.ask):
            self.ranks.heard = self.ranks.ask = 0
            self._explain_together(step)

    def close(self) -> None:
        """End what works beside the training."""
        self._safely(DATA, self._stop_data)
        self._safely("traces", self.tracer.finish)

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
                self.memory.prepare()
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
        self.responder.respond(data_watched=self.data is not None)
        while comm.world() == 1 and self.responder.wanted:
            self._explain_together(self.responder.wanted)
        self.ranks.ask = self.responder.wanted

    def _explain_together(self, step: int) -> None:
        """Every rank looks at its part of the step's batch; rank 0 puts the worst documents into the incident."""
        own: list[dict[str, Any]] = []
        self._safely("the documents behind incidents", lambda: own.extend(self.explain(step)))
        found = worst(itertools.chain(*comm.gather(own)), self.config.samples)
        self._safely("what is done about incidents", self.responder.explained, step, found, again=True)
        self.ranks.ask = self.responder.wanted

    def _safely(self, what: str, do: Callable[..., None], *args: Any, again: bool = False) -> None:
        """Do it; what fails is told once, and not done ``again``."""
        if what in self._failed and not again:
            return
        try:
            do(*args)
        except Exception as error:
            heard = self._step is not None
            if heard and what not in self._failed:
                tell_failure(what, error)
            self._failed[what] = None if heard else error


class Ear(Sink):
    """Remembers where the last step's time went; ``closing`` is called when the run ends, however it does."""

    def __init__(self, closing: Callable[[], None]) -> None:
        self.seconds: Mapping[str, float] = {}
        self._closing = closing

    def write(self, event: Event) -> None:
        if event.name == "train":
            self.seconds = event.values.get("seconds", {})

    def close(self) -> None:
        self._closing()
