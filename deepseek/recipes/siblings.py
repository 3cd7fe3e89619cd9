"""Other runs that saw the same data in the same order: if the loss jumped there at the same step, it is the data.

What decides the order (corpus, mixture, seed, rows, length, batches left out) is written into each run's store; runs
that lie beside each other in one directory and agree in it are siblings.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from deepseek.data import Loader
from deepseek.errors import DeepseekError
from deepseek.monitor.commands import DATABASE
from deepseek.monitor.series import SeriesReader
from deepseek.monitor.store import RunStore

META = "data_order"
MOST_RUNS = 200  #: directories that are looked into, the newest ones
MOST_SIBLINGS = 8


class SiblingRun:
    """Another run's series, as they are now (``monitor.verdict.Sibling``)."""

    def __init__(self, path: Path) -> None:
        self.path, self._store = path, RunStore(path)

    @property
    def series(self) -> SeriesReader:
        reader = self._store.series
        reader.refresh()
        return reader


def data_order(loader: Loader) -> str:
    """A hash of everything that decides which documents a step sees."""
    state = loader.state_dict()
    kept = {k: state.get(k) for k in ("corpus", "mixture", "seed", "length", "skips", "quarantined")}
    text = json.dumps({**kept, "rows": loader.rows}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def find_siblings(run: Path, order: str) -> list[SiblingRun]:
    """Runs beside ``run`` whose data had this order, the newest first; runs that cannot be read are passed over."""
    others = [p.parent.parent for p in run.absolute().parent.glob(f"*/{DATABASE}")]
    others = [p for p in others if p != run.absolute()]
    others.sort(key=lambda p: (p / DATABASE).stat().st_mtime, reverse=True)
    found = [SiblingRun(p) for p in others[:MOST_RUNS] if _order_of(p) == order]
    return found[:MOST_SIBLINGS]


def _order_of(run: Path) -> str | None:
    try:
        with RunStore(run) as store:
            return str(store.meta(META))
    except (DeepseekError, OSError):
        return None
