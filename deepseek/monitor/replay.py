"""``Replay``: a series store for a run that has only ``events.jsonl``, kept in a cache beside no run.

Runs from before there were stores, and runs that keep none, are read once; what their file grows by is added. The
cache is a directory of the user's, named after the run's path. A process that dies in the middle costs nothing: what
it had read is read again, and of a step that is there twice the later counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek.errors import DeepseekError
from deepseek.events import Event
from deepseek.files import InUse, claimed, write_atomic
from deepseek.monitor.history import EventDict, parse_line
from deepseek.monitor.rows import RowMaker
from deepseek.monitor.series import SeriesWriter
from deepseek.monitor.units import finite

CHUNK = 4 << 20
AT_ONCE = 4 << 20  #: bytes that are read while somebody waits; more are read by a thread
STATE, LOCK = "replayed.json", ".replaying"
HUGE = 3e38  #: beyond it a float32 overflows

log = logging.getLogger(__name__)


def cache_root() -> Path:
    """Where rebuilt stores are kept: ``$XDG_CACHE_HOME/deepseek/monitor``, or a temporary place if that is closed."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(base) / "deepseek" / "monitor"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK):
            return root
    except OSError:
        pass
    return Path(tempfile.gettempdir()) / f"deepseek-monitor-{os.getuid() if hasattr(os, 'getuid') else 0}"


class Replay:
    """Keeps ``directory``, a store, up to date with the events at ``path``. One process at a time writes it."""

    def __init__(self, path: Path, cache: Path | None = None) -> None:
        self.path = path
        digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=12).hexdigest()
        self.directory = (cache or cache_root()) / digest
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._writer: SeriesWriter | None = None
        self._rows = RowMaker()
        self._held, self._closing = contextlib.ExitStack(), False

    @property
    def busy(self) -> bool:
        """Whether a thread is still reading the file."""
        return self._thread is not None and self._thread.is_alive()

    def catch_up(self) -> None:
        """Take in what is new. A long file is read by a thread: look again later.

        Raises:
            OSError: the file is gone, or the cache cannot be written.
        """
        if self.busy:
            return
        state = self._state()
        status = self.path.stat()
        fresh = state.get("inode") == status.st_ino and state.get("offset", 0) <= status.st_size
        start = int(state["offset"]) if fresh else 0
        if start == status.st_size:
            return
        if status.st_size - start <= AT_ONCE:
            self._replay(start, status.st_ino)
        else:
            self._thread = threading.Thread(target=self._quietly, args=(start, status.st_ino), daemon=True)
            self._thread.start()

    def _quietly(self, start: int, inode: int) -> None:
        try:
            self._replay(start, inode)
        except (OSError, DeepseekError) as error:
            log.warning("the series of %s cannot be rebuilt: %s", self.path.parent, error)

    def _replay(self, start: int, inode: int) -> None:
        with self._lock:
            writer = self._own(anew=start == 0)
            if writer is None:  # another dashboard does it
                return
            for end, lines in _lines(self.path, start):
                for line in lines:
                    log_event(writer, self._rows, parse_line(line))
                state = {"run": str(self.path.parent), "inode": inode, "offset": end}
                write_atomic(self.directory / STATE, json.dumps(state))
                if self._closing:
                    return

    def _own(self, anew: bool) -> SeriesWriter | None:
        """The one writer of the cache, which this process keeps; ``None`` if another process has it."""
        if self._writer is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                self._held.enter_context(claimed(self.directory / LOCK))
            except InUse:
                return None
            self._writer = self._held.enter_context(SeriesWriter(self.directory, label="replay"))
        if anew:
            self._writer.close()
            for old in self.directory.glob("[!.]*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        return self._writer

    def close(self) -> None:
        """Seal what was read, and let other processes go on."""
        self._closing = True
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            self._writer = None
            self._held.close()
            self._held = contextlib.ExitStack()

    def _state(self) -> dict[str, Any]:
        try:
            found = json.loads((self.directory / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("offset"), int) else {}


def log_event(writer: SeriesWriter, rows: RowMaker, event: EventDict | None) -> None:
    """Log what an event says in numbers; a run that went back makes the later steps void."""
    if event is None or (step := finite(event.get("step"))) is None:
        return
    name, when = event["event"], finite(event.get("time"))
    if name == "resume" or (name == "run" and finite(event.get("resumed_from")) is not None):
        writer.rewind(int(step), when)
    values = {key: _revived(value) for key, value in event.items() if key not in ("event", "step", "time")}
    try:
        row = rows(Event(name, int(step), values))
        if row:
            writer.log(int(step), row, when)
    except (TypeError, ValueError, AttributeError):  # nonsense where numbers belong costs its own event
        return


def _revived(value: Any) -> Any:
    """Numbers that JSON lacks, from the texts that stand for them."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else value
    if isinstance(value, float):
        return math.copysign(math.inf, value) if abs(value) > HUGE else value
    if isinstance(value, list):
        return [_revived(v) for v in value]
    return {k: _revived(v) for k, v in value.items()} if isinstance(value, dict) else value


def _lines(path: Path, start: int) -> Iterator[tuple[int, list[bytes]]]:
    """Whole lines from ``start`` on, in chunks, each with the offset at which it ends."""
    with path.open("rb") as file:
        file.seek(start)
        rest = b""
        while chunk := file.read(CHUNK):
            whole = rest + chunk
            cut = whole.rfind(b"\n") + 1
            rest = whole[cut:]
            if cut:
                yield file.tell() - len(rest), whole[:cut].splitlines()
