"""A column block: up to a few thousand rows of a run, sealed, series by series, with a pyramid over each.

A row is one training step, a column one series. A column keeps only the values that were logged, in the order of
their rows; a column with holes also keeps which rows they are from. Over its values lies a pyramid: every 16 of
them become one cell (lowest, highest, mean), every 16 cells one cell of the next level, until one is left. A spike of
a single step is therefore the highest of its cell at every level, and a long run is drawn from few cells.

NaN and the infinities that were logged are values like any other, and their places are listed; the pyramid is
over the finite values, so that one NaN hides nothing else in its cell. What was *not* logged is marked in a row by
``MISSING``, a NaN of its own; such marks never reach a column.

    block     header, directory, steps (unless they are an even sequence), times, columns; a multiple of 64 bytes
    column    values f32[n], rows u16[n] (if it has holes), levels (low, high, mean: f32 each), places of the bad u16[b]

Shapes: ``table_RC`` is R rows of C columns.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MISSING = np.uint32(0x7FC00D5E)  #: the bits of "not logged": a NaN that no arithmetic makes
FACTOR = 16  #: values of a cell, and cells of a cell above
MAX_ROWS = 1 << 16  #: a row number fits 16 bits
MAGIC = b"DSBLOCK1"
ALIGN = 64
HEADER = struct.Struct(
    "<8sIIIIQqqddI"
)  #: magic, index, rows, columns, reserved, size, step, stride, times, crc
ENTRY = np.dtype(
    [
        ("series", "<u4"), ("count", "<u4"), ("offset", "<u8"), ("first", "<i8"), ("last", "<i8"),
        ("bad", "<u4"), ("flags", "<u4"), ("crc", "<u4"), ("reserved", "<u4"),
    ]
)  # fmt: skip
HOLES, UNORDERED = 1, 2  #: flags of an entry


class Damaged(Exception):
    """The bytes are not a block."""


class Cells(NamedTuple):
    """Cells along axis 0: the lowest, highest and mean finite value, and how many there are; NaN where none."""

    low: Array
    high: Array
    mean: Array
    weight: Array


def cells_of(values: Array) -> Cells:
    """Each value as a cell of its own."""
    finite = np.where(np.isfinite(values), values, np.float32(np.nan))
    return Cells(finite, finite, finite, np.isfinite(values).astype(np.float32))


def coarsen(cells: Cells, factor: int = FACTOR) -> Cells:
    """``factor`` neighbours along axis 0 become one; the last cell may have fewer."""
    short = -len(cells.low) % factor
    if short:
        pad = [(0, short)] + [(0, 0)] * (cells.low.ndim - 1)
        nan = np.float32(np.nan)
        padded = [np.pad(x, pad, constant_values=nan) for x in cells[:3]]
        cells = Cells(padded[0], padded[1], padded[2], np.pad(cells.weight, pad))
    low, high, mean, weight = (x.reshape(-1, factor, *x.shape[1:]) for x in cells)
    total = weight.sum(1)
    with np.errstate(all="ignore"):
        parts = np.where(weight > 0, mean * weight, np.float32(0))
        mean = np.where(total > 0, parts.sum(1, dtype=np.float64) / total, np.nan).astype(np.float32)
        return Cells(np.fmin.reduce(low, 1), np.fmax.reduce(high, 1), mean, total)


def level_sizes(count: int) -> Iterator[int]:
    """How many cells the levels over ``count`` values have."""
    while count > 1:
        count = -(-count // FACTOR)
        yield count


def pyramid(values: Array) -> list[Cells]:
    """The levels over ``values``, along axis 0."""
    cells, levels = cells_of(values), []
    for _ in level_sizes(len(values)):
        cells = coarsen(cells)
        levels.append(cells)
    return levels


def encode(index: int, steps: Array, times: Array, table_RC: Array) -> bytes:
    """A block as bytes.

    Args:
        index: its number in its file. steps: int64 [R], times: float64 [R]; table_RC: float32, with ``MISSING``.
    """
    present = table_RC.view(np.uint32) != MISSING
    ids = np.flatnonzero(present.any(0))
    entries = np.zeros(len(ids), ENTRY)
    entries["series"] = ids
    columns: list[bytes] = [b""] * len(ids)
    for places in _alike(present[:, ids]):
        rows = np.flatnonzero(present[:, ids[places[0]]])
        own = steps[rows]
        ordered = bool(np.all(np.diff(own) > 0))
        flags = (HOLES if len(rows) < len(steps) else 0) | (0 if ordered else UNORDERED)
        table = table_RC[rows[:, None], ids[places]] if flags & HOLES else table_RC[:, ids[places]]
        bad = ~np.isfinite(table)
        for key, value in (("count", len(rows)), ("first", own.min()), ("last", own.max()), ("flags", flags)):
            entries[key][places] = value
        entries["bad"][places] = bad.sum(0)
        for place, data, wrong in zip(places.tolist(), _columns(table, rows, bool(flags & HOLES)), bad.T):
            columns[place] = data + _shorts(np.flatnonzero(wrong)) if wrong.any() else data
    return _assembled(index, steps, times, entries, columns)


def _alike(present_RC: Array) -> list[Array]:
    """The columns that have values in the same rows, together."""
    bits = np.ascontiguousarray(np.packbits(present_RC, axis=0).T)
    patterns = bits.view(np.dtype((np.void, bits.shape[1]))).reshape(-1)
    _, group = np.unique(patterns, return_inverse=True)
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(order) else []


def _columns(table_RC: Array, rows: Array, holes: bool) -> list[bytes]:
    """Values, rows if there are ``holes``, and levels of columns with the same rows."""
    levels = pyramid(table_RC)
    parts = [table_RC.view(np.uint32)]
    if holes:
        shorts = np.frombuffer(_shorts(rows), np.uint32)
        parts.append(np.broadcast_to(shorts[:, None], (len(shorts), table_RC.shape[1])))
    parts += [x.astype(np.float32, copy=False).view(np.uint32) for cells in levels for x in cells[:3]]
    wide = np.ascontiguousarray(np.concatenate(parts).T, dtype="<u4")
    return [row.tobytes() for row in wide]


def _assembled(index: int, steps: Array, times: Array, entries: Array, columns: list[bytes]) -> bytes:
    sizes = np.array([len(data) for data in columns], np.int64)
    stride = _stride(steps)
    body = (b"" if stride else steps.astype("<i8").tobytes()) + times.astype("<f8").tobytes()
    start = HEADER.size + entries.nbytes + len(body)
    entries["offset"] = start + np.cumsum(sizes) - sizes
    entries["crc"] = [zlib.crc32(data) for data in columns]
    size = -(-(start + int(sizes.sum())) // ALIGN) * ALIGN
    meta = entries.tobytes() + body
    shape, ends = (
        (len(steps), len(columns), 0, size),
        (int(steps[0]), stride, float(times.min()), float(times.max())),
    )
    blank = HEADER.pack(MAGIC, index, *shape, *ends, 0)
    head = HEADER.pack(MAGIC, index, *shape, *ends, zlib.crc32(meta, zlib.crc32(blank)))
    return b"".join([head, meta, *columns]).ljust(size, b"\0")


def _stride(steps: Array) -> int:
    """The distance of evenly rising steps, or 0."""
    if len(steps) < 2:
        return 1
    stride = int(steps[1]) - int(steps[0])
    even = stride > 0 and bool(np.all(np.diff(steps) == stride))
    return stride if even else 0


def _shorts(numbers: Array) -> bytes:
    data = numbers.astype("<u2").tobytes()
    return data + b"\0" * (-len(data) % 4)


Read = Callable[[int, int], bytes]  #: (size, offset) -> bytes


@dataclass
class Block:
    """An opened block: its directory is in memory, everything else is read when asked for."""

    read: Read
    offset: int
    index: int
    rows: int
    size: int
    first_step: int
    stride: int
    first_time: float
    last_time: float
    directory: Array

    def __post_init__(self) -> None:
        self._steps: Array | None = None

    @classmethod
    def open(cls, read: Read, offset: int, available: int) -> Block:
        """The block at ``offset`` of a file.

        Raises:
            Damaged: it is none, is torn, or its directory was changed.
        """
        head = read(HEADER.size, offset)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise Damaged("no header")
        magic, index, rows, columns, reserved, size, step, stride, began, ended, crc = HEADER.unpack(head)
        extra = columns * ENTRY.itemsize + rows * (8 if stride else 16)
        if size > available or HEADER.size + extra > size or not 0 < rows <= MAX_ROWS:
            raise Damaged("torn")
        meta = read(extra, offset + HEADER.size)
        blank = HEADER.pack(magic, index, rows, columns, reserved, size, step, stride, began, ended, 0)
        if zlib.crc32(meta, zlib.crc32(blank)) != crc:
            raise Damaged("its directory does not match its checksum")
        directory = np.frombuffer(meta, ENTRY, columns)
        return cls(read, offset, index, rows, size, step, stride, began, ended, directory)

    @property
    def steps(self) -> Array:
        """int64 [R]."""
        if self._steps is None:
            if self.stride:
                self._steps = self.first_step + self.stride * np.arange(self.rows, dtype=np.int64)
            else:
                at = self.offset + HEADER.size + self.directory.nbytes
                self._steps = np.frombuffer(self.read(8 * self.rows, at), "<i8")
        return self._steps

    @property
    def last_step(self) -> int:
        """The highest step."""
        if self.stride:
            return self.first_step + self.stride * (self.rows - 1)
        return int(self.steps.max())

    @property
    def times(self) -> Array:
        """Unix seconds, float64 [R]."""
        return np.frombuffer(self.read(8 * self.rows, self._times_at), "<f8")

    def time_at(self, row: int) -> float:
        """One of ``times``."""
        return float(np.frombuffer(self.read(8, self._times_at + 8 * row), "<f8")[0])

    @property
    def _times_at(self) -> int:
        return self.offset + HEADER.size + self.directory.nbytes + (0 if self.stride else 8 * self.rows)

    def find(self, series: int) -> Any | None:
        """The directory entry of a series, or ``None`` if nothing of it was logged here."""
        entries = self.directory
        if series < len(entries) and entries[series]["series"] == series:
            return entries[series]
        at = int(np.searchsorted(entries["series"], series))
        found = at < len(entries) and entries[at]["series"] == series
        return entries[at] if found else None

    def intact(self, entry: Any) -> bool:
        """Whether a column's bytes are those that were written."""
        offset = int(entry["offset"])
        later = self.directory["offset"][self.directory["offset"] > offset]
        end = int(later.min()) if len(later) else offset + column_size(entry)
        data = self.read(end - offset, self.offset + offset)
        return zlib.crc32(data) == int(entry["crc"])


def column_size(entry: Any) -> int:
    """Bytes of a column."""
    count, bad, holes = int(entry["count"]), int(entry["bad"]), bool(entry["flags"] & HOLES)
    shorts = (-(-count // 2) * 4 if holes else 0) + -(-bad // 2) * 4
    return 4 * count + 12 * sum(level_sizes(count)) + shorts
