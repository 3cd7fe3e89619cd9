"""A reader's view of one writer's files: the names of its series, its sealed blocks, and its tails.

What cannot be read is left out and counted in ``damaged``; nothing here raises because of a file's content.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek.errors import RunError
from deepseek.monitor.block import HEADER, MAGIC, MISSING, Block, Damaged
from deepseek.monitor.piece import ArrayPiece, BlockPiece, Piece
from deepseek.monitor.tail import TailView


class Rewind(NamedTuple):
    """Steps after ``step`` are void if they were logged before block ``block`` of this segment, or, in other
    segments, not after ``time``."""

    step: int
    block: int
    time: float


class Segment:
    """The files ``STEM.*`` in ``directory``."""

    def __init__(self, directory: Path, stem: str) -> None:
        self.stem = stem
        self.journal_path, self.blocks_path = directory / f"{stem}.journal", directory / f"{stem}.blocks"
        self.names: dict[str, int] = {}
        self.rewinds: list[Rewind] = []
        self.facts: dict[str, Any] = {}
        self.blocks: list[Block] = []
        self.tails: dict[int, TailView] = {}
        self.damaged, self._skipped = 0, 0
        self.newest: Any = None  #: what ``newest`` found in the blocks, and in which state of them
        self._journal_read, self._blocks_read, self._descriptor = 0, 0, -1
        self._unreadable: set[Path] = set()
        self._columns: dict[str, tuple[int, list[Piece]]] = {}
        self._views: dict[str, tuple[tuple[int, int], Piece | None]] = {}

    def refresh(self, tails: dict[int, Path]) -> bool:
        """Take in what is new; ``tails`` are the tail files that were just seen. Whether anything changed.

        Raises:
            FileNotFoundError: a tail became a block since; look again.
        """
        changed = self._read_journal()
        changed |= self._read_blocks()
        sealed = {block.index for block in self.blocks}
        for index in [i for i in self.tails if i in sealed]:
            del self.tails[index]
        for index, path in tails.items():
            if index not in sealed and path not in self._unreadable:
                changed |= self._read_tail(index, path)
        return changed

    def missing(self) -> int:
        """Blocks that must have been there and were not even found damaged."""
        have = {block.index for block in self.blocks} | self.tails.keys()
        return max(max(have, default=-1) + 1 - len(have) - len(self._unreadable) - self._skipped, 0)

    def release(self) -> None:
        """Close the file of blocks until it is needed again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def end(self) -> int:
        """Where the last whole block of the file ends."""
        return self._blocks_read

    def chunks(self) -> Iterator[Block | TailView]:
        """Blocks and tails with rows, in the order in which they were written."""
        found: list[Block | TailView] = [*self.blocks, *(t for t in self.tails.values() if t.rows)]
        yield from sorted(found, key=lambda chunk: chunk.index)

    def pieces(self, name: str) -> Iterator[tuple[int, Piece]]:
        """What was logged of a series, with the numbers of the chunks it is in."""
        series = self.names.get(name)
        if series is None:
            return
        seen, found = self._columns.get(name, (0, []))
        for block in self.blocks[seen:]:
            entry = block.find(series)
            if entry is None:
                continue
            piece = BlockPiece(block, entry, (self.stem, block.index))
            if piece.check():
                found.append(piece)
            else:
                self.damaged += 1
        self._columns[name] = len(self.blocks), found
        yield from ((known.key[1], known) for known in found)
        for index, tail in self.tails.items():
            view = self._view(name, series, index, tail)
            if view is not None:
                yield index, view

    def _view(self, name: str, series: int, index: int, tail: TailView) -> Piece | None:
        """A series of a tail; made once for each state of the tail."""
        state = (index, tail.version)
        if name in self._views and self._views[name][0] == state:
            return self._views[name][1]
        view = None
        if series < tail.columns and tail.rows:
            column = tail.table_RC[:, series]
            rows = np.flatnonzero(column.view(np.uint32) != MISSING)
            if len(rows):
                view = ArrayPiece(tail.steps[rows], tail.times[rows], column[rows], (self.stem, *state))
        self._views[name] = state, view
        return view

    def _read_journal(self) -> bool:
        try:
            if self.journal_path.stat().st_size == self._journal_read:
                return False
            with self.journal_path.open("rb") as file:
                file.seek(self._journal_read)
                data = file.read()
        except OSError:
            return False
        whole = data[: data.rfind(b"\n") + 1]
        self._journal_read += len(whole)
        for line in whole.splitlines():
            if line:
                self._entry(line)
        return bool(whole)

    def _entry(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            if "names" in entry:
                first = int(entry["first"])
                self.names.update({str(name): first + i for i, name in enumerate(entry["names"])})
            elif "rewind" in entry:
                self.rewinds.append(Rewind(int(entry["rewind"]), int(entry["block"]), float(entry["time"])))
            else:
                self.facts = dict(entry)
        except (ValueError, TypeError, KeyError, OverflowError):
            self.damaged += 1

    def _read(self, size: int, offset: int) -> bytes:
        if self._descriptor < 0:
            self._descriptor = os.open(self.blocks_path, os.O_RDONLY)
        data = os.pread(self._descriptor, size, offset)
        if len(data) < size:
            raise RunError(f"{self.blocks_path} became shorter; open the run again")
        return data

    def _read_blocks(self) -> bool:
        try:
            end = self.blocks_path.stat().st_size
        except OSError:
            return False
        before = len(self.blocks)
        while self._blocks_read + HEADER.size <= end:
            try:
                block = Block.open(self._read, self._blocks_read, end - self._blocks_read)
            except (Damaged, OSError, ValueError):
                following = self._next_magic(self._blocks_read + 1, end)
                if following is None:
                    break  # the newest is still being written, or is torn
                self.damaged += 1
                self._skipped += 1
                self._blocks_read = following
                continue
            self.blocks.append(block)
            self._blocks_read += block.size
        return len(self.blocks) > before

    def _next_magic(self, start: int, end: int) -> int | None:
        """Where the next block begins."""
        size = 1 << 20
        for at in range(start, end, size):
            found = self._read(min(size + len(MAGIC), end - at), at).find(MAGIC)
            if found >= 0:
                return at + found
        return None

    def _read_tail(self, index: int, path: Path) -> bool:
        try:
            before = self.tails[index].damaged if index in self.tails else 0
            if index in self.tails:
                changed = self.tails[index].refresh()
            else:
                self.tails[index], changed = TailView(path), True
            self.damaged += self.tails[index].damaged - before
            return changed
        except (Damaged, ValueError, MemoryError):
            self.damaged += 1
            self._unreadable.add(path)
            with suppress(KeyError):
                del self.tails[index]
            return True
