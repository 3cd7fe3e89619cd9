"""Best-fit packing: documents of any length into rows of ``T`` positions, almost without padding.

A document ``[EOS] d1 ... dn [EOS]`` has n + 1 inputs and as many targets. It is cut into pieces of at most
``T`` inputs; pieces go, longest first, into the row with the least room that still holds them (best-fit
decreasing; Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). No token is dropped and no piece
is truncated.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents, one per index.

    Attributes:
        document: int64, index into the list of documents that was cut.
        start: int64, first input position within the document.
        length: int64, number of inputs (and targets), at least 1.
    """

    document: Int
    start: Int
    length: Int

    def __len__(self) -> int:
        return len(self.length)


def cut(inputs: npt.NDArray[Any], length: int) -> Pieces:
    """Cut documents of ``inputs`` positions each into pieces of at most ``length``; in order, nothing left
    out.
    """
    inputs = inputs.astype(np.int64)
    counts = -(-inputs // length)
    document = np.repeat(np.arange(len(inputs)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(document)) - first) * length
    return Pieces(document, start, np.minimum(length, inputs[document] - start))


def pack(lengths: Int, capacity: int) -> list[list[int]]:
    """Rows of piece indices with ``sum(lengths[row]) <= capacity``, by best-fit decreasing.

    Every index appears exactly once. Deterministic: equal lengths keep their order, equal rooms fill newest
    first.
    """
    order = np.argsort(-lengths, kind="stable")
    full = int(np.count_nonzero(lengths >= capacity))
    rows: list[list[int]] = [[int(i)] for i in order[:full]]
    rooms: list[int] = []  # the distinct rooms left, sorted
    open_rows: dict[int, list[int]] = {}  # room -> rows with that room
    for i, length in zip(order[full:].tolist(), lengths[order[full:]].tolist()):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        rows[row].append(i)
        if room > length:
            if room - length not in open_rows:
                insort(rooms, room - length)
                open_rows[room - length] = []
            open_rows[room - length].append(row)
    return rows


def fill_rate(lengths: Int, rows: list[list[int]], capacity: int) -> float:
    """Share of the rows' positions that hold a token."""
    return float(lengths.sum()) / (len(rows) * capacity) if rows else 1.0
