"""Turning tails into blocks: at the end of a file, completely or not at all, and for writers that were killed.

A living writer holds the advisory lock of its journal, which the kernel drops with the process. The tails of a dead
one are sealed by the next writer that starts in the same directory on the same machine, so that a run that is killed
and started again many times keeps neither their room on the disk nor their room in a reader's memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

from deepseek.monitor.block import HEADER, MAGIC, Damaged, encode
from deepseek.monitor.segment import Segment
from deepseek.monitor.tail import TailView


class TornBlock(OSError):
    """Half a block was written and could not be taken back."""


def append_block(path: Path, data: bytes) -> None:
    """Append ``data`` to the file and to the disk; when that fails the file is as it was.

    Raises:
        OSError: it failed. TornBlock: and what was written could not be taken back.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        except OSError as error:
            try:
                os.ftruncate(descriptor, before)
            except OSError:
                raise TornBlock(error.errno, error.strerror) from error
            raise
    finally:
        os.close(descriptor)


def claim(journal: int) -> bool:
    """Take the lock of an open journal, never waiting; whether that worked. It goes when the file is closed."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def seal_abandoned(directory: Path) -> int:
    """Seal the tails of writers that ran on this machine and are dead; returns how many could not be sealed."""
    stems: dict[str, dict[int, Path]] = {}
    for path in directory.glob("[!.]*.tail-*"):
        stem, _, number = path.name.rpartition(".tail-")
        if number.isdigit():
            stems.setdefault(stem, {})[int(number)] = path
    for path in directory.glob(".*.tail-*"):  # a writer died while it made one: it holds no row yet
        stems.setdefault(path.name[1:].rpartition(".tail-")[0], {})
    failed = 0
    for stem, tails in stems.items():
        with contextlib.ExitStack() as held:
            try:
                journal = os.open(directory / f"{stem}.journal", os.O_RDWR)
            except OSError:
                continue
            held.callback(os.close, journal)
            if _ours(journal) and claim(journal):
                for half in directory.glob(f".{stem}.tail-*"):
                    half.unlink(missing_ok=True)
                failed += _seal(directory, stem, tails) if tails else 0
    return failed


def _ours(journal: int) -> bool:
    """Whether the writer ran on this machine: locks of others may not be seen here."""
    try:
        first = json.loads(os.pread(journal, 4096, 0).split(b"\n", 1)[0])
        return bool(first["host"] == socket.gethostname())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _seal(directory: Path, stem: str, tails: dict[int, Path]) -> int:
    """Seal the tails of a segment that is locked."""
    segment, failed = Segment(directory, stem), 0
    segment.refresh({})
    segment.release()
    path = directory / f"{stem}.blocks"
    try:
        if (
            path.exists()
            and path.stat().st_size > segment.end
            and not _take_back(path, segment.end, set(tails))
        ):
            return len(tails)
    except OSError:
        return len(tails)
    sealed = {block.index for block in segment.blocks}
    for number, tail in sorted(tails.items()):
        try:
            if number not in sealed:
                view = TailView(tail)
                failed += view.damaged > 0  # what is whole of it is sealed
                if view.rows:
                    append_block(path, encode(view.index, view.steps, view.times, view.table_RC))
            tail.unlink()
        except (OSError, Damaged, MemoryError):
            failed += 1  # it stays a tail
    return failed


def _take_back(path: Path, end: int, tails: set[int]) -> bool:
    """Cut off the block that a writer was killed in, if its rows are in a tail; whether that was so."""
    with path.open("rb") as file:
        file.seek(end)
        head = file.read(HEADER.size)
    if len(head) == HEADER.size and (head[: len(MAGIC)] != MAGIC or HEADER.unpack(head)[1] not in tails):
        return False
    os.truncate(path, end)
    return True
