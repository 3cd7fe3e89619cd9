"""``SeriesWriter``: one process's rows of a run, appended to a segment of its own.

Any number of processes may write into one run, each its own segment, at the same time or one after another; the
reader puts them together. A segment is three kinds of files:

    STEM.journal     JSON lines: who writes, the names of the series by number, and where the run went back
    STEM.blocks      sealed ``Block``s, one after another
    STEM.tail-N      the rows that will be block N

A loop that does other things between two rows finds its caches cold: then not the work counts that ``log`` does, but
how much code and how many pages it touches. So a row whose names are those of the last one takes a short way: names
are compared once, and one call of ``struct`` puts everything where it stays. All else takes the long way, ``_anew``.
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
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from deepseek.errors import RunError
from deepseek.monitor.block import MAX_ROWS, MISSING, Array, Damaged, encode
from deepseek.monitor.seal import TornBlock, append_block, claim, seal_abandoned
from deepseek.monitor.tail import NAMES, ROW, START, VOID, WORD, Tail, room

ROWS = 4096  #: of a block
TAIL_BYTES = 16 << 20  #: a tail with many columns has fewer rows,
FEWEST = 256  #: but not fewer than this
LEAST_BYTES = 1 << 16  #: of a tail
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
        mapped: rows are stored into mapped memory, which is fast; whoever empties the file then ends this process by
            SIGBUS. If not they are written by a system call, which costs some microseconds and cannot be harmed.

    Attributes:
        lock: held while a row is written.
        failures: tails that could not be sealed; their rows are safe, and stay in tails, unless they were cut off.
    """

    def __init__(
        self, directory: Path | str, *, label: str = "", rows: int = ROWS, mapped: bool = True
    ) -> None:
        if not 2 <= rows <= MAX_ROWS:
            raise RunError(f"a block of {rows} rows is not possible; between 2 and {MAX_ROWS} are")
        self.directory, self.label, self.rows, self.mapped = Path(directory), label, rows, mapped
        self.failures = 0
        self._reset()
        _writers.add(self)

    def _reset(self) -> None:
        self.lock, self._pid = threading.RLock(), os.getpid()
        self._stem, self._journal = "", -1
        self._tail: Tail | None = None
        self._ids: dict[str, int] = {}
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._next = 0  #: number of the next tail
        self._sealing: threading.Thread | None = None
        self._seal_lock, self._can_seal = threading.Lock(), True
        self._layout = NOTHING  #: of the last row, if the next may go the short way
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
        with self.lock:
            self.append(step, values, time)

    def append(self, step: int, values: Mapping[str, Any], time: float | None = None) -> None:
        """``log`` for who holds ``lock``."""
        layout, tail = self._layout, self._tail
        if tuple(values) != layout.names or step.__class__ is not int or tail is None:
            return self._anew(step, values, time)
        at = tail.at
        end = at + layout.size
        if end > tail.ready:
            return self._anew(step, values, time)
        if step != tail.step:
            if tail.rows == tail.limit:
                return self._anew(step, values, time)
            tail.step = step
            tail.rows += 1
        tail.at = end  # before the row is there: a signal's handler that logs now writes behind it
        try:
            layout.pack(
                tail.memory, at, layout.word, step, clock.time() if time is None else time,
                *values.values(), layout.word,
            )  # fmt: skip
        except BaseException as error:
            self._give_up(tail, at, end)
            if not isinstance(error, Exception):
                raise
            self._anew(step, values, time)

    def _anew(self, step: int, values: Mapping[str, Any], time: float | None) -> None:
        """The long way: with names that are new or others than before, a new tail, or values to be looked at."""
        if not values:
            return
        step = operator.index(step)
        layout = self._layouts.get(tuple(values))
        try:
            if layout is None:
                _slow(values)  # refuses what is no number before its name is written down
                layout = self._learn(values)
            content = layout.fill(values)
            if content is None:
                return
            tail = self._place(step, layout)
            record = layout.head.pack(layout.word, step, clock.time() if time is None else time)
            tail.put(tail.at, record + content + WORD.pack(layout.word))
        except OSError as error:
            raise RunError(f"cannot log in {self.directory}: {error.strerror or error}") from error
        except struct.error as error:
            raise ValueError(f"step {step} and time {time} are no numbers of 64 bits") from error
        tail.rows += step != tail.step
        tail.step = step
        tail.at += layout.size
        self._layout = layout if self.mapped else NOTHING

    def _give_up(self, tail: Tail, at: int, end: int) -> None:
        """Undo what is half written from ``at`` to ``end``; what came after it stays."""
        if tail.at == end:
            tail.put(at, bytes(end - at))
            tail.at = at
        else:
            word = WORD.pack(VOID << 32 | end - at)
            tail.put(at, word + bytes(end - at - 2 * WORD.size) + word)

    def rewind(self, step: int, time: float | None = None) -> None:
        """The run went back: what was logged before, by anyone, about steps after ``step`` is void.

        Args:
            time: Unix seconds; rows of other writers count as before if theirs is not later. By default now.

        Raises:
            RunError: the disk is full or cannot be written.
        """
        with self.lock:
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
        with self.lock:
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
        if len(self._layouts) >= LAYOUTS:
            self._layouts.clear()
        self._layouts[names] = layout = Layout(names, np.array([self._ids[name] for name in names], np.int64))
        return layout

    def _place(self, step: int, layout: Layout) -> Tail:
        """A tail with room for a row of ``layout``, which knows its names."""
        tail = self._tail
        if tail is not None and (tail.rows < tail.limit or step == tail.step):
            need = layout.size + (layout.tail is not tail) * layout.names_size
            if self._reaches(tail, tail.at + need):
                return self._define(tail, layout)
        if tail is not None:
            self._rotate()
        columns = -(-(len(self._ids) * 5 // 4 + 8) // 16) * 16
        row = 3 * ROW + 4 * columns  # a step may be told in several records
        limit = min(self.rows, 1 << (max(TAIL_BYTES // row, FEWEST).bit_length() - 1))
        size = START + layout.names_size + max(limit * row, layout.size, LEAST_BYTES)
        path = self.directory / f"{self._stem}.tail-{self._next:06d}"
        tail = Tail(path, self._next, size, limit, self.mapped)
        self._tail = tail
        self._next += 1
        tail.reach(START + layout.names_size + layout.size)
        return self._define(tail, layout)

    def _reaches(self, tail: Tail, end: int) -> bool:
        try:
            return tail.reach(end)
        except OSError:  # somebody cut it off: what is left of it is not sealed
            return False

    def _define(self, tail: Tail, layout: Layout) -> Tail:
        if layout.tail is not tail:
            layout.word = tail.define(layout.each) << 32 | layout.size
            layout.tail = tail
        return tail

    def _rotate(self, wait: bool = False) -> None:
        """Hand the tail over to be sealed, in the background unless ``wait``."""
        tail, self._tail, self._layout = self._tail, None, NOTHING
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
                view = tail.view()
                self.failures += view.damaged > 0
                rows = encode(view.index, view.steps, view.times, view.table_RC)
                append_block(self.directory / f"{self._stem}.blocks", rows)
                tail.remove()
            except TornBlock:
                self._can_seal = False  # nothing may follow it
                self.failures += 1
            except (OSError, MemoryError, Damaged):
                self.failures += 1
            finally:
                tail.close()

    def _write_journal(self, line: Mapping[str, Any]) -> None:
        data = ("\n" * self._torn + json.dumps(line) + "\n").encode()
        self._torn = True
        if os.write(self._journal, data) < len(data):
            raise OSError(errno.ENOSPC, "no room for the names of the series")
        self._torn = False


class Layout:
    """A set of names, the numbers of their series, and how a row of their values is packed."""

    head = struct.Struct("=qqd")  #: word, step, time

    def __init__(self, names: tuple[str, ...], each: Array) -> None:
        self.names: tuple[str, ...] | None = names
        self.each = each
        self.size, self.names_size = room(len(names)), room(len(names), NAMES)
        whole = struct.Struct(
            f"@qqd{len(names)}fq"
        )  # native: no check of each value, and the last word is aligned
        assert whole.size == self.size
        self.pack = whole.pack_into
        self._content = struct.Struct(f"={len(names)}f{len(names) % 2 * 4}x").pack
        self.word = 0  #: of a row in ``tail``
        self.tail: Tail | None = None

    def fill(self, values: Mapping[str, Any]) -> bytes | None:
        """The values as they stand in a record; ``None`` if none is given. Raises as ``SeriesWriter.log``."""
        try:
            return self._content(*values.values())
        except (struct.error, OverflowError, TypeError, ValueError):
            bits = _slow(values)
            return bits.tobytes().ljust(self.size - ROW, b"\0") if (bits != MISSING).any() else None


NOTHING = Layout((), np.zeros(0, np.int64))  #: the layout of no row
NOTHING.names = None
_writers: weakref.WeakSet[SeriesWriter] = weakref.WeakSet()


def _forked() -> None:
    """In a forked child: its writers start segments of their own."""
    for writer in _writers:
        if writer._stem:
            os.close(writer._journal)
        if writer._tail is not None:
            writer._tail.close()
        writer._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


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
