"""The access log: one JSON line a request, with its sizes and times and without a word of what was said.

Lines are written by a thread: a terminal or a pipe that nobody reads must not stop the event loop. A writer that cannot
follow loses lines, and says how many.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

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
        self.lost = 0
        self._lines: queue.Queue[bytes | None] = queue.Queue(MOST)
        self._file: TextIO | None = None
        self._thread: threading.Thread | None = None
        if not where:
            return
        try:
            self._file = sys.stderr if where == "-" else Path(where).open("a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"cannot write the access log {where}: {error.strerror or error}") from None
        self._owned = where != "-"
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
        if self._owned and self._file is not None and not self._thread.is_alive():
            self._file.close()
        self._thread = None

    def _write(self) -> None:
        told, file = 0, self._file
        assert file is not None
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError, ValueError):  # the reader has gone, the disk is full
                if self.lost > told:
                    file.write(f'{{"lost_lines": {self.lost - told}}}\n')
                    told = self.lost
                file.write(line.decode() + "\n")
                if self._lines.empty():
                    file.flush()
