"""The access log: one JSON line a request, with its sizes and times and without a word of what was said.

Lines are written by a thread: a terminal or a pipe that nobody reads must not stop the event loop. A writer that cannot
follow, or whose disk is full, loses lines, and says how many as soon as it can. A line of a file is one write at its
end, so several processes may share the file.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path
from typing import Any

import orjson

from deepseek.errors import ConfigError

MOST = 10_000  #: lines that may wait to be written


@dataclass
class Record:
    """What is known of one HTTP request; the handlers fill it in as they learn it. Times are ``time.monotonic``."""

    id: str
    method: str = ""
    route: str = ""
    key: str = ""
    model: str = ""
    status: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finish: str = ""
    began: float = field(default_factory=time.monotonic)
    first: float | None = None  # the first token

    def line(self) -> bytes:
        now = time.monotonic()
        told: dict[str, Any] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "request_id": self.id, "method": self.method, "route": self.route, "status": self.status,
            "seconds": round(now - self.began, 4),
        }  # fmt: skip
        told |= {"key": self.key} if self.key else {}
        if self.model:
            told |= {
                "model": self.model, "prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens,
                "generated_tokens": self.generated_tokens, "finish": self.finish,
                "ttft": None if self.first is None else round(self.first - self.began, 4),
            }  # fmt: skip
        return orjson.dumps(told)


class AccessLog:
    """Writes records to ``where``: '-' for standard error, a file, or '' for nowhere."""

    def __init__(self, where: str) -> None:
        self.lost = 0  # of a full queue
        self._unwritten = 0  # lines that the file did not take
        self._torn = False  # it has a part of the last one
        self._lines: queue.Queue[bytes | None] = queue.Queue(MOST)
        self._file: FileIO | None = None  # standard error unless told
        self._thread: threading.Thread | None = None
        if not where:
            return
        try:
            self._file = None if where == "-" else Path(where).open("ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"cannot write the access log {where}: {error.strerror or error}") from None
        self._thread = threading.Thread(target=self._write, name="deepseek-access-log", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        if self._thread is None:
            return
        try:
            self._lines.put_nowait(record.line())
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Write what waits, for a few seconds at most."""
        if self._thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=1)
        self._thread.join(3)
        if self._file is not None and not self._thread.is_alive():
            with contextlib.suppress(OSError):
                self._file.close()
        self._thread = None

    def _write(self) -> None:
        told = 0
        while (line := self._lines.get()) is not None:
            try:
                if (lost := self.lost + self._unwritten) > told:
                    self._append(b'{"lost_lines": %d}' % (lost - told))
                    told = lost
                self._append(line)
            except (OSError, ValueError):  # the reader has gone, the disk is full
                self._unwritten += 1

    def _append(self, line: bytes) -> None:
        """Raises ``OSError`` where not all of it is written."""
        if self._file is None:
            print(line.decode(), file=sys.stderr, flush=True)
            return
        data = (b"\n" if self._torn else b"") + line + b"\n"
        if written := self._file.write(data):
            self._torn = written < len(data)
        if written != len(data):
            raise OSError("the disk is full")
