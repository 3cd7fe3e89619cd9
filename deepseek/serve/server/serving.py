"""The server itself: uvicorn around the application, with an end that drops nobody and a beginning that waits for none.

What uvicorn lacks: a drain in which ``/ready`` already says no while answers finish, and what ``Protocol`` adds.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from deepseek.serve.server.app import application
from deepseek.serve.server.connection import Protocol, allow_connections
from deepseek.serve.server.front import Front
from deepseek.serve.server.guard import HEAD_BYTES
from deepseek.serve.server.page import Page

LINGER = 2.0  #: seconds for the last bytes to leave after the last answer
LAST_WORDS = 1.0  #: seconds for running answers to say that they end, after the second signal


class Server(uvicorn.Server):
    """Runs ``front`` until a signal. The first lets running requests finish, the second ends them, with an error.

    Attributes:
        killed: the signal that ended it at once, or 0.
    """

    def __init__(
        self, front: Front, page: Page | None = None, started: Callable[[], None] | None = None
    ) -> None:
        self.front, self._started = front, started
        limits = front.config
        protocol = type("Protocol", (Protocol,), {"head_seconds": limits.body_seconds})
        config = uvicorn.Config(
            application(front, page), http=protocol, ws="none", log_level="critical", access_log=False,
            server_header=False, proxy_headers=False, lifespan="on", timeout_keep_alive=int(limits.keep_alive),
            h11_max_incomplete_event_size=HEAD_BYTES, timeout_graceful_shutdown=max(1, int(LINGER)),
        )  # fmt: skip
        super().__init__(config)
        self.killed = 0
        self._drain: asyncio.Task[None] | None = None
        self._end: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self.front.keys.read_on_hangup()
        allow_connections()
        await super().startup(sockets)
        if self.started and self._started is not None:
            self._started()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal came. Nothing is raised again afterwards: an end that was asked for is a good end."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.stop, sig)
        else:
            self.should_exit = True

    def stop(self, sig: int = 0) -> None:
        """Drain and end; asked again, end at once. From the loop's own thread."""
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._drained())
        elif self._end is None:
            self.killed = sig
            self._drain.cancel()
            self._end = asyncio.ensure_future(self._ended())

    async def _drained(self) -> None:
        front = self.front
        front.admission.draining = True
        end = time.monotonic() + front.config.drain
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(front.admission.emptied(), front.config.drain or 0.001)
        await front.client.drain(max(0.0, end - time.monotonic()))
        self.should_exit = True

    async def _ended(self) -> None:
        """Whoever waits is told in their answer."""
        with contextlib.suppress(asyncio.TimeoutError):
            await self.front.client.drain(0.0)
            await asyncio.wait_for(self.front.admission.emptied(), LAST_WORDS)
        self.should_exit = self.force_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.force_exit:
            for connection in list(self.server_state.connections):
                stuck = connection.transport.get_write_buffer_size()
                (connection.transport.abort if stuck else connection.transport.close)()
        await super().shutdown(sockets)
