"""The data that are really trained on, watched beside the training: ``data.quality`` in a thread of its own.

A batch is handed over after its step and looked at while the next ones are computed. Where the thread cannot keep up,
batches are passed over: a sample of them says as much.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek.data import Loader, Tokenizer
from deepseek.data.loader import Delivery
from deepseek.data.quality import DriftAlert, QualityConfig, QualityMonitor, Report
from deepseek.errors import DataError
from deepseek.events import emit
from deepseek.monitor.incident import Incident

REFERENCE = "monitor/quality.npz"  #: in a run directory: what the data were like at its beginning
WAITING = 4  #: batches that may wait for the thread
SHOWN = 200  #: steps before and after a drift that its incident shows


class DataProbe:
    """Emits 'data' events with every source's figures, and hands drifts to ``drifted``.

    Args:
        tokenizer: given, each source's commonest language is told.
        run: its directory, where the reference is kept for ``resumed`` runs.
        drifted: called with the step and the alert, from the thread.
        failed: is told, from the thread, what went wrong in it; nothing is looked at afterwards.
    """

    def __init__(
        self,
        loader: Loader,
        tokenizer: Tokenizer | None,
        run: Path,
        drifted: Callable[[int, DriftAlert], None],
        failed: Callable[[Exception], None],
        config: QualityConfig | None = None,
        resumed: bool = False,
    ) -> None:
        self.monitor = QualityMonitor(loader, config, None if tokenizer is None else tokenizer.decode)
        self.path, self.passed_over = run / REFERENCE, 0
        self._drifted, self._failed = drifted, failed
        self._kept = resumed and self._load()
        self._queue: queue.Queue[tuple[int, Delivery] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name="data-quality", daemon=True)
        self._thread.start()

    def __call__(self, step: int, delivery: Delivery) -> None:
        """Look at a step's batch, later."""
        try:
            self._queue.put_nowait((step, delivery))
        except queue.Full:
            self.passed_over += 1

    def close(self) -> None:
        """Look at what still waits, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _load(self) -> bool:
        """Go on with the reference of the run's beginning; whether there is one."""
        try:
            if self.path.exists():
                self.monitor.load(self.path)
                return True
        except DataError as error:
            emit("warning", text=f"monitor: {error}")
        return False

    def _work(self) -> None:
        well = True
        while (found := self._queue.get()) is not None:
            try:
                if well:
                    self._look(*found)
            except Exception as error:
                well = False  # goes on taking what it is given: whoever gives must not wait
                self._failed(error)

    def _look(self, step: int, delivery: Delivery) -> None:
        report = self.monitor.update(delivery)
        if report is not None:
            self._tell(step, report)
        if not self._kept and self.monitor.ready:
            self._kept = True
            self.monitor.save(self.path)

    def _tell(self, step: int, report: Report) -> None:
        emit("data", step, sources={name: quality.to_dict() for name, quality in report.sources.items()})
        for alert in report.alerts:
            self._drifted(step, alert)


def drift_incident(step: int, alert: DriftAlert) -> Incident:
    """A drift as an incident; its samples are the documents that are least like the reference."""
    series, score = f"data/{alert.source}/psi", alert.psi / max(alert.limit_psi, 1e-9)
    evidence = {"text": alert.text, "series": series, "step": step, "value": alert.psi, "score": score}
    mover = {"name": series, "step": step, "score": score, "before": alert.limit_psi, "after": alert.psi}
    return Incident(
        id=f"{step}-data_drift-{alert.source}", step=step, first_step=step, kind="data_drift", severity="warning",
        verdict="DATA", confidence=0.9, title=f"Source '{alert.source}' has changed", summary=alert.text,
        evidence=[evidence], movers=[mover], window=[max(1, step - SHOWN), step + SHOWN],
        samples=foreign_samples(alert),
    )  # fmt: skip


def foreign_samples(alert: DriftAlert) -> list[dict[str, Any]]:
    """The documents an alert names, as an incident's samples; ``foreign`` is how far from the reference they are."""
    return [
        {"source": d["source"], "path": d["path"], "offset": d["offset"], "foreign": d["value"]}
        for d in alert.documents
    ]
