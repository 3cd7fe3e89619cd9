"""The tail of a segment: the newest rows of a run, in a file that is mapped into memory.

Logging a row is a store into mapped memory: the kernel has it at once, so that a process that is killed loses
nothing, and other processes read it while it is written. Pages never written are zero, and zero means "not logged":
the table holds the bits of each value exclusive-or ``MISSING``. When a tail is full its rows become a ``Block``.
The file's space is claimed when it is made, so that a full disk is an error then and no crash later.

    header 64 bytes | number of rows, int64, padded to 64 | steps int64[R] | times f64[R] | table u32[R, C]
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from deepseek.monitor.block import MISSING, Array, Damaged

MAGIC = b"DSTAIL01"
HEADER = struct.Struct("<8sIIII")  #: magic, index, capacity in rows, columns, crc
ROWS_AT, STEPS_AT = 64, 128
MAX_BYTES = 1 << 34  #: a header that claims more is damaged


def _head(index: int, capacity: int, columns: int) -> bytes:
    facts = HEADER.pack(MAGIC, index, capacity, columns, 0)
    return HEADER.pack(MAGIC, index, capacity, columns, zlib.crc32(facts))


def _size(capacity: int, columns: int) -> int:
    return STEPS_AT + capacity * (16 + 4 * columns)


class Tail:
    """The writer's side. ``steps``, ``times`` and ``bits_RC`` are the mapped file; ``rows`` of them count.

    Raises:
        OSError: there is no room on the disk.
    """

    def __init__(self, path: Path, index: int, capacity: int, columns: int) -> None:
        self.path, self.index, self.capacity, self.columns = path, index, capacity, columns
        size = _size(capacity, columns)
        hidden = path.with_name(f".{path.name}")
        try:
            with hidden.open("wb+") as file:
                _claim(file.fileno(), size)
                file.write(_head(index, capacity, columns))
                file.flush()
                self._map = mmap.mmap(file.fileno(), size)
            self.rows = 0
            self._count = np.frombuffer(self._map, np.int64, 1, ROWS_AT)
            self.steps = np.frombuffer(self._map, np.int64, capacity, STEPS_AT)
            self.times = np.frombuffer(self._map, np.float64, capacity, STEPS_AT + 8 * capacity)
            bits = np.frombuffer(self._map, np.uint32, capacity * columns, STEPS_AT + 16 * capacity)
            self.bits_RC = bits.reshape(capacity, columns)
            hidden.replace(path)  # only a complete file is seen under its name
        except BaseException:
            hidden.unlink(missing_ok=True)
            raise

    def publish(self, rows: int) -> None:
        """Let readers see the first ``rows`` rows."""
        self.rows = rows
        self._count[0] = rows

    def wider(self, columns: int) -> Tail:
        """The same rows with room for more columns; takes this file's place."""
        new = Tail(self.path.with_name(f"{self.path.name}.wide"), self.index, self.capacity, columns)
        new.steps[: self.rows], new.times[: self.rows] = self.steps[: self.rows], self.times[: self.rows]
        new.bits_RC[: self.rows, : self.columns] = self.bits_RC[: self.rows]
        new.publish(self.rows)
        new.path = new.path.replace(self.path)
        return new

    def contents(self) -> tuple[Array, Array, Array]:
        """Steps, times, and the table as float32 with ``MISSING``: copies."""
        bits = self.bits_RC[: self.rows] ^ MISSING
        return self.steps[: self.rows].copy(), self.times[: self.rows].copy(), bits.view(np.float32)

    def remove(self) -> None:
        """Delete the file; the mapping goes with its last user."""
        self.path.unlink(missing_ok=True)


def _claim(descriptor: int, size: int) -> None:
    """Make a file of ``size`` zeros whose room on the disk is certain."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    for at in range(0, size, 1 << 20):
        os.write(descriptor, bytes(min(1 << 20, size - at)))
    os.lseek(descriptor, 0, os.SEEK_SET)


class TailView:
    """A reader's copy of a tail: ``steps`` [R], ``times`` [R] and ``table_RC`` (float32 with ``MISSING``).

    Raises:
        Damaged: the file is no tail. FileNotFoundError: it became a block in the meantime.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.inode, self.rows, self.version = path, -1, 0, 0
        self._last = b""
        self.refresh()

    @property
    def steps(self) -> Array:
        return self._steps[: self.rows]

    @property
    def times(self) -> Array:
        return self._times[: self.rows]

    @property
    def table_RC(self) -> Array:
        return self._table[: self.rows]

    @property
    def last_step(self) -> int:
        """The highest step; of a tail with rows."""
        return int(self.steps.max())

    @property
    def first_time(self) -> float:
        return float(self.times.min()) if self.rows else 0.0

    @property
    def last_time(self) -> float:
        return float(self.times.max()) if self.rows else 0.0

    def refresh(self) -> bool:
        """Read the rows that are new, and the newest known one again; whether anything changed."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            if status.st_ino != self.inode:
                self._begin(descriptor, status)
            count = int.from_bytes(os.pread(descriptor, 8, ROWS_AT), "little", signed=True)
            if not 0 <= count <= self.capacity:
                raise Damaged(f"it claims {count} rows of {self.capacity}")
            return self._read(descriptor, count)
        finally:
            os.close(descriptor)

    def _begin(self, descriptor: int, status: os.stat_result) -> None:
        head = os.pread(descriptor, HEADER.size, 0)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise Damaged("no header")
        _, index, capacity, columns, _ = HEADER.unpack(head)
        size = _size(capacity, columns)
        if head != _head(index, capacity, columns) or size > MAX_BYTES or status.st_size < size:
            raise Damaged("its header does not fit the file")
        self.index, self.capacity, self.columns = index, capacity, columns
        self._steps, self._times = np.empty(capacity, np.int64), np.empty(capacity, np.float64)
        self._table = np.empty((capacity, columns), np.float32)
        self.inode, self.rows, self._last = status.st_ino, 0, b""

    def _read(self, descriptor: int, count: int) -> bool:
        start, width = max(min(self.rows, count) - 1, 0), 4 * self.columns
        n, changed = count - start, count != self.rows
        if n > 0:
            table_at = STEPS_AT + 16 * self.capacity
            rows = os.pread(descriptor, n * width, table_at + start * width)
            if len(rows) < n * width:
                raise Damaged("the file became shorter")
            times_at = STEPS_AT + 8 * (self.capacity + start)
            self._steps[start:count] = np.frombuffer(
                os.pread(descriptor, 8 * n, STEPS_AT + 8 * start), np.int64
            )
            self._times[start:count] = np.frombuffer(os.pread(descriptor, 8 * n, times_at), np.float64)
            bits = np.frombuffer(rows, np.uint32).reshape(n, self.columns) ^ MISSING
            self._table[start:count] = bits.view(np.float32)
            changed, self._last = changed or rows[-width:] != self._last, rows[-width:]
        self.rows = count
        self.version += changed
        return changed
