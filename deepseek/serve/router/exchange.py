"""``Exchange``: one HTTP/1.1 request to one replica, over a connection of its own.

A connection is used once: it costs a fraction of a millisecond and nothing is ever lost on one that was closed a moment
before. The kernel asks whether the replica's machine is still there (``KEEPALIVE``), so one that is gone without a word
is known to be long before ``silence`` is over. The body is held back until the replica asks for it (``Expect:
100-continue``, RFC 9110 §10.1.1), so until then it is certain that the replica has not begun, whatever happens. One
that never asks gets its body after ``patience`` and is not made to ask again.

The protocol is h11's, which uvicorn brings.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from deepseek.serve.router.replica import Replica

PIECE = 1 << 16  #: bytes read at once
PATIENCE = 5.0  #: seconds to wait for `100 Continue`
CONNECTING = 2.0  #: seconds to wait for a connection, TLS included
#: Seconds without a byte, or with some that nobody acknowledges, after which a machine is gone: 10, and three times 5.
KEEPALIVE = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPALIVE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 25_000,
}
EVENT_ENDS = (b"\n\n", b"\r\n\r\n")  #: an empty line, as servers write it

Headers = Sequence[tuple[bytes, bytes]]


class ExchangeError(Exception):
    """A replica gave no whole answer. ``begun``: it may have worked on the request; ``kind``: for the metrics."""

    def __init__(self, message: str, kind: str, begun: bool) -> None:
        super().__init__(message)
        self.kind, self.begun = kind, begun


class Exchange:
    """Asks ``replica``; ``close`` it whatever happens.

    Args:
        silence: seconds without a byte after which the replica is given up.
    """

    def __init__(self, replica: Replica, silence: float) -> None:
        import h11

        self.replica, self.silence = replica, silence
        self.begun = self.over = False
        self._h11 = h11
        self._connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=PIECE)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._since: float | None = None  # while the replica is waited for: from when on
        self._timer: asyncio.TimerHandle | None = None

    async def ask(self, method: str, target: bytes, headers: Headers, body: bytes = b"") -> Any:
        """Send the request and wait for the head of the answer, an ``h11.Response``. Raises ``ExchangeError``."""
        held = bool(body) and self.replica.continues
        own = [(b"host", self.replica.address.authority.encode()), *headers, (b"connection", b"close")]
        if body or method in ("POST", "PUT", "PATCH"):
            own.append((b"content-length", str(len(body)).encode()))
        if held:
            own.append((b"expect", b"100-continue"))
        with self._failures():
            await self._connect()
            await self._send(self._h11.Request(method=method, target=target, headers=own))
            if not held:
                await self._send_body(body)
                return await self._head()
            event = await self._head(PATIENCE)
            if isinstance(event, self._h11.Response):  # it does not want the body
                return event
            self.replica.continues = event is not None
            await self._send_body(body)
            return await self._head()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body of the answer as it comes: all that is there, never waiting for more. Raises ``ExchangeError``."""
        with self._failures():
            while not self.over:
                event: Any = await self._event()
                data = bytearray()
                while event is not self._h11.NEED_DATA:
                    if isinstance(event, self._h11.Data):
                        data += event.data
                    else:
                        self.over = True
                        break
                    event = self._connection.next_event()
                if data:
                    self.replica.waiting.discard(self._give_up)
                    yield bytes(data)

    def close(self) -> None:
        """Leave; a replica that is still at work sees that nobody listens any more."""
        self.replica.waiting.discard(self._give_up)
        if self._timer is not None:
            self._timer.cancel()
        if self._writer is not None:
            self._writer.transport.abort()

    async def _connect(self) -> None:
        address = self.replica.address
        tls: dict[str, Any] = (
            {"ssl": _trust(), "server_hostname": address.host} if address.scheme == "https" else {}
        )
        try:
            self._reader, self._writer = await asyncio.wait_for(
                asyncio.open_connection(self.replica.ip, address.port, limit=PIECE, **tls), CONNECTING
            )
        except (OSError, asyncio.TimeoutError) as error:
            raise ExchangeError(f"no connection: {error or 'no answer'}", "connect", False) from None
        assert self._writer is not None
        keep_alive(self._writer.get_extra_info("socket"))
        self.replica.waiting.add(self._give_up)
        self._watch()

    def _give_up(self, reason: str) -> None:
        if self._reader is not None:
            self._reader.set_exception(ConnectionAbortedError(reason))

    def _watch(self) -> None:
        """Give the replica up when it is waited for too long; one timer, so that a token costs none."""
        loop, left = asyncio.get_running_loop(), self.silence
        if self._since is not None:
            left += self._since - loop.time()
        if left > 0:
            self._timer = loop.call_later(max(left, 0.01), self._watch)
        elif self._reader is not None:
            self._reader.set_exception(asyncio.TimeoutError())

    async def _head(self, patience: float | None = None) -> Any:
        """The head of the answer. With ``patience``: or `100 Continue`, or ``None`` when the patience is over."""
        while True:
            try:
                event = await asyncio.wait_for(self._event(), patience)
            except asyncio.TimeoutError:
                if patience is None or patience >= self.silence:
                    raise
                return None
            if isinstance(event, self._h11.Response) or (patience and event.status_code == 100):
                return event

    async def _send_body(self, body: bytes) -> None:
        self.begun = True
        if body:
            await self._send(self._h11.Data(data=body))
        await self._send(self._h11.EndOfMessage())

    async def _send(self, event: Any) -> None:
        assert self._writer is not None
        self._writer.write(self._connection.send(event) or b"")
        with contextlib.suppress(ConnectionError):  # it may have answered before it closed
            await asyncio.wait_for(self._writer.drain(), self.silence)

    async def _event(self) -> Any:
        """The next thing the replica says."""
        assert self._reader is not None
        while (event := self._connection.next_event()) is self._h11.NEED_DATA:
            self._since = asyncio.get_running_loop().time()
            try:
                data = await self._reader.read(PIECE)
            finally:
                self._since = None
            if not data and self._connection.their_state is self._h11.SEND_RESPONSE:
                raise ConnectionResetError("closed without an answer")
            self._connection.receive_data(data)
        if isinstance(event, self._h11.ConnectionClosed):
            raise ConnectionResetError("closed without an answer")
        return event

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """What goes wrong on the wire, as ``ExchangeError``."""
        try:
            yield
        except (asyncio.TimeoutError, OSError) as error:
            if (
                isinstance(error, asyncio.TimeoutError) and getattr(error, "errno", None) is None
            ):  # not the kernel's
                raise ExchangeError(
                    f"nothing came for {self.silence:g} seconds", "silence", self.begun
                ) from None
            raise ExchangeError(f"the connection broke: {error}", "broken", self.begun) from None
        except self._h11.ProtocolError as error:
            raise ExchangeError(
                f"the answer is no HTTP or broke off: {error}", "broken", self.begun
            ) from None


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice that the other machine is gone, as far as this system can."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if (option := getattr(socket, name, None)) is not None:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


