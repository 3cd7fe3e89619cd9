"""``EventLog``: what a growing ``events.jsonl`` has to say, read once and then only its new lines.

A long run's file is almost wholly training steps, whose numbers the run store has in a better form. They are told by
their name and not parsed; of each such kind only the last line is kept. Everything rare is kept in full.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from threading import Lock

from deepseek.monitor.history import EventDict, parse_line

FREQUENT = frozenset({b"train", b"probe", b"ranks", b"data"})  #: events of every step or nearly so
KEY = b'"event": "'
CHUNK = 8 << 20


class EventLog:
    """The events of one file. Thread-safe; ``refresh`` before you read.

    Attributes:
        rare: every event that is not of a frequent kind, in file order.
        unreadable: complete lines that are no events.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._reset()

    def _reset(self) -> None:
        self.rare: list[EventDict] = []
        self.unreadable = 0
        self._last: dict[bytes, deque[bytes]] = {}
        self._offset, self._rest, self._inode = 0, b"", -1

    def refresh(self) -> list[EventDict]:
        """Read what was added; returns the new rare events. A file that shrank or was replaced is read anew.

        Raises:
            OSError: the file is gone or cannot be read.
        """
        with self._lock:
            status = self.path.stat()
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._reset()
                self._inode = status.st_ino
            if status.st_size == self._offset:
                return []
            before = len(self.rare)
            with self.path.open("rb") as file:
                file.seek(self._offset)
                while chunk := file.read(CHUNK):
                    self._offset += len(chunk)
                    self._take(chunk)
            return self.rare[before:]

    def last(self, name: str) -> EventDict:
        """The newest readable event called ``name``, or an empty one."""
        if name.encode() in FREQUENT:
            found = (parse_line(line) for line in reversed(self._last.get(name.encode(), ())))
            return next((event for event in found if event is not None), {})
        return next((event for event in reversed(self.rare) if event["event"] == name), {})

    def named(self, name: str) -> list[EventDict]:
        """Every event of a rare kind called ``name``."""
        return [event for event in self.rare if event["event"] == name]

    def _take(self, chunk: bytes) -> None:
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()  # a line that is still being written
        for line in lines:
            start = line.rfind(KEY) + len(KEY)
            name = line[start : line.find(b'"', start)]
            if start >= len(KEY) and name in FREQUENT:
                self._last.setdefault(name, deque(maxlen=4)).append(line)
            elif line.strip():
                event = parse_line(line)
                if event is None:
                    self.unreadable += 1
                else:
                    self.rare.append(event)
