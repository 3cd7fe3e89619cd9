"""The newest value of every series of a run, without looking at the values before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from deepseek.monitor.block import HOLES, MISSING, UNORDERED, Array, Block
from deepseek.monitor.piece import BlockPiece, Piece
from deepseek.monitor.segment import Segment
from deepseek.monitor.tail import TailView

NEAR = 64  #: rows at the end of a tail in which most series are found
FEW = 1000  #: columns that are read one by one; of more the whole block is read
NEVER = np.iinfo(np.int64).min


class Latest(NamedTuple):
    """The newest value of a series."""

    step: int
    time: float
    value: float


#: Steps after which what a chunk says, or a part of it, is void.
Rewinds = Callable[[Segment, Block | TailView], list[tuple[int, float]]]
Visible = Callable[[Segment, int, Piece], Piece | None]  #: what is left of a piece


def newest(segments: list[Segment], rewinds: Rewinds, visible: Visible) -> dict[str, Latest]:
    """By name, in the order in which the series appeared; of two values of one step the later."""
    found: dict[str, Latest] = {}
    for segment in segments:
        for name, latest in _of_segment(segment, rewinds, visible):
            if name not in found or latest[:2] >= found[name][:2]:
                found[name] = latest
    names = dict.fromkeys(name for segment in segments for name in segment.names)
    return {name: found[name] for name in names if name in found}


def _of_segment(segment: Segment, rewinds: Rewinds, visible: Visible) -> Iterator[tuple[str, Latest]]:
    names = {series: name for name, series in segment.names.items()}
    yield from _of_blocks(segment, rewinds, visible, names)
    for index, tail in segment.tails.items():
        limit = min((step for step, _ in rewinds(segment, tail)), default=None)
        steps = tail.steps
        if len(steps) == 0:
            continue
        if (limit is not None and int(steps.max()) > limit) or bool(np.any(np.diff(steps) <= 0)):
            yield from _piecewise(segment, index, names, visible)
        else:
            yield from _of_tail(tail, names)


def _of_blocks(
    segment: Segment, rewinds: Rewinds, visible: Visible, names: dict[int, str]
) -> list[tuple[str, Latest]]:
    """Of the sealed blocks; kept until there are more, or the run goes back."""
    limits = [min((step for step, _ in rewinds(segment, block)), default=None) for block in segment.blocks]
    state = (len(names), *limits)
    if segment.newest is not None and segment.newest[0] == state:
        return segment.newest[1]
    size = max(names, default=-1) + 1
    last, where = np.full(size, NEVER), np.full(size, -1)
    found: list[tuple[str, Latest]] = []
    for i, (block, limit) in enumerate(zip(segment.blocks, limits)):
        entries = block.directory[block.directory["series"] < size]
        if limit is not None and len(entries) and int(entries["last"].max()) > limit:
            found += _piecewise(segment, block.index, names, visible)
            continue
        series = entries["series"]
        later = entries["last"] >= last[series]
        last[series[later]], where[series[later]] = entries["last"][later], i
    for i, block in enumerate(segment.blocks):
        wanted = block.directory[np.isin(block.directory["series"], np.flatnonzero(where == i))]
        found += [(names[n], latest) for n, latest in _of_block(block, wanted) if n in names]
    segment.newest = state, found
    return found


def _of_block(block: Block, entries: Array) -> Iterator[tuple[int, Latest]]:
    """The last values of some columns of a block."""
    pieces = entries if len(entries) <= FEW else entries[(entries["flags"] & UNORDERED) > 0]
    for entry in pieces:
        piece = BlockPiece(block, entry, ())
        if piece.check():
            yield int(entry["series"]), _end(piece)
    if len(entries) <= FEW:
        return
    entries = entries[(entries["flags"] & UNORDERED) == 0]
    data, count = block.read(block.size, block.offset), entries["count"].astype(np.int64)
    ends = entries["offset"].astype(np.int64) + 4 * count
    values = np.frombuffer(data, "<f4")[ends // 4 - 1]
    holes = (entries["flags"] & HOLES) > 0
    rows = np.where(
        holes, np.frombuffer(data, "<u2")[np.where(holes, ends // 2 + count - 1, 0)], block.rows - 1
    )
    times = block.times[np.minimum(rows, block.rows - 1)]
    parts = (entries["series"], entries["last"], times, values)
    for series, step, time, value in zip(*(part.tolist() for part in parts)):
        yield series, Latest(step, time, value)


def _piecewise(
    segment: Segment, index: int, names: dict[int, str], visible: Visible
) -> Iterator[tuple[str, Latest]]:
    """The slow way, for a chunk of which parts are void."""
    for name in names.values():
        for chunk, piece in segment.pieces(name):
            left = visible(segment, index, piece) if chunk == index else None
            if left is not None:
                yield name, _end(left)


def _end(piece: Piece) -> Latest:
    at = piece.count - 1
    if not piece.ordered:
        at = int(np.flatnonzero(piece.steps() == piece.last)[-1])
    return Latest(piece.last, piece.time_at(at), float(piece.values(at, at + 1)[0]))


def _of_tail(tail: TailView, names: dict[int, str]) -> Iterator[tuple[str, Latest]]:
    """A tail whose steps rise: the last row in which each column has a value."""
    table, seen = tail.table_RC, np.full(tail.columns, -1)
    for start in (max(tail.rows - NEAR, 0), 0):
        columns = np.flatnonzero(seen < 0)
        present: Array = table[start:, columns].view(np.uint32) != MISSING
        rows = tail.rows - 1 - np.argmax(present[::-1], 0)
        seen[columns] = np.where(present.any(0), rows, -1)
    found = np.flatnonzero(seen >= 0)
    rows = seen[found]
    parts = (found, tail.steps[rows], tail.times[rows], table[rows, found])
    for series, step, time, value in zip(*(part.tolist() for part in parts)):
        if series in names:
            yield names[series], Latest(step, time, value)
