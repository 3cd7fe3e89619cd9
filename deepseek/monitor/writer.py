"""``SeriesWriter``: one process's rows of a run, appended to a segment of its own.

Any number of processes may write into one run, each its own segment, at the same time or one after another; the
reader puts them together. A segment is three kinds of files:

    STEM.journal     JSON lines: who writes, the names of the series by number, and where the run went back
    STEM.blocks      sealed ``Block``s, one after another
    STEM.tail-N      the rows that will be block N
"""

from __future__ import annotations

import errno
import json
import operator
import os
import secrets
import socket
import struct
import threading
import time as clock
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from deepseek.errors import RunError
from deepseek.monitor.block import MAX_ROWS, MISSING, Array, encode
from deepseek.monitor.seal import TornBlock, append_block, claim, seal_abandoned
from deepseek.monitor.tail import Tail

ROWS = 4096  #: of a block
TAIL_BYTES = 16 << 20  #: a tail with many columns has fewer rows,
FEWEST = 256  #: but not fewer than this
LONGEST_NAME = 500
LAYOUTS = 256  #: sets of names whose places are remembered


class SeriesWriter:
    """Appends rows to the series of a run.

    ``log`` is a store into memory that belongs to the kernel: what was logged survives the process, however it
    ends. (Only a machine that loses power may lose the last seconds.) Threads may share a writer; a forked
    child that logs starts a segment of its own.

    Args:
        directory: where the segments are; made when the first row is logged.
        label: in the segment's name, for people: ``rank3``.
        rows: of a block, at most 65536.
    """

    def __init__(self, directory: Path | str, *, label: str = "", rows: int = ROWS) -> None:
        if not 2 <= rows <= MAX_ROWS:
            raise RunError(f"a block of {rows} rows is not possible; between 2 and {MAX_ROWS} are")
        self.directory, self.label, self.rows = Path(directory), label, rows
        self.failures = 0  #: tails that could not be sealed; their rows are safe, and stay in tails
        self._reset()

    def _reset(self) -> None:
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._stem, self._journal = "", -1
        self._tail: Tail | None = None
        self._ids: dict[str, int] = {}
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._next = 0  #: number of the next tail
        self._sealing: threading.Thread | None = None
        self._seal_lock, self._can_seal = threading.Lock(), True
        self._step: int | None = None
        self._torn = False  #: the journal ends in half a line

    def log(self, step: int, values: Mapping[str, Any], time: float | None = None) -> None:
        """Append a row, or add to the newest one if it is of the same ``step``.

        Args:
            values: numbers (NaN and infinities, too) by name; ``None`` is "not logged". Kept as float32.
            time: Unix seconds; by default now.

        Raises:
            TypeError, ValueError: a value is no number; nothing was logged.
            RunError: the disk is full or cannot be written.
        """
        if not values:
            return
        if os.getpid() != self._pid:  # a forked child
            if self._stem:
                os.close(self._journal)
            self._reset()
        step = operator.index(step)
        with self._lock:
            layout = self._layouts.get(tuple(values))
            try:
                if layout is None:
                    _slow(values)  # refuses what is no number before its name is written down
                    layout = self._learn(values)
                whole = layout.fill(values)
                if not (whole or layout.given().any()):
                    return
                tail = self._tail
                if tail is None or (step != self._step and tail.rows == tail.capacity):
                    tail = self._place()
            except OSError as error:
                raise RunError(f"cannot log in {self.directory}: {error.strerror or error}") from error
            row = tail.rows if step != self._step else tail.rows - 1
            tail.steps[row] = step
            tail.times[row] = clock.time() if time is None else time
            if whole or step != self._step:
                layout.store(tail.bits_RC[row])
            else:  # what is not given now may have been before
                given = layout.given()
                tail.bits_RC[row, layout.each[given]] = layout.bits[given] ^ MISSING
            if step != self._step:
                tail.publish(row + 1)
                self._step = step

    def rewind(self, step: int, time: float | None = None) -> None:
        """The run went back: what was logged before, by anyone, about steps after ``step`` is void.

        Args:
            time: Unix seconds; rows of other writers count as before if theirs is not later. By default now.

        Raises:
            RunError: the disk is full or cannot be written.
        """
        with self._lock:
            try:
                self._begin()
                self._rotate()
                when = clock.time() if time is None else time
                self._write_journal({"rewind": operator.index(step), "block": self._next, "time": when})
            except OSError as error:
                raise RunError(f"cannot write in {self.directory}: {error.strerror or error}") from error

    def close(self) -> None:
        """Seal what is left. Logging again starts a new segment."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._stem:
                self._rotate(wait=True)
                os.close(self._journal)
            self._reset()

    def __enter__(self) -> SeriesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self) -> None:
        """Start the segment, once."""
        if self._stem:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self.failures += seal_abandoned(self.directory)
        now = clock.time()
        stamp = clock.strftime("%Y%m%dT%H%M%S", clock.gmtime(now)) + f"{now % 1:.6f}"[2:]
        label = "".join(c if c.isalnum() or c in "_-" else "_" for c in self.label)[:40] or "w"
        stem = f"{stamp}-{label}-{secrets.token_hex(3)}"
        path = self.directory / f"{stem}.journal"
        self._journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._stem = stem
        claim(self._journal)
        host = socket.gethostname()
        self._write_journal(
            {"format": 1, "created": now, "pid": self._pid, "host": host, "label": self.label}
        )

    def _learn(self, values: Mapping[str, Any]) -> Layout:
        """Where the names of ``values`` stand in a row; new names are written to the journal."""
        names = tuple(values)
        for name in names:
            if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
                raise ValueError(f"a series needs a name of 1 to {LONGEST_NAME} characters, not {name!r:.80}")
        self._begin()
        new = [name for name in names if name not in self._ids]
        if new:
            first = len(self._ids)
            self._write_journal({"first": first, "names": new})
            self._ids.update({name: first + i for i, name in enumerate(new)})
        if self._tail is not None and len(self._ids) > self._tail.columns:
            self._tail = self._tail.wider(self._width())
        if len(self._layouts) >= LAYOUTS:
            self._layouts.clear()
        self._layouts[names] = layout = Layout(np.array([self._ids[name] for name in names], np.int64))
        return layout

    def _place(self) -> Tail:
        """A tail with room for a row."""
        if self._tail is not None:
            self._rotate()
        columns = self._width()
        fitting = max(TAIL_BYTES // (16 + 4 * columns), FEWEST)
        capacity = min(self.rows, 1 << (fitting.bit_length() - 1))
        path = self.directory / f"{self._stem}.tail-{self._next:06d}"
        self._tail, self._step = Tail(path, self._next, capacity, columns), None
        self._next += 1
        return self._tail

    def _width(self) -> int:
        return -(-(len(self._ids) * 5 // 4 + 8) // 16) * 16

    def _rotate(self, wait: bool = False) -> None:
        """Hand the tail over to be sealed, in the background unless ``wait``."""
        tail, self._tail, self._step = self._tail, None, None
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        if tail is None:
            return
        if not tail.rows:
            tail.remove()
        elif wait:
            self._seal(tail)
        else:
            self._sealing = threading.Thread(target=self._seal, args=(tail,), name="seal", daemon=True)
            self._sealing.start()

    def _seal(self, tail: Tail) -> None:
        """Append the tail's rows as a block, and only then delete the tail. On failure the tail stays."""
        with self._seal_lock:
            if not self._can_seal:
                return
            try:
                append_block(self.directory / f"{self._stem}.blocks", encode(tail.index, *tail.contents()))
                tail.remove()
            except TornBlock:
                self._can_seal = False  # nothing may follow it
                self.failures += 1
            except (OSError, MemoryError):
                self.failures += 1

    def _write_journal(self, line: Mapping[str, Any]) -> None:
        data = ("\n" * self._torn + json.dumps(line) + "\n").encode()
        self._torn = True
        if os.write(self._journal, data) < len(data):
            raise OSError(errno.ENOSPC, "no room for the names of the series")
        self._torn = False


