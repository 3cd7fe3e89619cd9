"""Page tables as arrays, and a step's rows as the host knows them.

Shape letters: N rows, S sequences, P pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deepseek.serve.scheduler import Scheduled, Work

Ints = npt.NDArray[np.int32]


class PageTables:
    """The page tables of the running sequences as two arrays, kept in step with ``SequencePages`` by difference.

    Attributes:
        stamps: one number for each row, new whenever the row changes, so that copies know what they lack.
    """

    def __init__(self, places: int, pages: int, page: int) -> None:
        self.globals: Ints = np.zeros((places, pages), np.int32)
        self.windows: Ints = np.zeros((places, pages), np.int32)
        self.stamps = np.zeros(places, np.int64)
        self.width, self._page = pages, page
        self._free = list(range(places - 1, -1, -1))
        self._place: dict[int, int] = {}
        self._known: dict[int, tuple[int, int, int]] = {}
        self._changes = 0

    def place(self, sequence: Scheduled) -> int:
        """The row of a sequence, brought up to date."""
        key, held = id(sequence), sequence.pages
        now, known = (len(held.globals), len(held.windows), held.dropped), self._known.get(key)
        if known == now:
            return self._place[key]
        if known is None:
            row, known = self._free.pop(), (0, 0, 0)
            self._place[key] = row
            self.globals[row] = self.windows[row] = 0
        row, (globals_, windows, dropped) = self._place[key], known
        self.globals[row, globals_ : len(held.globals)] = held.globals[globals_:]
        self.windows[row, windows : len(held.windows)] = held.windows[windows:]
        self.windows[row, dropped : held.dropped] = 0
        self._known[key] = now
        self._changes += 1
        self.stamps[row] = self._changes
        return row

    def host_rows(self, work: Sequence[Work]) -> HostRows:
        """What attention needs to know of the step; single rows come first in ``work``."""
        page, counts = self._page, [w.rows for w in work]
        place_S = np.array([self.place(w.sequence) for w in work])
        start_S = np.array([w.start for w in work])
        if max(counts) == 1:
            place_N, position_N, length_S = place_S, start_S, start_S + 1
        else:
            count_S = np.array(counts)
            length_S, place_N = start_S + count_S, place_S.repeat(counts)
            inside = np.arange(len(place_N)) - (count_S.cumsum() - count_S).repeat(counts)
            position_N = start_S.repeat(counts) + inside
        page_N, offset_N = np.divmod(position_N, page)
        slots = [
            table[place_N, page_N].astype(np.int64) * page + offset_N
            for table in (self.globals, self.windows)
        ]
        width = -(-int(length_S.max()) // page)
        return HostRows(
            position_N, length_S.astype(np.int32), place_S, self, width, slots[0], slots[1], counts
        )

    def leave(self, sequence: Scheduled) -> None:
        """The sequence has no pages any more."""
        row = self._place.pop(id(sequence), None)
        if row is not None:
            del self._known[id(sequence)]
            self._free.append(row)


class HostRows(NamedTuple):
    """``StepRows`` before it goes to the device; ``place_S``: the sequences' rows of ``tables``, ``width`` wide."""

    position_N: npt.NDArray[np.int64]
    length_S: Ints
    place_S: npt.NDArray[np.int64]
    tables: PageTables
    width: int
    global_slot_N: npt.NDArray[np.int64]
    window_slot_N: npt.NDArray[np.int64]
    rows: list[int]

    @property
    def decodes(self) -> int:
        """How many sequences at the front have a single row."""
        return next((i for i, count in enumerate(self.rows) if count != 1), len(self.rows))

    @property
    def ends_S(self) -> Ints:
        ends = np.zeros(len(self.rows) + 1, np.int32)
        np.cumsum(self.rows, out=ends[1:])
        return ends

    @property
    def global_SP(self) -> Ints:
        return self.tables.globals[self.place_S, : self.width]

    @property
    def window_SP(self) -> Ints:
        return self.tables.windows[self.place_S, : self.width]
