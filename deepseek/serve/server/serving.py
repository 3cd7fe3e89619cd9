"""The server itself: uvicorn around the application, with an end that drops nobody and a beginning that waits for none.

What uvicorn lacks: a limit on how long a request's head may take, errors of the protocol in OpenAI's shape, an abrupt
end for a connection whose reader is stuck, and a drain in which ``/ready`` already says no while answers finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deepseek.serve.server.app import application
from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.exchange import ABORT
from deepseek.serve.server.front import Front
from deepseek.serve.server.guard import HEAD_BYTES
from deepseek.serve.server.page import Page

LINGER = 2.0  #: seconds for the last bytes to leave after the last answer


class Protocol(H11Protocol):
    """A connection."""

    head_seconds = 30.0
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_head()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.scope
        super().handle_events()
        if self.scope is not before:
            cast("dict[str, Any]", self.scope)[ABORT] = self.transport.abort
            self._have_head()
        elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._await_head()

    def timeout_keep_alive_handler(self) -> None:
        """Whoever has not even taken the last answer would hold the connection for ever."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """As ``H11Protocol``'s, with a body like all others."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = ApiError("this is no HTTP request that can be read, or its head is too large").encoded()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _await_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self._late)

    def _have_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _late(self) -> None:
        self._head = None
        self.transport.abort()


class Server(uvicorn.Server):
    """Runs ``front`` until a signal. The first lets running requests finish, the second ends at once."""

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
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and self._started is not None:
            self._started()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal came. Nothing is raised again afterwards: an end that was asked for is a good end."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.stop)
        else:
            self.should_exit = True

    def stop(self) -> None:
        """Drain and end; asked again, end at once. From the loop's own thread."""
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._drained())
        else:
            self._drain.cancel()
            self.should_exit = self.force_exit = True

    async def _drained(self) -> None:
        front = self.front
        front.admission.draining = True
        end = time.monotonic() + front.config.drain
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(front.admission.emptied(), front.config.drain or 0.001)
        await front.client.drain(max(0.0, end - time.monotonic()))
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.force_exit:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        await super().shutdown(sockets)
