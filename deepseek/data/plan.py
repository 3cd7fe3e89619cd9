"""Which piece of which document goes to which row: the plan that every rank computes alike, from lengths
alone.

Documents are drawn from the mixture a *window* at a time (some thousand rows, or one epoch of a small corpus),
cut, packed among themselves, and the rows are shuffled. A window depends on nothing but the mixture's cursor at its
start, so a place in the stream of rows is three small things: that cursor, the window's number, and a row within it.
No buffer has to be saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from deepseek.batch import IGNORE, Batch
from deepseek.data.mixture import Cursor, Mixture, Permutation
from deepseek.data.pack import cut, pack
from deepseek.data.store import TokenStore
from deepseek.errors import DataError

WINDOW_ROWS = (
    16_384  #: rows that are packed and shuffled together, at most: a large document must not fill one
)


class Piece(NamedTuple):
    """``length`` inputs of document ``document`` of store ``store``, from input position ``start`` on."""

    store: int
    document: int
    start: int
    length: int


Row = list[Piece]


@dataclass(frozen=True)
class Stream:
    """The documents of one source in one store; ``documents`` is ``None`` for all of them."""

    store: int
    name: str
    sizes: npt.NDArray[Any]
    documents: npt.NDArray[np.int64] | None


def streams(stores: Sequence[TokenStore]) -> list[Stream]:
    """One stream per source of each store that has documents."""
    found = []
    for i, store in enumerate(stores):
        for source, name in enumerate(store.sources):
            if len(store.sources) == 1:
                documents, sizes = None, store.records["length"]
            else:
                documents = np.flatnonzero(store.records["source"] == source)
                sizes = np.asarray(store.records["length"][documents])
            if len(sizes):
                found.append(Stream(i, name, sizes, documents))
    return found


@dataclass(frozen=True)
class Position:
    """A place in the stream of rows: the window's number, the cursor at its start, and the row within it."""

    window: int
    cursor: Cursor
    row: int
    batch: int


class Planner:
    """Plans rows of ``length`` positions over ``streams``; a pure function of its arguments and a
    ``Position``.
    """

    def __init__(
        self,
        streams: list[Stream],
        weights: list[float],
        seed: int,
        length: int,
        *,
        shuffle: bool,
        epochs: int | None,
    ) -> None:
        self._streams, self._seed, self._length = streams, seed, length
        self._shuffle, self._epochs = shuffle, epochs
        self._mixture = Mixture([s.sizes for s in streams], weights, seed, shuffle=shuffle)
        epoch = sum(int(s.sizes.sum()) - len(s.sizes) for s, w in zip(streams, weights) if w > 0)
        self._window_tokens = min(WINDOW_ROWS * length, max(epoch, length))
        self._held: tuple[tuple[int, Cursor], list[Row], Cursor] | None = None

    def start(self) -> Position:
        return Position(0, self._mixture.start(), 0, 0)

    def check(self, cursor: Cursor) -> None:
        """Raise ``DataError`` for a cursor outside the streams."""
        for stream, position in zip(self._streams, cursor.position):
            if position >= len(stream.sizes):
                raise DataError(
                    f"the cursor stands at document {position} of source '{stream.name}', which has "
                    f"{len(stream.sizes)}"
                )

    def batch(self, at: Position, rows: int) -> tuple[list[Row], Position]:
        """The next ``rows`` rows and the place after them; fewer rows only at the end of the last epoch."""
        found: list[Row] = []
        window, cursor, row = at.window, at.cursor, at.row
        while len(found) < rows and not self._over(cursor):
            planned, after = self.window(window, cursor)
            if row > len(planned):
                raise DataError(
                    f"the loader state is damaged: window {window} has {len(planned)} rows, not {row}"
                )
            taken = planned[row : row + rows - len(found)]
            found += taken
            row += len(taken)
            if row == len(planned):
                window, cursor, row = window + 1, after, 0
        return found, Position(window, cursor, row, at.batch + 1)

    def window(self, number: int, cursor: Cursor) -> tuple[list[Row], Cursor]:
        """The rows of a window and the cursor after it."""
        if self._held is None or self._held[0] != (number, cursor):
            sources, documents, after = self._mixture.take(cursor, self._window_tokens)
            rows = self._pack(sources, documents)
            if self._shuffle:
                order = Permutation(len(rows), f"{self._seed}/window/{number}".encode())(np.arange(len(rows)))
                rows = [rows[i] for i in order.tolist()]
            self._held = ((number, cursor.copy()), rows, after)
        return self._held[1], self._held[2]

    def _over(self, cursor: Cursor) -> bool:
        return self._epochs is not None and cursor.epoch[self._mixture.active[0]] >= self._epochs

    def _pack(self, sources: npt.NDArray[np.int64], documents: npt.NDArray[np.int64]) -> list[Row]:
        store, document, size = np.empty_like(sources), documents.copy(), np.empty_like(sources)
        for i, stream in enumerate(self._streams):
            here = sources == i
            store[here], size[here] = stream.store, stream.sizes[documents[here]]
            if stream.documents is not None:
                document[here] = stream.documents[documents[here]]
        return plan_rows(store, document, size, self._length)


