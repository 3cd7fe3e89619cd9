"""``Call``: one request of a client and its answer, as ASGI has them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from deepseek.serve.server.body import lingering
from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.exchange import ABORT, WAITED, seconds_waited

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Pairs = Iterable[tuple[bytes, bytes]]

#: What belongs to one connection and not to the message (RFC 9110 §7.6.1), and what is made anew.
HOP = frozenset({b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection",
                 b"te", b"trailer", b"transfer-encoding", b"upgrade"})  # fmt: skip
MADE = frozenset(
    {b"host", b"content-length", b"expect", b"x-forwarded-for", b"x-forwarded-proto", WAITED.encode()}
)

#: Routes whose POST changes nothing, so that it may be asked twice; a replica may be another server, with other routes.
REPEATABLE = frozenset(
    {"/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"}
)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Call:
    """What a client asks, and the way back to it.

    Attributes:
        started, finished: the head of the answer has been sent; all of it.
        given: something of the answer itself has been sent, more than comments of a stream.
        sending: since when (``time.monotonic``) the client has not taken what is sent; ``None``: it takes everything.
        between_events: the answer is a stream of events, and what was sent ends with a whole one.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.started = self.given = self.finished = False
        self.waited = seconds_waited(self._header(WAITED.encode()))
        self._arrived = time.monotonic()
        self.closing = False  # the connection ends with this answer
        self.sending: float | None = None
        self.between_events = False
        self._ends = self._whole = False
        self._leaving: asyncio.Task[None] | None = None

    @property
    def repeatable(self) -> bool:
        """Whether it may be asked of another replica although one has begun with it."""
        return self.method == "POST" and self.path in REPEATABLE

    @property
    def target(self) -> bytes:
        """Path and query as the client wrote them."""
        raw: bytes = self.scope.get("raw_path") or self.path.encode()
        if not raw.startswith(b"/"):
            raise ApiError("the path of a request begins with '/'")
        query: bytes = self.scope.get("query_string", b"")
        return raw + (b"?" + query if query else b"")

    @property
    def authorization(self) -> str:
        return self._header(b"authorization")

    @property
    def host(self) -> str:
        """The name by which the client calls this machine, without the port."""
        try:
            return urlsplit(f"//{self._header(b'host')}").hostname or ""
        except ValueError:
            return ""

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Those to pass on: all of the message's, who the client is, and how much of its time is over."""
        pairs = list(end_to_end(self.scope["headers"], MADE))
        names = {k for k, _ in pairs}
        seen = [v for k, v in self.scope["headers"] if k == b"x-forwarded-for"]
        client = self.scope.get("client")
        seen += [client[0].encode()] if client else []
        if seen:
            pairs.append((b"x-forwarded-for", b", ".join(seen)))
        pairs.append((b"x-forwarded-proto", self.scope.get("scheme", "http").encode()))
        if b"x-request-id" not in names:
            pairs.append((b"x-request-id", uuid.uuid4().hex.encode()))
        pairs.append((WAITED.encode(), b"%.3f" % (self.waited + time.monotonic() - self._arrived)))
        return pairs

    async def body(self, most: int, seconds: float, more: Callable[[int], None]) -> bytes:
        """All of it; ``more`` is told of every piece. Raises what that raises; ``ApiError`` 413 above ``most`` bytes,
        408 after ``seconds``; ``ClientGone``."""
        declared = next((v for k, v in self.scope["headers"] if k == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > most:
            raise self._too_large(most)
        data, end, going = bytearray(), time.monotonic() + seconds, True
        while going:
            try:
                message = await asyncio.wait_for(self._receive(), end - time.monotonic())
            except asyncio.TimeoutError:
                raise ApiError(f"the body did not arrive within {seconds:g} seconds", 408,
                               headers={"connection": "close"}) from None  # fmt: skip
            if message["type"] == "http.disconnect":
                raise ClientGone
            piece = message.get("body", b"")
            data += piece
            going = message.get("more_body", False)
            if len(data) > most:
                raise self._too_large(most)
            more(len(piece))
        self._whole = True
        return bytes(data)

    async def while_there(self, work: Coroutine[Any, Any, None]) -> None:
        """``work``, cancelled when the client leaves, is ``cut``, or is to ``end_now``.

        Raises what it raises; ``ClientGone``; ``ApiError`` 503 for the last.
        """
        working = asyncio.create_task(work)
        self._leaving = asyncio.create_task(self._gone())
        both = (working, self._leaving)
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                if self._ends:
                    raise ApiError("this router was told to end at once; ask again, it or another one will answer",
                                   503, code="aborted", headers={"retry-after": "1"})  # fmt: skip
                raise ClientGone
            working.result()
        finally:
            left: Iterable[asyncio.Task[None]] = both
            while left:
                for task in left:
                    task.cancel()
                _, left = await asyncio.wait(
                    left, timeout=1.0
                )  # again: ``wait_for`` may lose one (Python 3.11)

    def cut(self) -> None:
        """Wait for this client no longer; its connection ends, whatever it has still to take."""
        if self._leaving is not None:
            self._leaving.cancel()
        if abort := self.scope.get(ABORT):
            abort()

    def end_now(self) -> None:
        """The router ends: leave the replica, and tell the client."""
        self._ends = self.closing = True
        if self._leaving is not None:
            self._leaving.cancel()

    async def _gone(self) -> None:
        """Until the client has left, or has its answer."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, pairs: Pairs) -> None:
        headers = [*end_to_end(pairs), *([(b"connection", b"close")] if self.closing else [])]
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def give(self, data: bytes, comment: bool = False) -> None:
        self.given |= not comment
        self.sending = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self.sending = None

    async def end(self) -> None:
        self.finished = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def answer(self, status: int, data: bytes, pairs: Pairs) -> None:
        """The whole answer at once; as the last event, where a stream has begun with comments."""
        if self.started:
            data = b"data: " + data + b"\n\n"
        else:
            made = [(k, v) for k, v in pairs if k != b"content-length"]
            await self.start(status, [*made, (b"content-length", str(len(data)).encode())])
        await self.give(data)
        await self.end()

    async def refuse(self, error: ApiError) -> None:
        self.closing |= error.headers.get("connection") == "close"
        extra = [(k.encode(), v.encode()) for k, v in error.headers.items()]
        if error.headers.get("connection") == "close" and not self._whole:
            self._send = lingering(self._receive, self._send)
        await self.answer(error.status, error.encoded(), [(b"content-type", b"application/json"), *extra])

    def _header(self, name: bytes) -> str:
        found: list[bytes] = [v for k, v in self.scope["headers"] if k == name]
        return found[0].decode("latin-1") if found else ""

    @staticmethod
    def _too_large(most: int) -> ApiError:
        return ApiError(f"the body has more than {most:,} bytes", 413, code="request_too_large",
                        headers={"connection": "close"})  # fmt: skip


def end_to_end(pairs: Pairs, made: frozenset[bytes] = frozenset()) -> Pairs:
    """Without the headers that end at this hop."""
    pairs = list(pairs)
    named = {n.strip().lower() for k, v in pairs if k == b"connection" for n in v.split(b",")}
    return [(k, v) for k, v in pairs if k not in HOP and k not in named and k not in made]
