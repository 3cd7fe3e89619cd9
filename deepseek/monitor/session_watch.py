"""The detectors, beside a loop that is not ours: they read what it logged, and cost ``log`` nothing.

A thread reads new rows back from the store, as a dashboard in another process would, and shows them to a ``Watch``
under the names that detectors know. People call the loss ``loss`` or ``train_loss``; what is found is told in their
names. Silence is no hang here: nobody knows when such a loop is due, and in a notebook it never is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek.files import InUse, claimed
from deepseek.monitor.series import SeriesReader
from deepseek.monitor.store import RunStore

if TYPE_CHECKING:
    from deepseek.monitor.detect import Watch
    from deepseek.monitor.incident import Incident

#: What people call the series that detectors know.
KNOWN = {
    "train/loss": ("loss", "train_loss", "training_loss", "train/train_loss"),
    "eval/loss": ("val_loss", "eval_loss", "valid_loss", "validation_loss", "val/loss", "test_loss"),
    "train/grad_norm": ("grad_norm", "gradient_norm", "train_grad_norm", "grad/norm", "global_grad_norm"),
    "train/lr": ("lr", "learning_rate", "train_lr", "train/learning_rate"),
    "train/tokens_per_second": ("tokens_per_second", "tokens_per_sec", "throughput", "tok/s", "samples_per_second"),
    "precision/loss_scale": ("loss_scale", "grad_scale", "scaler"),
}  # fmt: skip
THEIRS = {alias: known for known, names in KNOWN.items() for alias in names}
MOST = 5000  #: rows read at once; of a loop that is faster the last ones are looked at

_logger = logging.getLogger(__name__)


class SessionWatch:
    """Looks at the rows of the run at ``path`` while they are logged, until ``close``.

    Args:
        start: the first step to look at; what came before is not news. seconds: between two looks.

    Of several processes that log into one run the first one watches.
    """

    def __init__(self, path: Path, start: int = 0, seconds: float = 0.5) -> None:
        self.path, self.seconds = path, seconds
        self._next, self._names, self._said = start, dict[str, str](), set[str]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 10.0) -> None:
        """Look at what is left, and end."""
        self._stop.set()
        self._thread.join(timeout)

    def _work(self) -> None:
        try:
            from deepseek.monitor.detect import Watch  # brings torch, for which ``init`` need not wait

            watch = Watch()
            with ExitStack() as held:
                held.enter_context(claimed(self.path / ".watching"))
                with RunStore(self.path) as store:
                    reader = store.series
                    while not self._stop.wait(self.seconds):
                        self._look(watch, store, reader)
                    self._look(watch, store, reader, last=True)
        except InUse:
            return
        except Exception as error:  # a loop is never disturbed by who watches it
            _logger.warning(
                "detectors: %s: %s; this run is not watched any longer", type(error).__name__, error
            )

    def _look(self, watch: Watch, store: RunStore, reader: SeriesReader, last: bool = False) -> None:
        """Show the watch the new rows; the newest may still grow, unless it is the ``last`` look."""
        reader.refresh()
        rows = reader.rows(self._next, MOST)
        for row in rows if last else rows[:-1]:
            self._report(store, watch.update(row.step, self._known(row.values), row.time), row.time)
            self._next = row.step + 1

    def _known(self, row: Mapping[str, float]) -> dict[str, float]:
        """The row under the names that detectors know; a name that is taken stays."""
        found: dict[str, float] = {}
        for name, value in row.items():
            known = THEIRS.get(name.lower(), name)
            if known != name and (known in row or self._names.setdefault(known, name) != name):
                known = name
            found[known] = value
        return found

    def _report(self, store: RunStore, incidents: Sequence[Incident], time: float) -> None:
        for incident in incidents:
            found = self._told(incident.to_dict())
            store.put_incident(found, time)
            if found["id"] not in self._said and found.get("severity") != "info":
                self._said.add(found["id"])
                _logger.warning("step %s: %s (%s)", found["step"], found["title"], found["verdict"])

    def _told(self, value: Any) -> Any:
        """``value`` with series called as the loop calls them."""
        if isinstance(value, Mapping):
            return {
                k: self._names.get(v, v) if k in ("series", "name") and isinstance(v, str) else self._told(v)
                for k, v in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._told(v) for v in value]
        return value
