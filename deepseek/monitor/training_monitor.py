"""``TrainingMonitor``: watches the figures of any training loop, one call a step (source document 2, section 4.2).

    monitor = TrainingMonitor("runs/mine")
    for step in ...:
        monitor.update({"loss": loss, "throughput": tokens, "gpu_util": [91, 93, 40, 92]})

Each figure has a keeper that knows what is usual for it: ``MovingAverage`` for a value, ``RateCounter`` for an amount
per time, ``MultiGPUAggregator`` for one value a device. What is unusual is an alert.

This needs nothing but numbers. Runs of this package have the larger ``deepseek.monitor.detect``, too.
"""

from __future__ import annotations

import math
import time as clock
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from deepseek.monitor.catalogue import describe
from deepseek.monitor.keepers import Bad, Keeper, MovingAverage, MultiGPUAggregator, RateCounter
from deepseek.monitor.store import RunStore


@dataclass(frozen=True)
class Alert:
    """A figure was unusual: ``value`` where ``expected`` was, ``score`` times the usual spread away.

    ``step`` is the update's, ``time`` in Unix seconds. ``detail`` says more: which devices.
    """

    name: str
    step: int
    value: float
    expected: float
    score: float
    text: str
    time: float
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class TrainingMonitor:
    """Watches the figures of a training loop and alerts to what is unusual.

    Args:
        run: a run directory; figures become series of its store, alerts are kept there. ``None`` keeps nothing.
        metrics: a keeper for each name; those of 'loss', 'throughput' and 'gpu_util' are there by default, any other
            name gets a ``MovingAverage`` (which way is bad is looked up in the catalogue).
        window: of the default keepers.
        on_alert: called with each alert.

    Attributes:
        metrics: the keepers by name. alerts: everything alerted to so far.
    """

    def __init__(
        self,
        run: Path | str | None = None,
        metrics: Mapping[str, Keeper] | None = None,
        *,
        window: int = 100,
        on_alert: Callable[[Alert], object] | None = None,
    ) -> None:
        self.metrics: dict[str, Keeper] = {
            "loss": MovingAverage(window=window, bad="up"),
            "throughput": RateCounter(window=window),
            "gpu_util": MultiGPUAggregator(window=window),
            **(metrics or {}),
        }
        self.alerts: list[Alert] = []
        self.step = 0
        self._window, self._on_alert = window, on_alert
        self._alarmed: set[str] = set()
        self._store = RunStore(run) if run is not None else None
        self._writer = self._store.writer() if self._store is not None else None

    def update(self, metrics: Mapping[str, Any], step: int | None = None) -> list[Alert]:
        """Take the figures of a step (by default the one after the last); returns what is alerted to.

        An alert is given when something unusual begins, and not again until it was usual in between.

        Raises:
            TypeError, ValueError: a value is no number (for ``gpu_util``: no numbers).
        """
        before = len(self.alerts)
        self.step = self.step + 1 if step is None else step
        row: dict[str, float] = {}
        for name, value in metrics.items():
            keeper = self._keeper(name)
            keeper.update(value)
            row.update(keeper.figures(name))
            if keeper.is_anomalous():
                self.trigger_alert(name)
            else:
                self._alarmed.discard(name)
        if self._writer is not None:
            self._writer.log(self.step, row)
        return self.alerts[before:]

    def trigger_alert(self, name: str) -> None:
        """Alert to ``name`` as it is now, if that was not done yet."""
        if name in self._alarmed:
            return
        self._alarmed.add(name)
        keeper = self.metrics[name]
        text = keeper.detail or _sentence(name, keeper)
        alert = Alert(
            name, self.step, keeper.value, keeper.expected, keeper.score, text, clock.time(), keeper.detail
        )
        self.alerts.append(alert)
        if self._store is not None:
            facts = {"value": alert.value, "expected": alert.expected, "score": alert.score}
            severity = "warning" if math.isfinite(alert.value) else "critical"
            self._store.add_alert(name, text, step=self.step, severity=severity, time=alert.time, **facts)
        if self._on_alert is not None:
            self._on_alert(alert)

    def close(self) -> None:
        """Seal the store."""
        if self._writer is not None and self._store is not None:
            self._writer.close()
            self._store.close()

    def __enter__(self) -> TrainingMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _keeper(self, name: str) -> Keeper:
        if name not in self.metrics:
            metric = describe(name)
            better = metric.better if metric is not None else ""
            bad: Bad = "up" if better == "lower" else "down" if better == "higher" else "both"
            self.metrics[name] = MovingAverage(window=self._window, bad=bad)
        return self.metrics[name]


def _sentence(name: str, keeper: Keeper) -> str:
    if not math.isfinite(keeper.value):
        return f"{name} is {keeper.value}"
    return f"{name} is {keeper.value:.4g} where {keeper.expected:.4g} is usual ({keeper.score:+.1f} spreads)"


__all__ = ["Alert", "Keeper", "MovingAverage", "MultiGPUAggregator", "RateCounter", "TrainingMonitor"]
