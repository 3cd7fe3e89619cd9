"""A request's body as JSON: bounded in bytes and in time, so that a slow or endless sender costs nothing.

Parsing is orjson's: it refuses NaN, infinities, bytes that are no UTF-8, lone surrogates, and nesting that is absurd.
Of a name that an object has twice, the last one counts, as in RFC 8259's account of most parsers.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import orjson
from starlette.requests import ClientDisconnect, Request

from deepseek.serve.server.errors import LONGEST, ApiError
from deepseek.serve.server.shapes import Record

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

CLOSE = {"connection": "close"}  #: the rest of the body is not waited for
LINGER = 2.0  #: seconds for the rest of a body that is refused


async def read(request: Request, most: int, seconds: float, more: Callable[[int], None]) -> bytes:
    """The body of ``request``; ``more`` is told of every piece.

    Raises:
        ApiError: 413 above ``most`` bytes, 415 for anything but plain JSON, 408 after ``seconds``; or of ``more``.
        ClientDisconnect: the client has gone.
    """
    _check_type(request)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise _too_large(most)
    chunks, size = [], 0
    end = time.monotonic() + seconds
    with anyio.move_on_after(seconds) as limit:
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                raise _too_large(most)
            more(len(chunk))
            if time.monotonic() > end:  # a sender of many small pieces never lets a timer run
                break
            chunks.append(chunk)
        else:
            return b"".join(chunks)
    if limit.cancelled_caught or time.monotonic() > end:
        raise ApiError(f"the body did not arrive within {seconds:g} seconds", 408, headers=CLOSE)
    raise ClientDisconnect


def lingering(receive: Receive, send: Send) -> Send:
    """``send`` for an answer after which the connection is closed, although its body may still be coming.

    Closing it at once would reset it: most clients read no answer before they have sent everything, and would never see
    why. So the answer is sent, what comes is thrown away for ``LINGER`` seconds at most, and then it ends.
    """

    async def sent(message: Any) -> None:
        if message["type"] != "http.response.body" or message.get("more_body"):
            return await send(message)
        await send({**message, "more_body": True})
        await discard(receive)
        return await send({"type": "http.response.body", "body": b""})

    return sent


async def discard(receive: Receive) -> None:
    """Throw away the rest of a body, until its end or for ``LINGER`` seconds."""
    end = time.monotonic() + LINGER
    with anyio.move_on_after(LINGER):
        while time.monotonic() < end:  # many small pieces never let a timer run
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                return


def parse(data: bytes, shape: Record) -> dict[str, Any]:
    """``data`` as JSON that fits ``shape``. Raises ``ApiError``."""
    if not data:
        raise ApiError("the body is empty; it must be a JSON object")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ApiError(f"the body is no JSON: {error}"[:LONGEST], code="invalid_json") from None
    return shape.read(value)


def _check_type(request: Request) -> None:
    kind = request.headers.get("content-type", "")
    media = kind.partition(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(
            f"the body must be JSON: send 'Content-Type: application/json', not {kind[:80]!r}",
            415,
            headers=CLOSE,
        )
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", ""):
        raise ApiError(
            f"a body with content-encoding {coding[:80]!r} is not taken; send it plain", 415, headers=CLOSE
        )


def _too_large(most: int) -> ApiError:
    return ApiError(f"the body has more than {most:,} bytes", 413, code="request_too_large", headers=CLOSE)
