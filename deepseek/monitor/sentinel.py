"""``Sentinel``: tells when a run dies or falls silent, which the run itself cannot.

A run's own watch sees everything but its own death: a process that the kernel killed for memory sends no alert. The
dashboard is another process and sees it within seconds.
"""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepseek.errors import DeepseekError
from deepseek.monitor.alerts import Courier, Receiver
from deepseek.monitor.library import Library
from deepseek.monitor.units import duration

INTERVAL = 5.0  #: seconds between two looks
SILENCE = 900.0  #: seconds without a row or an event after which a living run counts as silent


class Sentinel:
    """Looks after the runs of ``library`` from a thread, and tells ``receivers`` of those that stop being at work.

    Runs that had ended before it came are none of its business. Use as a context manager.

    Args:
        failed: is told why an alert was given up.
    """

    def __init__(
        self,
        library: Library,
        receivers: Sequence[Receiver],
        *,
        interval: float = INTERVAL,
        silence: float = SILENCE,
        failed: Callable[[str], None] | None = None,
    ) -> None:
        self.library, self.interval, self.silence = library, interval, silence
        self.courier = Courier(receivers, failed=failed)
        self._known: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deepseek-sentinel", daemon=True)

    def __enter__(self) -> Sentinel:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)
        self.courier.close()

    def look(self) -> list[dict[str, Any]]:
        """What is to be told now; each thing once."""
        return [told for name in self.library.ids() if (told := self._judge(name)) is not None]

    def _judge(self, name: str) -> dict[str, Any] | None:
        try:
            run = self.library.run(name)
            summary = run.summary()
        except (OSError, DeepseekError, sqlite3.Error):
            return None
        state, quiet = str(summary["status"]), time.time() - (summary["updated"] or time.time())
        if state == "running" and quiet > self.silence:
            state = "silent"
        before, self._known[name] = self._known.get(name), state
        if before == state or state not in ("crashed", "silent") or before not in ("running", "silent"):
            return None
        words = "its process is gone" if state == "crashed" else f"nothing for {duration(quiet)}"
        return self._payload(run.path, summary, state, words)

    def _payload(self, path: Path, summary: dict[str, Any], kind: str, words: str) -> dict[str, Any]:
        step = summary["step"]
        where = summary["name"] + (f", step {step:,}" if step is not None else "")
        keys = ("step", "total_steps", "started", "updated")
        return {
            "version": 1, "type": "run", "kind": kind, "severity": "critical", "run": summary["name"],
            "text": f"[critical] {where}: {kind}, {words}", "directory": str(path.resolve()),
            "host": socket.gethostname(), "time": time.time(), **{key: summary[key] for key in keys},
        }  # fmt: skip

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            with contextlib.suppress(Exception):  # it must not end before the server does
                for payload in self.look():
                    self.courier.offer(payload)
