"""A server-sent event stream: chunks as ``data:`` lines, a comment where it is silent for long, an end to dead readers.

Nothing is queued here. ``send`` waits while the connection's buffer is full, meanwhile the engine's outputs are joined
where they wait, so a slow reader gets fewer and larger chunks; one that takes nothing for long is cut off.
Format: the HTML standard's server-sent events; an answer ends with ``data: [DONE]`` as the OpenAI API does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

Send = Callable[[Any], Awaitable[None]]

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
]  # fmt: skip
BEAT = b": the model is working\n\n"
DONE = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    return b"data: " + orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS) + b"\n\n"


class Stream:
    """One answer on its way to one reader, written by one task.

    Attributes:
        started: the status and the headers are out.
        cut: it was ended because the reader takes nothing.
    """

    def __init__(self, send: Send) -> None:
        self._send, self._task = send, asyncio.current_task()
        self._sending: float | None = None
        self._told = time.monotonic()
        self._lock = asyncio.Lock()
        self._beating: asyncio.Task[None] | None = None
        self.started = self.cut = False

    async def start(self) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})

    async def write(self, data: bytes, more: bool = True) -> None:
        async with self._lock:
            self._sending = time.monotonic()
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
            self._told, self._sending = time.monotonic(), None

    async def finish(self) -> None:
        await self.write(DONE, more=False)

    def look(self, now: float, beat: float, stalled: float) -> None:
        """Called once a second, from outside the task that writes."""
        if not self.started or self.cut:
            return
        if self._sending is not None:
            if now - self._sending > stalled and self._task is not None:
                self.cut = True
                self._task.cancel()
        elif now - self._told > beat:
            self._beating = asyncio.create_task(self._beat())

    def close(self) -> None:
        if self._beating is not None:
            self._beating.cancel()

    async def _beat(self) -> None:
        await self.write(BEAT)
