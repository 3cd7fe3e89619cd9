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
Longs = npt.NDArray[np.int64]


class PageTables:
    """The page tables of the running sequences as two arrays, kept in step with ``SequencePages`` by difference.

    Attributes:
        both: of the global and of the window group, ``[2, places, pages]``; page 0 where there is none.
        stamps: one number for each row, new whenever the row changes, so that copies know what they lack.
    """

    def __init__(self, places: int, pages: int, page: int) -> None:
        self.both: Ints = np.zeros((2, places, pages), np.int32)
        self._globals, self._windows = self.both
        self.stamps = np.zeros(places, np.int64)
        self.width, self._page = pages, page
        self._free = list(range(places - 1, -1, -1))
        self._place: dict[Scheduled, int] = {}
        self._known: dict[Scheduled, tuple[int, int, int]] = {}
        self._changes = 0

    def _write(self, sequence: Scheduled) -> None:
        """Bring the row of a sequence up to date; a new one gets a row."""
        row, held = self._place.get(sequence), sequence.pages
        if row is None:
            row = self._place[sequence] = self._free.pop()
            self.both[:, row] = 0
        globals_, windows, dropped = self._known.get(sequence, (0, 0, 0))
        self._globals[row, globals_ : len(held.globals)] = held.globals[globals_:]
        self._windows[row, windows : len(held.windows)] = held.windows[windows:]
        self._windows[row, dropped : held.dropped] = 0
        self._known[sequence] = len(held.globals), len(held.windows), held.dropped
        held.changed = False
        self._changes += 1
        self.stamps[row] = self._changes

    def host_rows(self, work: Sequence[Work], before: HostRows | None = None) -> HostRows:
        """What attention needs to know of the step; single rows come first in ``work``.

        ``before``: of a step of the same sequences in the same order, if this one is their next row each.
        """
        for sequence, *_ in work:
            if sequence.pages.changed:
                self._write(sequence)
        if before is not None and before.decodes == len(work):
            place_S, start_S, counts, decodes = before.place_S, before.length_S, before.rows, len(work)
            longest = before.longest + 1
        else:
            place_S = np.array([self._place[sequence] for sequence, *_ in work])
            start_S, counts = np.array([w.start for w in work]), [w.rows for w in work]
            decodes = len(counts)
            if sum(counts) > decodes:
                decodes = next(i for i, count in enumerate(counts) if count != 1)
            longest = max([start + rows for _, start, rows, _ in work])
        if decodes == len(work):
            place_N, position_N, length_S = place_S, start_S, start_S + 1
        else:
            count_S = np.array(counts)
            length_S, place_N = start_S + count_S, place_S.repeat(counts)
            inside = np.arange(len(place_N)) - (count_S.cumsum() - count_S).repeat(counts)
            position_N = start_S.repeat(counts) + inside
        page_N, offset_N = np.divmod(position_N, self._page)
        slot_2N = self.both[:, place_N, page_N].astype(np.int64, order="C") * self._page + offset_N
        width = -(-longest // self._page)
        return HostRows(position_N, length_S, place_S, self, longest, width, slot_2N, counts, decodes)

    def leave(self, sequence: Scheduled) -> None:
        """The sequence has no pages any more."""
        row = self._place.pop(sequence, None)
        if row is not None:
            del self._known[sequence]
            self._free.append(row)


class HostRows(NamedTuple):
    """``StepRows`` before it goes to the device.

    Attributes:
        place_S: the sequences' rows of ``tables``, ``width`` wide. longest: the largest length.
        slot_2N: of the global and of the window group.
        rows: of each sequence. decodes: how many sequences at the front have a single one.
    """

    position_N: Longs
    length_S: Longs
    place_S: Longs
    tables: PageTables
    longest: int
    width: int
    slot_2N: Longs
    rows: list[int]
    decodes: int

    @property
    def ends_S(self) -> Ints:
        ends = np.zeros(len(self.rows) + 1, np.int32)
        np.cumsum(self.rows, out=ends[1:])
        return ends

    @property
    def global_SP(self) -> Ints:
        return self.tables.both[0, self.place_S, : self.width]

    @property
    def window_SP(self) -> Ints:
        return self.tables.both[1, self.place_S, : self.width]
