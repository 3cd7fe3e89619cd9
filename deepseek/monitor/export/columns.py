"""Series as a table: one row a step, one column a series, as CSV or as Parquet.

A value that was not logged at a step is an empty cell (CSV) or null (Parquet); NaN and the infinities that were logged
are written as such. Values are float32 and written so that they read back the same. The table is made piece by piece:
a long run needs no more memory than a short one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek.errors import MissingExtraError, RunError

CELLS = 500_000  #: of a piece


class Piece(NamedTuple):
    """Rows of the table: ``step`` int64 [R], ``time`` float64 [R] (Unix seconds, NaN if unknown), ``values`` float32
    [R, C], and which of them were logged, bool [R, C]."""

    step: Any
    time: Any
    values: Any
    logged: Any


def pieces(reader: Any, names: Sequence[str]) -> Iterator[Piece]:
    """The table of ``names`` in pieces, in order of steps. Steps at which none was logged are left out."""
    first, last = reader.steps()
    width = max(1, CELLS // max(1, len(names)))
    for start in range(first, last + 1, width):
        piece = _piece(reader, names, start, min(start + width - 1, last))
        if len(piece.step):
            yield piece


def _piece(reader: Any, names: Sequence[str], start: int, stop: int) -> Piece:
    columns = [reader.raw(name, start, stop) for name in names]
    steps = np.unique(np.concatenate([s for s, _ in columns])) if columns else np.empty(0, np.int64)
    values = np.full((len(steps), len(names)), np.nan, np.float32)
    logged = np.zeros(values.shape, bool)
    times = np.full(len(steps), np.nan)
    missing = np.ones(len(steps), bool)
    for column, (own, found) in enumerate(columns):
        at = np.searchsorted(steps, own)
        values[at, column], logged[at, column] = found, True
        if missing[at].any():
            times[at] = reader.times(names[column], start, stop)[1]
            missing[at] = False
    return Piece(steps, times, values, logged)


def csv_lines(reader: Any, names: Sequence[str]) -> Iterator[str]:
    """The table as CSV, in pieces of many lines: ``step,time,NAME,…``."""
    yield _line(["step", "time", *names])
    for piece in pieces(reader, names):
        cells = piece.values.astype(str)  # the shortest text that reads back as the same float32
        cells[~piece.logged] = ""
        times = [f"{t:.3f}" if t == t else "" for t in piece.time.tolist()]
        rows = zip(piece.step.tolist(), times, cells.tolist())
        yield "".join(f"{step},{time},{','.join(row)}\n" for step, time, row in rows)


def write_csv(reader: Any, names: Sequence[str], path: Path) -> int:
    """Write the table; returns the number of rows."""
    rows = -1
    with path.open("w", encoding="utf-8", newline="") as file:
        for text in csv_lines(reader, names):
            file.write(text)
            rows += text.count("\n")
    return rows


def write_parquet(reader: Any, names: Sequence[str], path: Path, about: dict[str, str] | None = None) -> int:
    """Write the table; returns the number of rows. ``about`` becomes the file's metadata.

    Raises:
        MissingExtraError: without pyarrow.
        RunError: a series is called 'step' or 'time', as the table's own columns are.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", "writing Parquet") from error
    if taken := {"step", "time"} & set(names):
        raise RunError(
            f"a series is called {sorted(taken)[0]!r}, like a column of the table itself; leave it out by --name"
        )
    fields = [
        ("step", pa.int64()),
        ("time", pa.timestamp("ms", "UTC")),
        *((name, pa.float32()) for name in names),
    ]
    schema = pa.schema(fields, metadata=about or {})
    rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for piece in pieces(reader, names):
            writer.write_table(pa.table(_arrays(pa, piece), schema=schema))
            rows += len(piece.step)
    return rows


def _arrays(pa: Any, piece: Piece) -> list[Any]:
    unknown = np.isnan(piece.time)
    millis = np.where(unknown, 0, piece.time * 1000).astype(np.int64)
    times = pa.array(millis, mask=unknown).cast(pa.timestamp("ms", "UTC"))
    values = [pa.array(v, mask=~m) for v, m in zip(np.ascontiguousarray(piece.values.T), piece.logged.T)]
    return [pa.array(piece.step), times, *values]


def _line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
