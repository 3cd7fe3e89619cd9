"""``Loader``: batches of packed documents, prefetched by a thread, whose place is a small piece of JSON.

All ranks follow one global plan of rows; rank r of w builds only rows r, r + w, r + 2w, ... of each global batch. The
state is therefore the same on every rank and knows nothing of the number of ranks: save it on 8, go on with 3, and the
sequence of global rows is the one that an undisturbed run would have seen.

Reading and packing run in a background thread; ``state_dict()`` speaks of the batch *delivered* last, not of those
waiting in the queue. What is left out, documents or whole batches, changes nothing of the plan (``data.quarantine``).
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek.batch import Batch
from deepseek.data.delivery import Delivery, Maker, Worker, build
from deepseek.data.mixture import Cursor
from deepseek.data.plan import Planner, Position, Row, plan_rows, streams
from deepseek.data.quarantine import (
    Quarantined,
    Skips,
    delivered_index,
    find_documents,
    merged,
)
from deepseek.data.store import TokenStore
from deepseek.errors import ConfigError, DataError, did_you_mean

STATE_VERSION = 1
REMEMBERED = 4096  #: batches whose places a loader remembers for ``provenance``


@dataclass(frozen=True)
class Sample:
    """A piece of a document in a batch: positions ``[column, column + length)`` of global row ``row``.

    They are the inputs ``[start, start + length)`` of the document at ``path``, ``offset`` of ``source``.
    """

    row: int
    column: int
    length: int
    source: str
    path: str
    offset: int
    start: int
    store: int = field(default=0, compare=False)  # where its tokens are: document ``document`` of that store
    document: int = field(default=-1, compare=False)


class Loader:
    """An iterator of ``Batch`` over token stores.

    Args:
        stores: one store or several; a source is known by its name, in whichever store it lies.
        rows: rows of the *global* batch; ``world`` must divide it.
        length: positions T in a row.
        seed: of the order of documents and rows.
        rank, world: which share of each global batch to build.
        weights: share of tokens per source name, relative; sources not named have weight 1.
        token_bytes: ``[vocab]`` bytes that each token stands for; without it ``Batch.n_bytes`` is 0.
        prefetch: batches built ahead by a thread; 0 builds them when asked.
        epochs: stop after so many passes (one source only); the last batch is filled up with padding rows.
        shuffle: order documents and rows anew in each epoch; else stored order.
        pin: put batches into page-locked memory, for asynchronous copies to a GPU.

    A batch's ``n_targets`` and ``n_bytes`` count the whole global batch, so losses are normalised alike on
    every rank.

    Raises:
        ConfigError: ``world`` does not divide ``rows``, an unknown source in ``weights``, and the like.
        DataError: the stores are empty or were written with different tokenizers.
    """

    def __init__(
        self,
        stores: TokenStore | Sequence[TokenStore],
        *,
        rows: int,
        length: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        weights: Mapping[str, float] | None = None,
        token_bytes: npt.NDArray[Any] | None = None,
        prefetch: int = 4,
        epochs: int | None = None,
        shuffle: bool = True,
        pin: bool = False,
    ) -> None:
        held = [stores] if isinstance(stores, TokenStore) else list(stores)
        _check_stores(held)
        _check_shape(rows, length, rank, world)
        self.rows, self.length, self.rank, self.world = rows, length, rank, world
        found = streams(held)
        names = [s.name for s in found]
        for name in weights or {}:
            if name not in {n for s in held for n in s.sources}:
                raise ConfigError(
                    f"no source is called '{name}'{did_you_mean(name, names)}; there are: {', '.join(names)}"
                )
        shares = [float((weights or {}).get(n, 1.0)) for n in names]
        if epochs is not None and (epochs < 1 or sum(w > 0 for w in shares) != 1):
            raise ConfigError(
                f"epochs={epochs} needs to be at least 1, and exactly one source: {', '.join(names)}"
            )
        self._stores = held
        self._planner_of = lambda: Planner(found, shares, seed, length, shuffle=shuffle, epochs=epochs)
        self._maker = Maker(self._planner_of(), held, rows, length, rank, world, token_bytes, pin)
        order = json.dumps([dict(zip(names, shares)), shuffle], sort_keys=True)
        mixture = hashlib.blake2b(order.encode(), digest_size=8).hexdigest()
        corpus = corpus_identity([s.fingerprint for s in held])
        self._identity = {"corpus": corpus, "mixture": mixture, "seed": seed, "length": length}
        self._at = self._first = self._maker.planner.start()
        self._prefetch = prefetch
        self._worker: Worker | None = None
        self._past: deque[tuple[Position, int]] = deque(maxlen=REMEMBERED)
        self._quarantined: dict[tuple[str, str, int | None], Quarantined] = {}
        self._looking: Planner | None = None
        self.last: Delivery | None = None  #: what ``next`` returned last

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._prefetch:
            self._worker = self._worker or Worker(self._maker, self._at, self._prefetch)
            try:
                made = self._worker.get()
            except BaseException:
                self.close()
                raise
        else:
            made = self._maker.make(self._at)
        if made is None:
            raise StopIteration
        self.last, at, self._at = made
        self._past.append((at, self.rows))
        return self.last.batch

    @property
    def batch(self) -> int:
        """Batches delivered or skipped so far."""
        return self._at.batch

    @property
    def stores(self) -> list[TokenStore]:
        return list(self._stores)

    @property
    def skips(self) -> Skips:
        """Batches that are not delivered."""
        return self._maker.skips

    @property
    def quarantined(self) -> list[Quarantined]:
        """Documents that are not trained on."""
        return list(self._quarantined.values())

    def start(self) -> dict[str, Any]:
        """The state before the first batch of all."""
        return self._state(self._planner().start())

    def skip(self, ranges: Iterable[Sequence[int]]) -> None:
        """Leave out the batches numbered ``[first, last]`` of each range, besides those left out already.

        They are planned like any other and not delivered; what comes after them is what would have come after
        them. Raises ``DataError`` for what is no range.
        """
        skips = merged([*self.skips, *ranges])
        self.close()
        self._maker = replace(self._maker, skips=skips)

    def exclude(self, documents: Iterable[Quarantined], *, missing_ok: bool = False) -> int:
        """Leave ``documents`` out of every batch from here on; returns how many documents of the stores that adds.

        Raises:
            DataError: one of them is in none of the stores, unless ``missing_ok``.
        """
        wanted = list(documents)
        found = find_documents(self._stores, wanted, missing_ok=missing_ok)
        new = found - self._maker.excluded
        self._quarantined.update((q.key, q) for q in wanted)
        if new:
            self.close()
            self._maker = replace(self._maker, excluded=self._maker.excluded | new)
        return len(new)

    def peek(self, batch: int | Mapping[str, Any], ahead: int = 0) -> Delivery:
        """A batch as it would be built now, without moving; arguments as for ``provenance``.

        Raises:
            DataError: it was delivered before this loader's state was loaded, or the data end before it.
        """
        at, rows = self._locate(batch, ahead)
        made = replace(self._maker, planner=self._planner(), rows=rows, skips=()).make(at)
        if made is None:
            raise DataError(f"the data end before batch {at.batch}")
        return made[0]

    @property
    def epoch(self) -> int:
        """Passes completed over the slowest source, as far as rows have been planned for the current
        batch.
        """
        return min(self._at.cursor.epoch)

    def state_dict(self) -> dict[str, Any]:
        """The place after the last delivered batch: small, JSON, the same on every rank and for every world
        size.
        """
        return self._state(self._at)

    def _state(self, at: Position) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            **self._identity,
            "window": at.window,
            "row": at.row,
            "batch": at.batch,
            "epoch": list(at.cursor.epoch),
            "position": list(at.cursor.position),
            "drawn": list(at.cursor.drawn),
            **({"skips": [list(r) for r in self.skips]} if self.skips else {}),
            **({"quarantined": [list(key) for key in self._quarantined]} if self._quarantined else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a place saved by ``state_dict``. ``rows`` and ``world`` may differ from then.

        Skips become those of the state; its quarantined documents join those of this loader.

        Raises:
            DataError: it is no such state, or one of another corpus, mixture, seed or length.
        """
        at, skips = self._read_state(state), merged(state.get("skips", ()))
        named = [Quarantined(*key) for key in state.get("quarantined", ())]
        self.close()
        self._at = self._first = at
        self._past.clear()
        self._maker, self.last = replace(self._maker, skips=skips), None
        self.exclude(named, missing_ok=True)

    def provenance(self, batch: int | Mapping[str, Any], ahead: int = 0) -> list[Sample]:
        """Where every piece of a global batch came from.

        Args:
            batch: number of the batch (0 is the first; ``loader.batch`` before it was delivered), or the
                ``state_dict()`` taken before it was delivered.
            ahead: with a state, so many deliveries further on; what is skipped is not counted.

        Raises:
            DataError: the batch was delivered before this loader's state was loaded.
        """
        return self.samples(self.peek_rows(batch, ahead))

    def peek_rows(self, batch: int | Mapping[str, Any], ahead: int = 0) -> list[Row]:
        """The rows of a global batch, without quarantined documents; arguments as for ``provenance``."""
        at, rows = self._locate(batch, ahead)
        planned, _ = self._planner().batch(at, rows)
        return self._maker.kept(planned)

    def _locate(self, batch: int | Mapping[str, Any], ahead: int) -> tuple[Position, int]:
        """Where a batch begins, and its number of rows."""
        if isinstance(batch, Mapping):
            at, skips = self._read_state(batch), merged([*batch.get("skips", ()), *self.skips])
            return self._forward(at, delivered_index(skips, at.batch, ahead)), self.rows
        for at, rows in self._past:
            if at.batch == batch:
                return at, rows
        if batch < self._first.batch:
            raise DataError(
                f"batch {batch} was delivered before this loader began (at batch {self._first.batch}); "
                "ask with the state saved before it"
            )
        known = [at for at, _ in self._past if at.batch < batch]
        return self._forward(known[-1] if known else self._first, batch), self.rows

    def _forward(self, at: Position, batch: int) -> Position:
        while at.batch < batch:
            _, at = self._planner().batch(at, self.rows)
        return at

    def _planner(self) -> Planner:
        """For looking around: the maker's belongs to the thread."""
        self._looking = self._looking or self._planner_of()
        return self._looking

    def close(self) -> None:
        """Stop the background thread; iteration may go on later and repeats and skips nothing."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def samples(self, rows: list[Row]) -> list[Sample]:
        """Where every piece of ``rows`` came from."""
        found = []
        for r, row in enumerate(rows):
            column = 0
            for piece in row:
                source, path, offset = self._stores[piece.store].provenance(piece.document)
                place = (r, column, piece.length, source, path, offset, piece.start)
                found.append(Sample(*place, piece.store, piece.document))
                column += piece.length
        return found

    def _read_state(self, state: Mapping[str, Any]) -> Position:
        if state.get("version") != STATE_VERSION:
            raise DataError(f"not a loader state of version {STATE_VERSION}: {str(dict(state))[:200]}")
        for name, mine in self._identity.items():
            if state.get(name) != mine:
                raise DataError(
                    f"the loader state belongs to another {name}: it was saved with "
                    f"{name}={state.get(name)}, this "
                    f"loader has {name}={mine}; use the same data configuration, or start the data afresh"
                )
        n = len(self._at.cursor.epoch)
        lists = [state.get(name) for name in ("epoch", "position", "drawn")]
        numbers = [state.get(name) for name in ("window", "row", "batch")]
        if not all(isinstance(v, list) and len(v) == n and all(map(_natural, v)) for v in lists):
            raise DataError(
                f"the loader state is damaged: epoch, position and drawn are {lists}, not {n} counts each"
            )
        if not all(map(_natural, numbers)):
            raise DataError(f"the loader state is damaged: window, row and batch are {numbers}")
        epoch, position, drawn = (list(v) for v in lists if isinstance(v, list))
        window, row, batch = (int(v) for v in numbers if v is not None)
        self._maker.planner.check(Cursor(epoch, position, drawn))
        return Position(window, Cursor(epoch, position, drawn), row, batch)


def corpus_identity(fingerprints: Sequence[str]) -> str:
    """What a loader's state calls its corpus: a hash of its stores' fingerprints."""
    return hashlib.blake2b(json.dumps(list(fingerprints)).encode(), digest_size=16).hexdigest()


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def eval_batches(
    store: TokenStore,
    *,
    rows: int,
    length: int,
    token_bytes: npt.NDArray[Any] | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Batches over a whole store: every target exactly once, always the same, documents in stored order.

    Documents are packed some at a time, so a batch holds neighbours; the last batch is filled up with padding
    rows. Shapes, counts and ranks are those of ``Loader``.
    """
    _check_shape(rows, length, rank, world)
    waiting: list[Row] = []
    first = 0
    sizes = store.records["length"]
    while first < len(store) or waiting:
        while len(waiting) < rows and first < len(store):
            after = _window_end(sizes, first, 4 * rows * length)
            documents = np.arange(first, after)
            waiting += sorted(plan_rows(np.zeros_like(documents), documents, sizes[first:after], length))
            first = after
        batch = waiting[:rows] + [[] for _ in range(rows - len(waiting))]
        waiting = waiting[rows:]
        yield build(batch, length, [store], token_bytes, rank, world)


def _window_end(sizes: npt.NDArray[Any], first: int, tokens: int) -> int:
    total, after = 0, first
    while after < len(sizes) and total < tokens:
        total, after = total + int(sizes[after]), after + 1
    return after


def _check_shape(rows: int, length: int, rank: int, world: int) -> None:
    if rows < 1 or length < 1:
        raise ConfigError(f"a batch of {rows} rows of {length} positions holds nothing")
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} is not one of the {world} ranks 0..{world - 1}")
    if rows % world:
        below, above = rows - rows % world, rows + world - rows % world
        near = f"{below} or {above}" if below else str(above)
        raise ConfigError(f"{world} ranks do not divide {rows} rows; try {near} rows")


def _check_stores(stores: list[TokenStore]) -> None:
    if not stores or not any(len(s) for s in stores):
        raise DataError("the loader has no documents: prepare a corpus that has some")
    for store in stores[1:]:
        if store.tokenizer_fingerprint != stores[0].tokenizer_fingerprint:
            raise DataError(
                f"{stores[0].directory} and {store.directory} were written with different tokenizers"
            )


__all__ = ["Delivery", "Loader", "Sample", "corpus_identity", "eval_batches"]
