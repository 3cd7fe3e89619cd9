"""A stretch of one series: its values in the order of their steps, and cells over them at any level.

``BlockPiece`` reads a column of a sealed block, ``ArrayPiece`` holds values in memory: those of a tail, or what was
put together from pieces that overlap. Positions count the values of the piece, not the rows they came from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from deepseek.monitor.block import (
    FACTOR,
    HOLES,
    UNORDERED,
    Array,
    Block,
    Cells,
    Damaged,
    cells_of,
    coarsen,
    level_sizes,
)


class Piece(ABC):
    """``count`` values with steps from ``first`` to ``last``; ``key`` tells it apart from others of its series."""

    count: int
    first: int
    last: int
    ordered: bool  #: steps rise strictly
    bad: int  #: values that are not finite (at least 0 of a cut piece)
    first_time: float
    last_time: float
    key: tuple[Any, ...]

    @abstractmethod
    def steps(self) -> Array:
        """int64 [n]."""

    @abstractmethod
    def times(self) -> Array:
        """Unix seconds, float64 [n]."""

    @abstractmethod
    def values(self, start: int, stop: int) -> Array:
        """float32 [stop - start]."""

    @abstractmethod
    def bad_places(self) -> Array:
        """Positions of NaN and infinities."""

    @abstractmethod
    def level(self, level: int) -> Cells:
        """The cells of 16**level values over the whole piece."""

    def steps_at(self, positions: Array) -> Array:
        return self.steps()[positions]

    def time_at(self, position: int) -> float:
        return float(self.times()[position])

    def find(self, step: int, after: bool = False) -> int:
        """The first position whose step is at least ``step``, or ``after`` it. Of ordered pieces only."""
        return int(np.searchsorted(self.steps(), step, "right" if after else "left"))

    def cells(self, start: int, stop: int, level: int) -> tuple[Array, Cells]:
        """Where cells begin, and the cells, over the positions from ``start`` to ``stop``.

        The cells of the pyramid that lie wholly inside are used, the values at both ends make cells of their own.
        """
        size = FACTOR**level
        begin, end = -(-start // size), self._whole(stop, size)
        if begin >= end:
            return np.array([start]), _one(self.values(start, stop))
        starts, parts = [np.arange(begin, end) * size], [_part(self.level(level), begin, end)]
        if start < begin * size:
            starts.insert(0, np.array([start]))
            parts.insert(0, _one(self.values(start, begin * size)))
        if end * size < stop:
            starts.append(np.array([end * size]))
            parts.append(_one(self.values(end * size, stop)))
        return np.concatenate(starts), Cells(*(np.concatenate(x) for x in zip(*parts)))

    def _whole(self, stop: int, size: int) -> int:
        """How many cells end at or before ``stop``; the last of the piece may be short."""
        return -(-stop // size) if stop == self.stored else stop // size

    @property
    def stored(self) -> int:
        """Values that the levels are over; ``count`` of a cut piece is less."""
        return self.count


def _part(cells: Cells, begin: int, end: int) -> Cells:
    return Cells(*(x[begin:end] for x in cells))


def _one(values: Array) -> Cells:
    return coarsen(cells_of(values), len(values))


class BlockPiece(Piece):
    """A column of a block; ``limit`` hides what comes after so many values."""

    def __init__(self, block: Block, entry: Any, key: tuple[Any, ...], limit: int | None = None) -> None:
        self.block, self.entry = block, entry
        _, self._stored, offset, self.first, self.last, self.bad, self._flags, _, _ = entry.item()
        self._at = block.offset + offset
        self.count = self._stored if limit is None else limit
        self.ordered = not self._flags & UNORDERED
        self.first_time, self.last_time = block.first_time, block.last_time
        self.key = (*key, self.count)
        self._rows_read: Array | None = None
        if limit is not None:
            self.last = int(self.steps_at(np.array([limit - 1]))[0])

    def rows(self) -> Array:
        """The rows of the block that the values are from."""
        rows = self._rows()
        return np.arange(self._stored) if rows is None else rows

    def check(self) -> bool:
        """Whether the rows that the values are from can be read; they are read now."""
        try:
            self._rows()
        except Damaged:
            return False
        return True

    @property
    def even(self) -> bool:
        """A value for every row, rows evenly spaced, and none hidden."""
        return not self._flags and self.block.stride > 0 and self.count == self._stored

    @property
    def stored(self) -> int:
        return self._stored

    def _rows(self) -> Array | None:
        """Which rows the values are from; ``None``: every one."""
        if self._flags & HOLES and self._rows_read is None:
            data = self.block.read(2 * self._stored, self._at + 4 * self._stored)
            rows = np.frombuffer(data, "<u2").astype(np.int64)
            if len(rows) < self._stored or rows[-1] >= self.block.rows or np.any(np.diff(rows) <= 0):
                raise Damaged("a column's rows are not rows of its block")
            self._rows_read = rows
        return self._rows_read

    def _levels_at(self) -> int:
        holes = -(-self._stored // 2) * 4 if self._flags & HOLES else 0
        return self._at + 4 * self._stored + holes

    def steps(self) -> Array:
        rows = self._rows()
        return (self.block.steps if rows is None else self.block.steps[rows])[: self.count]

    def steps_at(self, positions: Array) -> Array:
        rows = self._rows()
        rows = positions if rows is None else rows[positions]
        if self.block.stride:
            return self.block.first_step + self.block.stride * rows
        return self.block.steps[rows]

    def times(self) -> Array:
        rows = self._rows()
        return (self.block.times if rows is None else self.block.times[rows])[: self.count]

    def time_at(self, position: int) -> float:
        rows = self._rows()
        return self.block.time_at(position if rows is None else int(rows[position]))

    def values(self, start: int, stop: int) -> Array:
        return np.frombuffer(self.block.read(4 * (stop - start), self._at + 4 * start), "<f4")

    def bad_places(self) -> Array:
        if not self.bad:
            return np.zeros(0, np.int64)
        at = self._levels_at() + 12 * sum(level_sizes(self._stored))
        places = np.frombuffer(self.block.read(2 * self.bad, at), "<u2").astype(np.int64)
        return places[places < self.count]

    def level(self, level: int) -> Cells:
        sizes = list(level_sizes(self._stored))
        if not sizes:
            return cells_of(self.values(0, self._stored))
        level = min(level, len(sizes))
        cells = sizes[level - 1]
        at = self._levels_at() + 12 * sum(sizes[: level - 1])
        parts = np.frombuffer(self.block.read(12 * cells, at), "<f4").reshape(3, cells)
        weight = np.full(cells, FACTOR**level, np.float32)
        weight[-1] = self._stored - FACTOR**level * (cells - 1)
        return Cells(parts[0], parts[1], parts[2], np.where(np.isnan(parts[2]), np.float32(0), weight))


class ArrayPiece(Piece):
    """Values in memory: ``steps`` int64, ``times`` float64, ``values`` float32, all [n] with n > 0."""

    def __init__(self, steps: Array, times: Array, values: Array, key: tuple[Any, ...]) -> None:
        self._steps, self._times, self._values, self.key = steps, times, values, key
        self.count = len(steps)
        self.first, self.last = int(steps.min()), int(steps.max())
        self.ordered = bool(np.all(np.diff(steps) > 0))
        self.first_time, self.last_time = float(times.min()), float(times.max())
        self.bad = int(self.count - np.isfinite(values).sum())
        self._levels: list[Cells] = []

    def steps(self) -> Array:
        return self._steps

    def times(self) -> Array:
        return self._times

    def values(self, start: int, stop: int) -> Array:
        return self._values[start:stop]

    def bad_places(self) -> Array:
        return np.flatnonzero(~np.isfinite(self._values)) if self.bad else np.zeros(0, np.int64)

    def level(self, level: int) -> Cells:
        level = min(level, max(len(list(level_sizes(self.count))), 1))
        while len(self._levels) < level:
            self._levels.append(coarsen(self._levels[-1] if self._levels else cells_of(self._values)))
        return self._levels[level - 1]


def even_cells(pieces: list[BlockPiece], level: int) -> tuple[Array, Cells]:
    """The steps at which cells begin, and the cells, of whole ``even`` pieces with the same number of values."""
    count, size = pieces[0].stored, FACTOR**level
    sizes = list(level_sizes(count))
    cells, at = sizes[level - 1], 4 * count + 12 * sum(sizes[: level - 1])
    data = b"".join([p.block.read(12 * cells, p._at + at) for p in pieces])
    parts = np.frombuffer(data, "<f4").reshape(len(pieces), 3, cells)
    first = np.array([p.block.first_step for p in pieces])
    stride = np.array([p.block.stride for p in pieces])
    steps = first[:, None] + stride[:, None] * (size * np.arange(cells))
    weight = np.full(cells, size, np.float32)
    weight[-1] = count - size * (cells - 1)
    low, high, mean = (parts[:, k].reshape(-1) for k in range(3))
    weights = np.where(np.isnan(mean), np.float32(0), np.tile(weight, len(pieces)))
    return steps.reshape(-1), Cells(low, high, mean, weights)


def until(piece: Piece, step: int) -> Piece | None:
    """The part of a piece up to ``step``, or ``None`` when nothing is left."""
    if piece.last <= step:
        return piece
    if piece.first > step:
        return None
    if piece.ordered:
        count = piece.find(step, after=True)
        if isinstance(piece, BlockPiece):
            return BlockPiece(piece.block, piece.entry, piece.key[:-1], count)
        keep: Any = slice(0, count)
    else:
        keep = piece.steps() <= step
    return _kept(piece, keep, (*piece.key, "until", step))


def without(piece: Piece, step: int, time: float) -> Piece | None:
    """A piece without what was logged at or before ``time`` about later steps than ``step``."""
    keep = (piece.steps() <= step) | (piece.times() > time)
    if keep.all():
        return piece
    return _kept(piece, keep, (*piece.key, "without", step, time)) if keep.any() else None


def _kept(piece: Piece, keep: Any, key: tuple[Any, ...]) -> ArrayPiece:
    values = piece.values(0, piece.count)
    return ArrayPiece(piece.steps()[keep], piece.times()[keep], values[keep], key)


def merged(pieces: list[Piece], key: tuple[Any, ...]) -> ArrayPiece:
    """Pieces that overlap as one, in the order of steps; of a step logged twice the later row counts."""
    steps = np.concatenate([p.steps() for p in pieces])
    times = np.concatenate([p.times() for p in pieces])
    values = np.concatenate([p.values(0, p.count) for p in pieces])
    order = np.lexsort((times, steps))  # stable: of rows of one time, the one written later stays later
    steps = steps[order]
    newest = np.append(steps[1:] != steps[:-1], True)
    order = order[newest]
    return ArrayPiece(steps[newest], times[order], values[order], key)


def in_order(pieces: list[Piece], cache: dict[tuple[Any, ...], ArrayPiece]) -> list[Piece]:
    """Pieces that follow one another: those that overlap, or are out of order inside, are merged.

    ``cache`` keeps what was merged, by the keys of its parts; what is no longer needed is dropped from it.
    """
    found: list[Piece] = []
    used: dict[tuple[Any, ...], ArrayPiece] = {}
    for group in _overlapping(sorted(pieces, key=lambda p: p.first)):
        if len(group) == 1 and group[0].ordered:
            found.append(group[0])
            continue
        group.sort(key=lambda p: (p.first_time, p.key))
        key = tuple(p.key for p in group)
        used[key] = cache.get(key) or merged(group, ("merged", key))
        found.append(used[key])
    cache.clear()
    cache.update(used)
    return found


def _overlapping(pieces: list[Piece]) -> list[list[Piece]]:
    groups: list[list[Piece]] = []
    last = 0
    for piece in pieces:
        if groups and piece.first <= last:
            groups[-1].append(piece)
            last = max(last, piece.last)
        else:
            groups.append([piece])
            last = piece.last
    return groups
