"""One HTTP request and its answer, from the first byte to the last.

An ``Operation`` is a route: it lets a request in, reads its body, runs its handler, and sends what comes of it, errors
included. A handler gets an ``Exchange``, and returns a ``Response`` or has sent a stream itself. While it works, the
connection is watched: a client that goes away, with a stream or while it waits, ends the work at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from deepseek.errors import DeepseekError
from deepseek.serve.server import body
from deepseek.serve.server.access_log import Record
from deepseek.serve.server.errors import CLIENT_GONE, ApiError, translated
from deepseek.serve.server.keys import Key
from deepseek.serve.server.sse import DONE, Stream, event

if TYPE_CHECKING:
    from deepseek.serve.server.front import Front
    from deepseek.serve.server.shapes import Record as Shape

RECORD, KEY, ABORT = "deepseek.record", "deepseek.key", "deepseek.abort"  #: names in an ASGI scope
WAITED = (
    "x-request-waited"  #: header: seconds that the request has had elsewhere, which count to its deadline
)
GRACE = 2.0  #: seconds beyond a deadline after which the front end itself ends a request
FIRST = 0.5  #: seconds that the status of a stream waits for the engine's first word, so that errors have their own


class Json(Response):
    media_type = "application/json"

    def __init__(
        self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(content, status_code, {"cache-control": "no-store", **(headers or {})})

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS)


class Exchange:
    """What a handler knows of its request.

    Attributes:
        body: what ``Operation.body`` made of the JSON; size: its bytes, once all of them are here.
        stream: the event stream that the answer is, if it is one.
        sequences: how many the request has let in.
    """

    def __init__(self, front: Front, scope: Any, receive: Any, send: Any) -> None:
        self.front, self.scope = front, scope
        self.receive, self.send = receive, send
        self.request = Request(scope, receive)
        self.record: Record = scope[RECORD]
        self.key: Key | None = scope.get(KEY)
        self.body: dict[str, Any] = {}
        self.size: int | None = None
        self.stream: Stream | None = None
        self.sequences = 0
        self.waited = seconds_waited(self.request.headers.get(WAITED, ""))

    @property
    def deadline(self) -> float | None:
        """Seconds that the request may take, or ``None``."""
        return self.body.get("timeout") or self.front.config.timeout or None

    @property
    def time_left(self) -> float | None:
        """Seconds, more than none."""
        limit = self.deadline
        return (
            None
            if limit is None
            else max(0.001, limit - self.waited - (time.monotonic() - self.record.began))
        )

    def admit(self, sequences: int, param: str = "n") -> None:
        """The request turns out to have so many sequences, by its field ``param``. Raises ``ApiError``."""
        most = self.front.config.max_sequences
        if sequences > most:
            what = "prompts × n" if param == "n" else f"the items of {param}"
            raise ApiError(f"{what} are {sequences:,} sequences; one request may have {most:,}", param=param)
        self.front.admission.more(sequences)
        self.sequences = sequences

    def spend(self, tokens: int) -> None:
        if self.key is not None and tokens:
            self.key.spend(tokens)

    async def streamed(self, chunks: Any, opening: bytes) -> None:
        """Send ``chunks`` (an async generator of bytes) as an event stream that begins with ``opening``.

        The status is sent with the first chunk, or after ``FIRST`` seconds without one; ``opening`` with the first
        chunk: what has got nothing yet can still be asked of another server.
        """
        stream = self.stream = Stream(self.send)
        self.front.streams.add(stream)
        try:
            async with contextlib.aclosing(chunks):
                first = asyncio.ensure_future(anext(chunks))
                try:
                    await asyncio.wait({first}, timeout=FIRST)
                    if first.done():
                        first.result()
                    await stream.start()
                    await stream.write(opening + await first)
                finally:
                    first.cancel()
                    await asyncio.gather(first, return_exceptions=True)
                async for chunk in chunks:
                    if chunk:
                        await stream.write(chunk)
            await stream.finish()
        finally:
            self.front.streams.discard(stream)
            stream.close()


Handler = Callable[[Exchange], Awaitable[Response | None]]


@dataclass(frozen=True)
class Operation:
    """A route.

    Attributes:
        body: of a POST. generates: it uses the engine, and has to be let in.
        answers: JSON Schemas by status, beside the errors that all routes share; for ``/openapi.json``.
        media: the content type of the answer with status 200.
        secured: it needs a key. admin: one that may reload.
    """

    method: str
    path: str
    name: str
    about: str
    handler: Handler
    front: Front
    body: Shape | None = None
    answers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    media: tuple[str, ...] = ("application/json",)
    generates: bool = False
    secured: bool = True
    admin: bool = False
    links: Mapping[str, Any] = field(default_factory=dict)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        exchange = Exchange(self.front, scope, receive, send)
        exchange.record.route = self.path
        try:
            with self._inside(exchange):
                response = await self._answer(exchange)
        except ClientDisconnect:
            exchange.record.status = CLIENT_GONE
            if exchange.stream is not None and exchange.stream.cut:
                scope.get(ABORT, _nothing)()
            return
        except Exception as error:
            if not isinstance(error, DeepseekError):
                raise  # the guard tells it
            await self._fail(exchange, translated(error))
            return
        if response is not None:
            await response(scope, receive, send)

    @contextlib.contextmanager
    def _inside(self, exchange: Exchange) -> Iterator[None]:
        """Within the limits of the key. What would find the queue full is refused before its body is read."""
        key = exchange.key
        if self.admin and (key is None or not key.admin):
            raise ApiError("this route needs a key with admin = true", 403, code="admin_key_needed")
        if self.generates:
            self.front.admission.check()
        if not self.generates or key is None:
            yield
            return
        key.enter()
        try:
            yield
        finally:
            key.leave()

    async def _answer(self, exchange: Exchange) -> Response | None:
        config = self.front.config
        if self.body is None:
            return await self.handler(exchange)
        with self.front.bodies.hold() as more:
            data = await body.read(exchange.request, config.max_body, config.body_seconds, more)
            return await self._handle(exchange, data)

    async def _handle(self, exchange: Exchange, data: bytes) -> Response | None:
        assert self.body is not None
        exchange.size = len(data)
        if not self.generates:
            exchange.body = body.parse(data, self.body)
            return await unless_gone(exchange.receive, self.handler(exchange), None)
        admission, done = self.front.admission, False
        admission.enter()  # a sender that takes its time holds no place in the queue
        exchange.sequences = 1
        try:
            exchange.body = body.parse(data, self.body)
            limit = exchange.time_left
            response = await unless_gone(
                exchange.receive, self.handler(exchange), None if limit is None else limit + GRACE
            )
            done = True
            return response
        finally:
            admission.leave(exchange.sequences, done)

    async def _fail(self, exchange: Exchange, error: ApiError) -> None:
        stream = exchange.stream
        if stream is None or not stream.started:
            headers = {**error.headers, **(exchange.key.headers() if exchange.key else {})}
            closing = error.headers.get("connection") == "close" and exchange.size is None
            send = body.lingering(exchange.receive, exchange.send) if closing else exchange.send
            await Json(error.body(), error.status, headers)(exchange.scope, exchange.receive, send)
            return
        exchange.record.status = error.status  # what the log says; the client has had its 200
        try:
            last = stream.write(event(error.body()) + DONE, more=False)
            await asyncio.wait_for(last, self.front.config.stalled)
        except asyncio.TimeoutError:
            exchange.scope.get(ABORT, _nothing)()


def seconds_waited(text: str) -> float:
    """The value of a header ``WAITED``; 0 for what is none."""
    return float(text) if re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text, re.ASCII) else 0.0


async def unless_gone(
    receive: Any, work: Coroutine[Any, Any, Any] | Awaitable[Any], limit: float | None
) -> Any:
    """What ``work`` returns; it is cancelled when the client goes, or after ``limit`` seconds.

    Raises:
        ClientDisconnect: the client went, or its stream was cut. ApiError: 504, the time is over.
    """
    task: asyncio.Future[Any] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            if task.cancelled():
                raise ClientDisconnect
            return task.result()
        if gone.done():
            raise ClientDisconnect
        raise ApiError("the request's time is over", 504, code="deadline_exceeded")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _nothing() -> None:
    pass