class Layout:
    """Where a set of names stands in a row, and room to put a row's values together."""

    def __init__(self, places: Array) -> None:
        run = bool(np.all(np.diff(places) == 1))
        self.each = places
        self.places: slice | Array = slice(int(places[0]), int(places[-1]) + 1) if run else places
        self._floats = np.zeros(len(places), np.float32)
        self.bits = self._floats.view(np.uint32)  #: of the values, after ``fill``
        self._missing = np.full(len(places), MISSING)
        self._pack, self._room = struct.Struct(f"={len(places)}f").pack_into, self._floats.data.cast("B")

    def store(self, row_C: Array) -> None:
        """Put ``bits``, exclusive-or ``MISSING``, into a row of a tail."""
        if isinstance(self.places, slice):
            np.bitwise_xor(self.bits, self._missing, out=row_C[self.places])
        else:
            row_C[self.places] = self.bits ^ self._missing

    def given(self) -> Array:
        """Which values are not ``None``."""
        return self.bits != MISSING

    def fill(self, values: Mapping[str, Any]) -> bool:
        """Put the values' bits into ``bits``; whether all are given. Raises as ``SeriesWriter.log``."""
        try:
            self._pack(self._room, 0, *values.values())
        except (struct.error, OverflowError, TypeError, ValueError):
            self.bits[:] = _slow(values)
            return None not in values.values()
        return True


def _slow(values: Mapping[str, Any]) -> Array:
    """The bits of values of which some are ``None``, too large for float32, or no numbers, which is an error."""
    if text := next((name for name, value in values.items() if isinstance(value, (str, bytes))), None):
        raise TypeError(f"'{text}' is text, not a number")
    wide = np.fromiter(values.values(), np.float64, len(values))
    with np.errstate(all="ignore"):
        bits = wide.astype(np.float32).view(np.uint32)
    for i, value in enumerate(values.values()):
        if value is None:
            bits[i] = MISSING
    return bits
