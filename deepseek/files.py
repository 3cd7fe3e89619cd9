"""Files and directories that are either wholly there or not there at all, whatever kills the process.

A directory is built under a hidden name, every file in it is flushed to the disk, and one ``rename`` makes it
visible. A process that dies leaves only hidden names; each carries an advisory lock that the kernel drops
with the process, so a later process can tell a dead writer's leavings from a living writer's work.

    .tmp-NAME-XXXX/       being written; its lock is the file .tmp-NAME-XXXX.lock
    NAME.new/             complete, about to take the place of NAME (readers prefer it)
    .trash-NAME-XXXX/     no longer wanted, being deleted
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

TEMP, TRASH, NEW = ".tmp-", ".trash-", ".new"
LOCK = ".lock"  #: the file in a directory that guards its renames
CHUNK = 8 << 20


class FileRecord(NamedTuple):
    """What a file must be: its size in bytes and the BLAKE2b-256 of its content, in hexadecimal."""

    size: int
    blake2b: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write ``chunks`` one after another; returns what was written. Not durable until ``flush``."""
    digest, size = hashlib.blake2b(digest_size=32), 0
    with path.open("wb") as file:
        for chunk in chunks:
            view = memoryview(chunk)
            for start in range(0, view.nbytes, CHUNK):
                part = view[start : start + CHUNK]
                file.write(part)
                digest.update(part)
            size += view.nbytes
    return FileRecord(size, digest.hexdigest())


def hash_file(path: Path) -> FileRecord:
    """Size and hash of a file on the disk, read in pieces."""
    digest, size = hashlib.blake2b(digest_size=32), 0
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
            size += len(part)
    return FileRecord(size, digest.hexdigest())


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace ``path`` by ``data``: readers see the old content or the new, never a mixture or a torn end."""
    temp = path.with_name(f"{TEMP}{path.name}-{secrets.token_hex(4)}")
    try:
        write_file(temp, [data.encode() if isinstance(data, str) else data])
        flush(temp)
        temp.replace(path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """``fsync`` a file or, where the system can, a directory."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged(final: Path) -> Iterator[Path]:
    """A hidden directory to fill; when the block ends well it is flushed and appears as ``final`` in one
    step.

    An existing ``final`` is replaced: until the new one is complete on the disk the old one stays as it
    was, and from then on at least one of the two is visible at any moment. When the block raises, the
    hidden directory is removed and ``final`` is untouched.
    """
    parent = final.parent
    temp = parent / f"{TEMP}{final.name}-{secrets.token_hex(4)}"
    with contextlib.ExitStack() as held:
        with locked(parent / LOCK):  # so that no cleaner sees the directory before its lock is taken
            lock = temp.with_name(temp.name + LOCK)
            held.enter_context(locked(lock))
            held.callback(lock.unlink, missing_ok=True)
            temp.mkdir()
        try:
            yield temp
            for path in (*temp.rglob("*"), temp):
                flush(path)
            with locked(parent / LOCK):
                _publish(temp, final)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise


def discard(path: Path) -> None:
    """Delete a directory so that it is never visible half-deleted."""
    trash = path.with_name(f"{TRASH}{path.name}-{secrets.token_hex(4)}")
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def clean(parent: Path) -> list[Path]:
    """Finish what dead processes left half-done in ``parent``; returns the paths removed.

    Directories whose writer is alive are left alone, and so is everything on a file system without locks.
    """
    with locked(parent / LOCK):
        for new in parent.glob(f"*{NEW}"):
            _settle(new.with_name(new.name[: -len(NEW)]))
        dead = [p for p in parent.glob(f"{TRASH}*") if p.is_dir()]
        for lock in parent.glob(f"{TEMP}*{LOCK}"):
            if _is_free(lock):
                dead += [lock.with_name(lock.name[: -len(LOCK)]), lock]
        locks = {p.name for p in parent.glob(f"{TEMP}*{LOCK}")}
        dead += [p for p in parent.glob(f"{TEMP}*") if p.is_dir() and p.name + LOCK not in locks]
        removed = [p for p in dead if p.exists()]
        for path in removed:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return removed


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the advisory lock of the file ``path`` (created if need be); waits for another holder.

    Where the system or the file system has no such locks this does nothing, and ``clean`` then removes
    nothing.
    """
    if sys.platform == "win32":
        path.touch()
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for a forked child that inherited the descriptor
        os.close(descriptor)


class InUse(Exception):
    """Another process holds the claim; the message is its id."""


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold the advisory lock of the file ``path``, which then holds this process's id; never waits.

    The claim ends with the process, however it ends. Where there are no such locks this does nothing.

    Raises:
        InUse: another process has it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _claim(descriptor)
        except BlockingIOError:
            raise InUse(os.pread(descriptor, 32, 0).decode().strip() or "unknown") from None
        except OSError:
            yield
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _claim(descriptor: int) -> None:
    """Take the lock at once; again after a moment, for ``holder`` has it while it looks."""
    import fcntl

    for pause in (0.01, 0.04, None):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if pause is None:
                raise
            time.sleep(pause)
        else:
            return


def holder(path: Path) -> str | None:
    """The id of the process that holds the claim on the file ``path``, ``None`` if nobody does."""
    if _is_free(path):
        return None
    try:
        return path.read_text(encoding="utf-8").strip() or "unknown"
    except OSError:  # there is no such file
        return None


def _is_free(lock: Path) -> bool:
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _publish(temp: Path, final: Path) -> None:
    _settle(final)
    if not final.exists():
        temp.rename(final)
        flush(final.parent)
        return
    temp.rename(final.with_name(final.name + NEW))
    flush(final.parent)
    _settle(final)


def _settle(final: Path) -> None:
    """Let ``final.new``, if there is one, take the place of ``final``."""
    new = final.with_name(final.name + NEW)
    if new.exists():
        trash = final.with_name(f"{TRASH}{final.name}-{secrets.token_hex(4)}")
        if final.exists():
            final.rename(trash)
        new.rename(final)
        flush(final.parent)
        shutil.rmtree(trash, ignore_errors=True)
