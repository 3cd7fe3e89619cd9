"""A stretch of a series as points for a picture, from which no value is missing.

A point stands for some neighbouring steps and has the lowest, the highest and the mean value of them. Points are put
together from the cells of the finest level of the pyramids that has enough of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from deepseek.monitor.block import FACTOR, Array, Cells, cells_of, coarsen, level_sizes
from deepseek.monitor.piece import BlockPiece, Piece, even_cells

Part = tuple[Piece, int, int]  #: the values of a piece from one position to another
MOST_BAD = 1000  #: places of NaN and infinities that a window lists


@dataclass(frozen=True)
class Window:
    """A stretch of a series as points.

    Attributes:
        step: the first step each point stands for, int64 [n], rising.
        low, high, mean: of the finite values of a point, float32 [n]; NaN where there are none. In a ``raw``
            window they are all the value itself, NaN and infinities included.
        raw: every point is one step.
        bad_steps, bad_values: where NaN or an infinity was logged (the first 1000 places), int64 and float32.
        bad: how many such places there are.
    """

    step: Array
    low: Array
    high: Array
    mean: Array
    raw: bool
    bad_steps: Array
    bad_values: Array
    bad: int

    def __len__(self) -> int:
        return len(self.step)


def joined(parts: list[Array], kind: Any) -> Array:
    """Arrays, of which there may be none, as one."""
    return np.concatenate(parts).astype(kind, copy=False) if parts else np.zeros(0, kind)


def raw(parts: list[Part]) -> tuple[Array, Array]:
    """Steps and values as they were logged."""
    steps = [p.steps()[a:b] for p, a, b in parts]
    return joined(steps, np.int64), joined([p.values(a, b) for p, a, b in parts], np.float32)


def raw_window(parts: list[Part]) -> Window:
    """Every step as a point."""
    steps, values = raw(parts)
    places = np.flatnonzero(~np.isfinite(values))
    shown = places[:MOST_BAD]
    return Window(steps, values, values, values, True, steps[shown], values[shown], len(places))


def cell_window(parts: list[Part], total: int, points: int) -> Window:
    """Cells of the finest level that is coarse enough, put together to at most ``points``."""
    level = 0
    while total >= points * FACTOR ** (level + 1):
        level += 1
    steps, cells = [], []
    for alike in _alike(parts, level):
        piece, a, b = alike[0]
        if isinstance(piece, BlockPiece) and _whole(alike[0], level):
            begins, found = even_cells([p for p, _, _ in alike if isinstance(p, BlockPiece)], level)
        else:
            starts, found = (
                piece.cells(a, b, level) if level else (np.arange(a, b), cells_of(piece.values(a, b)))
            )
            begins = piece.steps_at(starts)
        steps.append(begins)
        cells.append(found)
    step = np.concatenate(steps)
    whole = Cells(*(np.concatenate(x) for x in zip(*cells)))
    group = -(-len(step) // points)
    whole = coarsen(whole, group) if group > 1 else whole
    step = step[::group].astype(np.int64, copy=False)
    return Window(step, *whole[:3], False, *_bad(parts))


def _whole(part: Part, level: int) -> bool:
    """Whether a part is a whole, even block, with cells at this level."""
    piece, a, b = part
    return isinstance(piece, BlockPiece) and piece.even and a == 0 and b == piece.count > 1 and (
        0 < level <= len(list(level_sizes(piece.count)))
    )  # fmt: skip


def _alike(parts: list[Part], level: int) -> list[list[Part]]:
    """Parts that can be read together: neighbours that are whole blocks of one size; others alone."""
    groups: list[list[Part]] = []
    size = -1  #: of the blocks of the newest group
    for part in parts:
        here = part[2] if _whole(part, level) else -1
        if here > 0 and here == size:
            groups[-1].append(part)
        else:
            groups.append([part])
        size = here
    return groups


def _bad(parts: list[Part]) -> tuple[Array, Array, int]:
    """Steps and values of the first places that are not finite, and the number of all."""
    steps, values, total = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)], 0
    for piece, a, b in (part for part in parts if part[0].bad):
        places = piece.bad_places()
        places = places[(places >= a) & (places < b)]
        shown = places[: max(MOST_BAD - total, 0)]
        total += len(places)
        if len(shown):
            steps.append(piece.steps_at(shown))
            found = piece.values(int(shown[0]), int(shown[-1]) + 1)
            values.append(found[shown - shown[0]])
    return np.concatenate(steps), np.concatenate(values), total
