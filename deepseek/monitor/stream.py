"""The live stream of a run: one ``Follower`` reads its files, any number of clients read the follower.

The run is another process; its files are looked at five times a second. What is new becomes messages, encoded once
and kept in a ring. A client has only a place in the ring, so that a thousand clients cost a thousand places and not a
thousand queues. A client that reads too slowly falls out of the ring: it gets the event ``gap``, which tells it to
fetch the windows anew, and goes on with the newest message. Nothing waits for anybody.

Server-sent events as in the HTML standard: ``id`` counts the messages, and a client that reconnects with
``Last-Event-ID`` goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import numpy as np

from deepseek.errors import RunError
from deepseek.monitor.follow import RowFollower
from deepseek.monitor.openrun import OpenRun, light
from deepseek.monitor.wire import encode

INTERVAL = 0.2  #: seconds between two looks at the files
STATUS_INTERVAL = 1.0  #: seconds between two looks at the run as a whole
RING = 512  #: messages that a slow client may lag behind
RING_BYTES = 8 << 20
HEARTBEAT = 15.0  #: seconds of silence after which a comment is sent, so that proxies keep the connection
STALLED = 60.0  #: seconds after which a client that takes nothing is dropped
BATCH = 8  #: rows of one look that are sent one by one; more become one row with extremes

BACK = frozenset({"resume", "rollback"})  #: events after which steps are done again
ELSEWHERE = frozenset({"incident", "action"})  #: events that the store tells better

log = logging.getLogger(__name__)


class Message(NamedTuple):
    """One server-sent event, ready to send."""

    number: int
    data: bytes


class Follower:
    """Follows one run while anybody listens."""

    def __init__(self, run: OpenRun, limiter: anyio.CapacityLimiter) -> None:
        self.run, self._limiter = run, limiter
        self.listeners, self.closed = 0, False
        self.status: dict[str, Any] = {}  # the newest, for those who come later
        self._ring: deque[Message] = deque()
        self._bytes, self._number = 0, int(time.time() * 1000)  # numbers of an earlier follower are older
        self._more = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._watch = Watcher(run)

    @contextlib.contextmanager
    def listening(self) -> Any:
        """For the length of a client's stay."""
        self.listeners += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._follow())
        try:
            yield self
        finally:
            self.listeners -= 1
            if self.listeners == 0 and self._task is not None:
                self._task.cancel()

    def close(self) -> None:
        """Let every client's answer end."""
        self.closed = True
        self._more.set()

    @property
    def newest(self) -> int:
        return self._number

    async def after(self, number: int, timeout: float) -> list[Message] | None:
        """The messages after ``number``, as soon as there are some; ``[]`` after ``timeout`` seconds without.

        ``None``: ``number`` has left the ring.
        """
        if number >= self._number and not self.closed:
            more = self._more
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(more.wait(), timeout)
        if self._ring and number < self._ring[0].number - 1:
            return None
        return [m for m in self._ring if m.number > number]

    async def _follow(self) -> None:
        while True:
            try:
                found = await anyio.to_thread.run_sync(self._watch.look, limiter=self._limiter)
            except Exception as error:  # a run that vanished or is damaged may come back
                log.debug("cannot follow %s: %s", self.run.path, error)
                found = self._watch.lost(error)
            for kind, content in found:
                self._add(kind, content)
            if found:
                self._more.set()
                self._more = asyncio.Event()
            await asyncio.sleep(INTERVAL)

    def _add(self, kind: str, content: Any) -> None:
        self._number += 1
        self.status = content if kind == "status" else self.status
        data = b"id: %d\nevent: %s\ndata: %s\n\n" % (self._number, kind.encode(), encode(content))
        self._ring.append(Message(self._number, data))
        self._bytes += len(data)
        while len(self._ring) > 1 and (len(self._ring) > RING or self._bytes > RING_BYTES):
            self._bytes -= len(self._ring.popleft().data)


