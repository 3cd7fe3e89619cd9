"""The series of a run: written by ``SeriesWriter``, read by ``SeriesReader``, drawn from a ``Window``.

    with SeriesWriter(run / "monitor") as writer:
        writer.log(step, {"train/loss": 2.1, "train/grad_norm": 0.4})
    reader = SeriesReader(run / "monitor")
    window = reader.read("train/loss", points=1500)

A reader is a still picture; ``refresh`` takes in what was written since, by any process. Of a step that was
logged twice (a run that was resumed) the later value counts, per series. Nothing is ever left out of a picture:
a window of fewer points than steps has the lowest and the highest value of the steps that each point stands for.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.errors import RunError, did_you_mean
from deepseek.monitor.block import Array, Block
from deepseek.monitor.newest import Latest, newest
from deepseek.monitor.piece import ArrayPiece, Piece, in_order, until, without
from deepseek.monitor.recent import Row, recent
from deepseek.monitor.segment import Segment
from deepseek.monitor.tail import TailView
from deepseek.monitor.window import Part, Window, cell_window, joined, raw, raw_window
from deepseek.monitor.writer import SeriesWriter


class SeriesReader:
    """Reads the series in ``directory`` (of a run: ``RUN/monitor``), while they are written or afterwards.

    Threads may share a reader. Damaged files are left out and counted in ``damaged``. A directory that does not
    exist has no series.

    Raises:
        RunError: ``directory`` is a file, or may not be read.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._lock = threading.RLock()
        self._segments: dict[str, Segment] = {}
        self._pieces_of: dict[str, tuple[int, list[Piece]]] = {}
        self._merged: dict[str, dict[tuple[Any, ...], ArrayPiece]] = {}
        self._latest: dict[str, Latest] = {}
        self._state, self._latest_state = 0, -1
        self.refresh()

    @property
    def damaged(self) -> int:
        """Blocks, tails and names that could not be read."""
        return sum(s.damaged + s.missing() for s in self._segments.values())

    @property
    def version(self) -> int:
        """Rises whenever ``refresh`` finds something new."""
        return self._state

    def refresh(self) -> bool:
        """Take in what was written since; whether there was anything."""
        with self._lock:
            for _ in range(10):
                try:
                    changed = self._scan()
                    break
                except FileNotFoundError:  # a tail was sealed between the listing and the reading
                    continue
            else:
                changed = True
            self._state += changed
            self._release()
            return changed

    def names(self) -> list[str]:
        """Every series, in the order in which they appeared."""
        with self._lock:
            return list(dict.fromkeys(name for s in self._in_time() for name in s.names))

    def last(self) -> dict[str, float]:
        """The newest value of every series."""
        return {name: latest.value for name, latest in self.latest().items()}

    def latest(self) -> dict[str, Latest]:
        """The newest value of every series, with its step and Unix time."""
        with self._lock:
            if self._latest_state != self._state:
                self._latest = newest(self._in_time(), self._rewinds, self._visible)
                self._latest_state = self._state
                self._release()
            return dict(self._latest)

    def steps(self) -> tuple[int, int]:
        """The first and the last step of anything logged; ``(0, -1)`` if nothing was."""
        with self._lock:
            found = [chunk.steps[self._kept(s, chunk)] for s in self._in_time() for chunk in s.chunks()]
            found = [steps for steps in found if len(steps)]
            self._release()
            return (min(int(s.min()) for s in found), max(int(s.max()) for s in found)) if found else (0, -1)

    def read(
        self, name: str, start: int | None = None, stop: int | None = None, points: int = 1500
    ) -> Window:
        """A series from step ``start`` to step ``stop`` (both included) as at most ``points`` points.

        Raises:
            RunError: there is no such series, or ``points`` is less than 1.
        """
        if points < 1:
            raise RunError(f"points={points}: a window has at least one point")
        with self._lock:
            parts = self._range(name, start, stop)
            total = sum(b - a for _, a, b in parts)
            window = raw_window(parts) if total <= points else cell_window(parts, total, points)
            self._release()
            return window

    def raw(self, name: str, start: int | None = None, stop: int | None = None) -> tuple[Array, Array]:
        """Steps (int64) and values (float32) as they were logged, from ``start`` to ``stop``, both included.

        Raises:
            RunError: there is no such series.
        """
        with self._lock:
            steps, values = raw(self._range(name, start, stop))
            self._release()
            return steps, values

    def times(self, name: str, start: int | None = None, stop: int | None = None) -> tuple[Array, Array]:
        """Steps (int64) and the Unix times (float64) at which a series was logged, both ends included.

        Raises:
            RunError: there is no such series.
        """
        with self._lock:
            parts = self._range(name, start, stop)
            steps = [p.steps()[a:b] for p, a, b in parts]
            times = [p.times()[a:b] for p, a, b in parts]
            self._release()
            return joined(steps, np.int64), joined(times, np.float64)

    def rows(self, start: int, limit: int = 1000) -> list[Row]:
        """Rows from step ``start`` on, the last ``limit`` of them, for who follows a run.

        The newest row may grow: ask again from its step to see what was added.
        """
        with self._lock:
            chunks = [(s, c) for s in self._in_time() for c in s.chunks() if c.last_step >= start]
            found = recent(((s, chunk, self._kept(s, chunk)) for s, chunk in chunks), start, limit)
            self._release()
            return found

    def verify(self) -> int:
        """Read everything and compare it with its checksums; the number of columns that do not match."""
        with self._lock:
            wrong = 0
            for segment in self._segments.values():
                for block in segment.blocks:
                    wrong += sum(not block.intact(entry) for entry in block.directory)
            self._release()
            return wrong

    def writers(self) -> list[dict[str, Any]]:
        """Who wrote: ``created``, ``pid``, ``host`` and ``label`` of every segment, in time."""
        with self._lock:
            return [dict(segment.facts) for segment in self._in_time()]

    def _scan(self) -> bool:
        stems, tails = set[str](), dict[str, dict[int, Path]]()
        for name in self._listing():
            stem, _, kind = name.rpartition(".")
            if not stem or stem.startswith("."):
                continue
            if kind == "journal":
                stems.add(stem)
            elif kind.startswith("tail-") and kind[5:].isdigit():
                tails.setdefault(stem, {})[int(kind[5:])] = self.directory / name
        changed = False
        for stem in sorted(stems):
            if stem not in self._segments:
                self._segments[stem] = Segment(self.directory, stem)
            changed |= self._segments[stem].refresh(tails.get(stem, {}))
        return changed

    def _listing(self) -> list[str]:
        try:
            return [path.name for path in self.directory.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{self.directory} cannot be read: {error.strerror or error}") from error

    def _in_time(self) -> list[Segment]:
        return [self._segments[stem] for stem in sorted(self._segments)]

    def _release(self) -> None:
        for segment in self._segments.values():
            segment.release()

    def _rewinds(self, segment: Segment, chunk: Block | TailView) -> list[tuple[int, float]]:
        """Steps after which what a chunk says is void if it was logged until the time beside it."""
        return [
            (rewind.step, float("inf") if other is segment else rewind.time)
            for other in self._segments.values()
            for rewind in other.rewinds
            if (chunk.index < rewind.block if other is segment else chunk.first_time <= rewind.time)
        ]

    def _kept(self, segment: Segment, chunk: Block | TailView) -> Array:
        """Which rows of a chunk are not void, bool [R]."""
        keep = np.ones(len(chunk.steps), bool)
        for step, time in self._rewinds(segment, chunk):
            keep &= (chunk.steps <= step) | (chunk.times > time)
        return keep

    def _visible(self, segment: Segment, index: int, piece: Piece) -> Piece | None:
        """What is left of a piece when the run went back."""
        found: Piece | None = piece
        for other in self._segments.values():
            for rewind in other.rewinds:
                if found is None or found.last <= rewind.step:
                    continue
                if other is segment:
                    found = until(found, rewind.step) if index < rewind.block else found
                elif found.last_time <= rewind.time:
                    found = until(found, rewind.step)
                elif found.first_time <= rewind.time:
                    found = without(found, rewind.step, rewind.time)
        return found

    def _pieces(self, name: str) -> list[Piece]:
        state, pieces = self._pieces_of.get(name, (-1, []))
        if state == self._state:
            return pieces
        found, known = list[Piece](), False
        for segment in self._in_time():
            known = known or name in segment.names
            visible = (self._visible(segment, index, p) for index, p in segment.pieces(name))
            found += [p for p in visible if p is not None]
        if not known:
            raise RunError(f"{self.directory} has no series '{name}'{did_you_mean(name, self.names())}")
        pieces = in_order(found, self._merged.setdefault(name, {}))
        self._pieces_of[name] = self._state, pieces
        return pieces

    def _range(self, name: str, start: int | None, stop: int | None) -> list[Part]:
        """The pieces from ``start`` to ``stop``, and which of their values."""
        parts = []
        for piece in self._pieces(name):
            if (start is not None and piece.last < start) or (stop is not None and piece.first > stop):
                continue
            a = 0 if start is None or start <= piece.first else piece.find(start)
            b = piece.count if stop is None or stop >= piece.last else piece.find(stop, after=True)
            if a < b:
                parts.append((piece, a, b))
        return parts


__all__ = ["Latest", "Row", "SeriesReader", "SeriesWriter", "Window"]