async def whole_events(pieces: AsyncIterator[bytes], most: int) -> AsyncIterator[bytes]:
    """A stream of server-sent events, cut only between events (unless one has more than ``most`` bytes).

    So it can be ended anywhere; and nothing is late by it, for a part of an event is of no use to a client.
    """
    held = b""
    async for piece in pieces:
        held += piece
        end = max((at + len(mark) for mark in EVENT_ENDS if (at := held.rfind(mark)) >= 0), default=0)
        if end or len(held) > most:
            yield held[: end or None]
            held = held[end:] if end else b""
    if held:
        yield held


def first_line(events: bytes) -> bytes:
    """The first line of server-sent events that says something; nothing where all of it are comments."""
    return next((line for line in events.splitlines() if line and not line.startswith(b":")), b"")


async def gathered(pieces: AsyncIterator[bytes], most: int) -> AsyncIterator[bytes]:
    """``pieces`` as one, if they have ``most`` bytes at most together; else they come once there are more."""
    found, whole = bytearray(), True
    async for piece in pieces:
        found += piece
        if len(found) > most:
            whole = False
        if not whole:
            yield bytes(found)
            found.clear()
    if found:
        yield bytes(found)


@functools.lru_cache(maxsize=1)
def _trust() -> ssl.SSLContext:
    return ssl.create_default_context()
