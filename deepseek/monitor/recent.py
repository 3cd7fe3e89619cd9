"""The newest rows of a run, whole, for who follows it: read from the last blocks and tails only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from deepseek.monitor.block import MISSING, Array, Block
from deepseek.monitor.piece import BlockPiece
from deepseek.monitor.segment import Segment
from deepseek.monitor.tail import TailView


class Row(NamedTuple):
    """What was logged of one step: the time is that of the first value."""

    step: int
    time: float
    values: dict[str, float]


Chunk = tuple[Segment, Block | TailView, Array]  #: with which of its rows are not void


def recent(chunks: Iterable[Chunk], start: int, limit: int) -> list[Row]:
    """The last ``limit`` rows of the steps from ``start`` on, in order; the later value of a step counts."""
    wanted: list[Chunk] = []
    for segment, chunk, kept in chunks:
        rows = kept & (chunk.steps >= start)
        if rows.any():
            wanted.append((segment, chunk, rows))
    if not wanted or limit < 1:
        return []
    steps = np.unique(np.concatenate([chunk.steps[rows] for _, chunk, rows in wanted]))
    first = int(steps[-limit:][0])
    found: dict[int, Row] = {}
    for segment, chunk, rows in sorted(wanted, key=lambda part: part[1].first_time):
        for step, time, values in _rows(segment, chunk, rows & (chunk.steps >= first)):
            row = found.setdefault(step, Row(step, time, {}))
            row.values.update(values)
    return [found[step] for step in sorted(found) if found[step].values]


def _rows(
    segment: Segment, chunk: Block | TailView, rows: Array
) -> Iterator[tuple[int, float, dict[str, float]]]:
    names = {series: name for name, series in segment.names.items()}
    places = np.flatnonzero(rows)
    steps, times = chunk.steps[places].tolist(), chunk.times[places].tolist()
    table = chunk.table_RC[places] if isinstance(chunk, TailView) else _table(chunk, places, len(names))
    present = table.view(np.uint32) != MISSING
    for i, (step, time) in enumerate(zip(steps, times)):
        columns = np.flatnonzero(present[i])
        values = zip(columns.tolist(), table[i, columns].tolist())
        yield step, time, {names[c]: v for c, v in values if c in names}


def _table(block: Block, places: Array, columns: int) -> Array:
    """Some rows of a block as a table, [R, C]."""
    table = np.full((len(places), columns), MISSING, np.uint32).view(np.float32)
    for entry in block.directory:
        piece = BlockPiece(block, entry, ())
        series = int(entry["series"])
        if series >= columns or not piece.check():
            continue
        column = np.full(block.rows, MISSING, np.uint32).view(np.float32)
        column[piece.rows()] = piece.values(0, piece.count)
        table[:, series] = column[places]
    return table