class Watcher:
    """What is new in a run since the last ``look``, as ``(event, content)`` pairs."""

    def __init__(self, run: OpenRun) -> None:
        self.run = run
        self._rows_of: RowFollower | None = None
        self._told_events: int | None = None
        self._stamp: tuple[int, ...] = ()
        self._known: dict[tuple[str, str], bytes] | None = None
        self._status: dict[str, Any] = {}
        self._told = -STATUS_INTERVAL
        self._lost = ""

    def look(self) -> list[tuple[str, Any]]:
        """Raises what reading the run's files raises."""
        found = [*self._rows(), *self._events(), *self._journal()]
        now = time.monotonic()
        if now - self._told < STATUS_INTERVAL and not self._lost:
            return found
        try:
            status = {k: v for k, v in self.run.summary().items() if k != "spark"}
        except Exception as error:
            return found + self.lost(error)  # what was found before is told all the same
        if status != self._status or self._lost:
            found.append(("status", status))
        self._status, self._told, self._lost = status, now, ""
        return found

    def _events(self) -> list[tuple[str, Any]]:
        """Rare events that are new: a checkpoint, an evaluation, the end. After a run went back, a gap."""
        rare = self.run.log.rare
        before, self._told_events = self._told_events, len(rare)
        if before is None or before > len(rare):
            return []
        new = [e for e in rare[before:] if e["event"] not in ELSEWHERE]
        back: list[tuple[str, Any]] = [("gap", {"reason": e["event"]}) for e in new if e["event"] in BACK]
        return [("event", event) for event in new] + back[:1]

    def _journal(self) -> list[tuple[str, Any]]:
        """Incidents and actions that are new or have changed; at the first look, none."""
        stamp = self.run.stamp()
        if stamp == self._stamp:
            return []
        self._stamp = stamp
        try:
            found: list[tuple[str, Any]] = [("incident", light(i)) for i in self.run.incidents()]
            found += [("action", command.to_dict()) for command in self.run.store.commands()]
        except RunError:  # the status tells; rows go on
            return []
        texts = {(kind, str(content["id"])): encode(content) for kind, content in found}
        before, self._known = self._known, texts
        if before is None:
            return []
        return [pair for pair, (key, text) in zip(found, texts.items()) if before.get(key) != text]

    def lost(self, error: Exception) -> list[tuple[str, Any]]:
        """What to say, once, when the run cannot be read."""
        if self._lost == str(error):
            return []
        self._lost = str(error)
        return [("status", {"id": self.run.name, "status": "gone", "error": str(error)})]

    def _rows(self) -> list[tuple[str, Any]]:
        self.run.refresh()
        reader = self.run.reader
        if self._rows_of is None or self._rows_of.reader is not reader:
            self._rows_of = RowFollower(reader)
        news = self._rows_of.look()
        gap: list[tuple[str, Any]] = [("gap", {"reason": "the run went back"})] if news.rewound else []
        return gap + row_messages([(row.step, row.values) for row in news.rows])


def row_messages(rows: list[tuple[int, dict[str, float]]]) -> list[tuple[str, Any]]:
    """``row`` events for new rows. Of many, one: the newest values, and with them the extremes of each series."""
    if len(rows) <= BATCH:
        return [("row", _row(step, values)) for step, values in rows]
    last: dict[str, float] = {}
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for _, values in rows:
        for name, value in values.items():
            last[name] = value
            low[name] = min(value, low.get(name, value))
            high[name] = max(value, high.get(name, value))
    return [
        ("row", {**_row(rows[-1][0], last), "first": rows[0][0], "low": _short(low), "high": _short(high)})
    ]


def _row(step: int, values: dict[str, float]) -> dict[str, Any]:
    odd = {name: str(value) for name, value in values.items() if value - value != 0}
    return {"step": step, "values": _short(values), **({"nonfinite": odd} if odd else {})}


def _short(values: dict[str, float]) -> dict[str, Any]:
    """As float32, which they are: their text is half as long."""
    return {name: np.float32(value) for name, value in values.items()}


class EventStream:
    """An ASGI response: the messages of a follower, for as long as the client stays."""

    def __init__(self, follower: Follower, last_id: str = "") -> None:
        self.follower = follower
        self.start = int(last_id) if last_id.isdigit() and len(last_id) < 19 else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self.follower.listening():
            pump = asyncio.create_task(self._pump(send))
            left = asyncio.create_task(_disconnected(receive))
            try:
                await asyncio.wait({pump, left}, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                pass  # the server ends, and with it this answer
            finally:
                pump.cancel()
                left.cancel()
                await asyncio.wait({pump, left})

    async def _pump(self, send: Any) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store, no-transform"),
            (b"x-accel-buffering", b"no"),
        ]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        at = self.follower.newest if self.start is None else min(self.start, self.follower.newest)
        data = b"retry: 2000\n: following\n\n"
        if self.follower.status:
            data += b"event: status\ndata: %s\n\n" % encode(self.follower.status)
        while not self.follower.closed:
            message = {"type": "http.response.body", "body": data, "more_body": True}
            await asyncio.wait_for(send(message), STALLED)
            found = await self.follower.after(at, HEARTBEAT)
            if found is None:
                at = self.follower.newest
                data = b"id: %d\nevent: gap\ndata: {}\n\n" % at
            elif found:
                at, data = found[-1].number, b"".join(m.data for m in found)
            else:
                data = b": beat\n\n"
        await send({"type": "http.response.body", "body": b""})


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
