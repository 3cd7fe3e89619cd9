"""The tail of a segment: the newest rows of a run, in a file that grows by whole records.

A record is written by one call that packs it into its place: mapped memory, so that the kernel has it at once, a
process that is killed loses nothing, and other processes read it while the file grows. Its first and its last word are
the same, and never zero; the file's room is claimed as zeros when it is made. So a record that is not complete ends
what a reader sees, and a full disk is an error when the file is made and no crash later. A record says which set of
names its values are of; a set is written down before its first row. When a tail is full its rows become a ``Block``.

    header 64 bytes | records
    names     word, n and checksum u32, u32[n]: the numbers of n series, word
    row       word, step i64, time f64, f32[n], word

A word is the record's size in bytes, a multiple of 8, and above it 2³² times its kind: 0 for names, k for a row of the
k-th set of names of this file, ``VOID`` for a row that was given up. Words are in the machine's order.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from deepseek.monitor.block import MISSING, Array, Damaged

MAGIC = b"DSTAIL02"
HEADER = struct.Struct("<8sIIQ")  #: magic, index, crc, size of the file
START = 64  #: of the first record
WORD = struct.Struct("=q")
COUNT = struct.Struct("=II")
ROW, NAMES = 32, 24  #: bytes of a record beside its values, or names
VOID = (1 << 31) - 1
AHEAD = 1 << 15  #: bytes of a mapped tail that are brought into memory at once
POPULATE_WRITE = 23  #: of ``madvise`` (Linux 5.14), which Python has no name for
CHUNK = 1 << 16  #: bytes that a reader reads at once
MAX_BYTES = 1 << 34  #: a header that claims more is damaged


def room(count: int, beside: int = ROW) -> int:
    """Bytes of a record with ``count`` values, or names."""
    return beside + -(-count // 2) * 8


def _head(index: int, size: int) -> bytes:
    return HEADER.pack(MAGIC, index, zlib.crc32(HEADER.pack(MAGIC, index, 0, size)), size)


class Tail:
    """The writer's side. Records go to ``at``; up to ``ready`` there is room for them without asking.

    Args:
        size: of the file, in bytes. limit: rows that it may hold.
        mapped: records are stored into ``memory``. If not they are written by a system call, which takes longer, and
            cannot be harmed by who makes the file shorter: that is the end of a process that has it mapped.

    Raises:
        OSError: there is no room on the disk.
    """

    def __init__(self, path: Path, index: int, size: int, limit: int, mapped: bool = True) -> None:
        self.path, self.index, self.size, self.limit, self.mapped = path, index, size, limit, mapped
        self.at = self.ready = START
        self.rows, self.sets = 0, 0
        self.step: int | None = None  #: of the newest row
        hidden = path.with_name(f".{path.name}")
        self._file = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            _claim(self._file, size)
            os.pwrite(self._file, _head(index, size), 0)
            if mapped:
                self._map = mmap.mmap(self._file, size)
                self.memory = memoryview(self._map)
            hidden.replace(path)  # only a complete file is seen under its name
        except BaseException:
            hidden.unlink(missing_ok=True)
            os.close(self._file)
            raise

    def reach(self, end: int) -> bool:
        """Whether records may go up to ``end``. Memory up to there, and some more, is made ready for them.

        Raises:
            OSError: somebody made the file shorter.
        """
        if end > self.size:
            return False
        if end > self.ready:
            if os.fstat(self._file).st_size < self.size:
                raise OSError("the file became shorter")
            self.ready = min(end + AHEAD, self.size)
            if self.mapped and hasattr(self._map, "madvise"):
                begin = self.at & -mmap.PAGESIZE
                try:
                    self._map.madvise(POPULATE_WRITE, begin, self.ready - begin)
                except (OSError, ValueError):
                    self.ready = self.size  # an older kernel: each page comes when it is touched
        return True

    def put(self, at: int, record: bytes) -> None:
        """Write a whole record, or zeros over a half one."""
        if self.mapped:
            last = at + len(record) - WORD.size
            self.memory[at:last] = record[: -WORD.size]
            self.memory[last : last + WORD.size] = record[-WORD.size :]
        elif os.pwrite(self._file, record, at) < len(record):
            raise OSError("half a record was written")

    def define(self, series: Array) -> int:
        """Write down a set of names, by their numbers; returns its kind. There has to be room."""
        size, numbers = room(len(series), NAMES), series.astype(np.uint32).tobytes()
        word, count = WORD.pack(size), COUNT.pack(len(series), zlib.crc32(numbers))
        self.put(self.at, word + count + numbers.ljust(size - NAMES, b"\0") + word)
        self.at += size
        self.sets += 1
        return self.sets

    def view(self) -> TailView:
        """What a reader would see, though somebody deleted the file."""
        return TailView(self.path, self._file)

    def close(self) -> None:
        """Let go of the file; it stays where it is. A mapping goes with its last user."""
        descriptor, self._file = self._file, -1
        if descriptor >= 0:
            os.close(descriptor)

    def remove(self) -> None:
        """Delete the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def _claim(descriptor: int, size: int) -> None:
    """Make a file of ``size`` zeros whose room on the disk is certain."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    for at in range(0, size, 1 << 20):
        os.write(descriptor, bytes(min(1 << 20, size - at)))


class TailView:
    """A reader's copy of a tail: ``steps`` [R], ``times`` [R] and ``table_RC`` (float32 with ``MISSING``).

    Records of one step that follow one another are one row; of two values of a series the later counts, and the time
    is that of the last record. A record that is not what was written is left out.

    Args:
        descriptor: of the file, if it is open already: then it is read though its name is gone.

    Raises:
        Damaged: the file is no tail. FileNotFoundError: it became a block in the meantime.
    """

    def __init__(self, path: Path, descriptor: int = -1) -> None:
        self.path, self.inode, self.rows, self.version = path, -1, 0, 0
        self.damaged = 0  #: records that were left out
        self._descriptor = descriptor
        self.refresh()

    @property
    def steps(self) -> Array:
        return self._steps[: self.rows]

    @property
    def times(self) -> Array:
        return self._times[: self.rows]

    @property
    def table_RC(self) -> Array:
        return self._bits[: self.rows, : self.columns].view(np.float32)

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
        """Read what is new; whether there was anything."""
        descriptor = os.open(self.path, os.O_RDONLY) if self._descriptor < 0 else self._descriptor
        try:
            status = os.fstat(descriptor)
            if status.st_ino != self.inode:
                self._begin(descriptor)
            if status.st_size < self.size:
                raise Damaged(f"it has {status.st_size} bytes of {self.size}")
            begin, chunk = self._end, CHUNK
            while self._end + 8 <= self.size:
                wanted = min(chunk, self.size - self._end) & -8
                data = os.pread(descriptor, wanted, self._end)
                if len(data) < wanted:
                    raise Damaged("the file became shorter")
                used, more = self._take(data)
                self._end += used
                if not more:
                    break
                chunk = max(more, min(2 * chunk, 1 << 24))
        finally:
            if descriptor != self._descriptor:
                os.close(descriptor)
        self.version += self._end > begin
        return self._end > begin

    def _begin(self, descriptor: int) -> None:
        head = os.pread(descriptor, HEADER.size, 0)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise Damaged("no header")
        _, index, _, size = HEADER.unpack(head)
        if head != _head(index, size) or not START < size <= MAX_BYTES:
            raise Damaged("its header is not what was written")
        self.index, self.size = index, size
        self.inode, self.rows, self.columns, self._end = os.fstat(descriptor).st_ino, 0, 0, START
        self._sets: list[Array] = []
        self._steps, self._times = np.empty(0, np.int64), np.empty(0, np.float64)
        self._bits = np.empty((0, 0), np.uint32)

    def _take(self, data: bytes) -> tuple[int, int]:
        """Take in the complete records that ``data`` begins with.

        Returns how many bytes they have, and how many more are worth reading: 0 where the records end.
        """
        words = memoryview(data)[: len(data) & -8].cast("q")
        end, at, more = len(words), 0, CHUNK
        kinds, places = list[int](), list[int]()  # of rows; places count words
        while at < end and more == CHUNK:
            kind, size = words[at] >> 32, words[at] & 0xFFFFFFFF
            last = at + size // 8 - 1
            if words[at] == 0:
                more = 0
            elif not self._plausible(kind, size, 8 * at):
                self.damaged += 1
                found = (i for i in range(at + 1, end) if self._is_row(words, i))
                at = next(found, end)
            elif last >= end:
                more = size
            elif words[last] == words[at]:
                if kind == 0:
                    self._define(data[8 * at + 8 : 8 * last])
                elif kind != VOID:
                    kinds.append(kind)
                    places.append(at)
                at = last + 1
            elif last + 1 < end and words[last + 1]:  # others came after it
                self.damaged += 1
                at = last + 1
            else:  # it is being written, or its writer was killed
                more = 0
        if places:
            self._add(data, np.array(kinds), np.array(places))
        return 8 * at, more

    def _plausible(self, kind: int, size: int, at: int) -> bool:
        """Whether a record may begin with this word; ``at`` counts from what was read before."""
        if size % 8 or not NAMES < size <= self.size - self._end - at:
            return False
        return kind in (0, VOID) or (0 < kind <= len(self._sets) and size == room(len(self._sets[kind - 1])))

    def _is_row(self, words: memoryview, at: int) -> bool:
        """Whether a row begins and ends here, after something damaged."""
        kind, size = words[at] >> 32, words[at] & 0xFFFFFFFF
        last = at + size // 8 - 1
        return bool(
            kind and self._plausible(kind, size, 8 * at) and last < len(words) and words[last] == words[at]
        )

    def _define(self, content: bytes) -> None:
        """Take in a set of names."""
        count, crc = COUNT.unpack_from(content)
        numbers = content[COUNT.size : COUNT.size + 4 * count]
        if len(content) != room(count, COUNT.size) or zlib.crc32(numbers) != crc or not count:
            raise Damaged("a set of names is not what was written")
        self._sets.append(np.frombuffer(numbers, np.uint32).astype(np.int64))
        self.columns = max(self.columns, int(self._sets[-1].max()) + 1)

    def _add(self, data: bytes, kinds: Array, places: Array) -> None:
        """Take in the rows that begin at these words of ``data``."""
        words = np.frombuffer(data, np.int64, len(data) // 8)
        steps, each = words[places + 1], np.arange(len(places))
        new = np.append(self.rows == 0 or steps[0] != self._steps[self.rows - 1], steps[1:] != steps[:-1])
        rows = self.rows - 1 + np.cumsum(new)
        self._grow(int(rows[-1]) + 1)
        self._steps[rows], self._times[rows] = steps, words.view(np.float64)[places + 2]
        turn = each - np.maximum.accumulate(np.where(new, each, 0))  #: which record of its row
        order = np.lexsort(
            (kinds, turn)
        )  # stable; of each turn and kind all records at once, later turns on top
        turn, kind = turn[order], kinds[order]
        for group in np.split(order, np.flatnonzero((np.diff(turn) != 0) | (np.diff(kind) != 0)) + 1):
            series = self._sets[int(kinds[group[0]]) - 1]
            at = 2 * (places[group] + ROW // 8 - 1)
            bits = words.view(np.uint32)[at[:, None] + np.arange(len(series))]
            target = rows[group][:, None], series
            missing = bits == MISSING
            self._bits[target] = np.where(missing, self._bits[target], bits) if missing.any() else bits
        self.rows = int(rows[-1]) + 1

    def _grow(self, rows: int) -> None:
        """Make room for so many rows of all columns."""
        high, wide = self._bits.shape
        if rows <= high and self.columns <= wide:
            return
        high = high if rows <= high else max(rows, 2 * high, 64)
        bits = np.full((high, max(self.columns, wide)), MISSING, np.uint32)
        bits[: self.rows, :wide] = self._bits[: self.rows]
        self._bits = bits
        self._steps = np.resize(self._steps, high) if len(self._steps) else np.empty(high, np.int64)
        self._times = np.resize(self._times, high) if len(self._times) else np.empty(high, np.float64)