def plan_rows(
    store: npt.NDArray[np.int64], document: npt.NDArray[np.int64], size: npt.NDArray[Any], length: int
) -> list[Row]:
    """Pack documents of ``size`` stored tokens (``size - 1`` inputs) into rows; pieces within a row keep
    their order.
    """
    pieces = cut(size - 1, length)
    columns = (store[pieces.document], document[pieces.document], pieces.start, pieces.length)
    flat = [Piece(*values) for values in zip(*(c.tolist() for c in columns))]
    return [[flat[i] for i in sorted(row)] for row in pack(pieces.length, length)]


def count(
    rows: list[Row], stores: Sequence[TokenStore], token_bytes: npt.NDArray[Any] | None
) -> tuple[int, int]:
    """Targets of ``rows`` and the bytes of text they stand for (0 without ``token_bytes``)."""
    targets = sum(piece.length for row in rows for piece in row)
    if token_bytes is None:
        return targets, 0
    return targets, sum(_piece_bytes(p, stores[p.store], token_bytes) for row in rows for p in row)


def _piece_bytes(piece: Piece, store: TokenStore, token_bytes: npt.NDArray[Any]) -> int:
    record = store.records[piece.document]
    if piece.length == int(record["length"]) - 1:
        return int(record["bytes"])
    ids = store.tokens(piece.document, piece.start + 1, piece.start + piece.length + 1)
    return int(token_bytes[ids].sum())


def materialize(
    rows: list[Row],
    length: int,
    stores: Sequence[TokenStore],
    n_targets: int,
    n_bytes: int,
    pin: bool = False,
) -> Batch:
    """``rows`` as a ``Batch`` of shape ``[len(rows), length]``; empty rows are all padding."""
    shape = (len(rows), length)
    tokens, targets = np.full(shape, stores[0].pad_id, np.int64), np.full(shape, IGNORE, np.int64)
    documents, positions = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    counter = np.arange(length, dtype=np.int32)
    most = max(length // 256, *(len(row) + 1 for row in rows), 1)  # a power of two: shapes seldom change
    starts = np.full((len(rows), 1 << (most - 1).bit_length()), length, np.int32)
    for r, row in enumerate(rows):
        at = 0
        for number, piece in enumerate(row):
            end = at + piece.length
            ids = stores[piece.store].tokens(piece.document, piece.start, piece.start + piece.length + 1)
            tokens[r, at:end], targets[r, at:end] = ids[:-1], ids[1:]
            documents[r, at:end], positions[r, at:end] = number, counter[: piece.length]
            starts[r, number], at = at, end
        positions[r, at:] = counter[: length - at]
        starts[r, len(row)] = at  # of the padding, if there is any
    arrays = [torch.from_numpy(a) for a in (tokens, targets, documents, positions, starts)]
    if pin:
        arrays = [a.pin_memory() for a in arrays]
    return Batch(arrays[0], arrays[1], arrays[2], arrays[3], n_targets, n_bytes, arrays[4])
