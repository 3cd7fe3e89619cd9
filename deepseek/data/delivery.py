"""``Delivery``: a batch and the rows it was built from. ``Maker`` builds one, ``Worker`` builds ahead, in a thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt

from deepseek.batch import Batch
from deepseek.data.plan import Planner, Position, Row, count, materialize
from deepseek.data.quarantine import Skips, is_skipped
from deepseek.data.store import TokenStore
from deepseek.errors import DataError


class Delivery(NamedTuple):
    """A batch as it was delivered: its number, this rank's part, and the rows of all ranks it was built from.

    ``window``: the number of the rows that were packed and shuffled together, from which it begins to be taken.
    """

    number: int
    batch: Batch
    rows: list[Row]
    window: int = 0


@dataclass(frozen=True)
class Maker:
    """Builds this rank's part of the batch at a position. Holds no reference to the loader."""

    planner: Planner
    stores: list[TokenStore]
    rows: int
    length: int
    rank: int
    world: int
    token_bytes: npt.NDArray[Any] | None
    pin: bool
    skips: Skips = ()
    excluded: frozenset[tuple[int, int]] = frozenset()

    def make(self, at: Position) -> tuple[Delivery, Position, Position] | None:
        """The batch at ``at``, or the first after it that is not skipped; where it began, and where it ends."""
        rows, after = self.planner.batch(at, self.rows)
        while rows and is_skipped(self.skips, at.batch):
            at = after
            rows, after = self.planner.batch(at, self.rows)
        if not rows:
            return None
        rows = self.kept(rows + [[] for _ in range(self.rows - len(rows))])
        batch = build(rows, self.length, self.stores, self.token_bytes, self.rank, self.world, self.pin)
        return Delivery(at.batch, batch, rows, at.window), at, after

    def kept(self, rows: list[Row]) -> list[Row]:
        """``rows`` without quarantined documents."""
        if not self.excluded:
            return rows
        return [[p for p in row if (p.store, p.document) not in self.excluded] for row in rows]


def build(
    rows: list[Row],
    length: int,
    stores: Sequence[TokenStore],
    token_bytes: npt.NDArray[Any] | None,
    rank: int,
    world: int,
    pin: bool = False,
) -> Batch:
    """Rank ``rank``'s rows of a global batch, with the counts of the whole."""
    n_targets, n_bytes = count(rows, stores, token_bytes)
    return materialize(rows[rank::world], length, stores, n_targets, n_bytes, pin)


class Worker:
    """A thread that builds batches ahead into a bounded queue."""

    def __init__(self, maker: Maker, at: Position, ahead: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(ahead)
        self._stop = threading.Event()
        arguments = (maker, at, self._queue, self._stop)
        self._thread = threading.Thread(target=_produce, args=arguments, name="deepseek-loader", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _shut_down, self._queue, self._stop, self._thread)

    def get(self) -> tuple[Delivery, Position, Position] | None:
        while True:
            try:
                found = self._queue.get(timeout=1.0)
                break
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    raise DataError("the loader's background thread has died") from None
        if isinstance(found, BaseException):
            raise found
        made: tuple[Delivery, Position, Position] | None = found
        return made

    def close(self) -> None:
        self._finalizer()


def _produce(maker: Maker, at: Position, out: queue.Queue[Any], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            made: Any = maker.make(at)
        except BaseException as error:  # handed to the consumer, whatever it is
            made = error
        while not stop.is_set():
            try:
                out.put(made, timeout=0.1)
                break
            except queue.Full:
                continue
        if made is None or isinstance(made, BaseException):
            return
        at = made[2]


def _shut_down(waiting: queue.Queue[Any], stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    while not waiting.empty():
        waiting.get_nowait()
    thread.join(timeout=10)
