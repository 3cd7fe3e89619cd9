"""A server in the shape of `deepseek serve`, whose behaviour a test sets: for the router's tests.

Run as a program it is one in a process of its own, so that it can be killed:
``python fake_replica.py NAME --port PORT``, or with ``--fd NUMBER`` of a socket that listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class FakeReplica:
    """Answers in tokens that say who made them.

    Attributes:
        refusal: (status, headers, body) that every request gets before its body is read.
        ready, slow, key: what ``/ready`` says, and after how long; the key that is wanted.
        allowed: how many tokens every answer may have until this is raised, or ``None`` again.
        asked: bodies that were read; left: requests whose client went before their end.
    """

    def __init__(self, name: str = "a") -> None:
        self.name, self.ready, self.key = name, True, ""
        self.slow = 0.0
        self.allowed: int | None = None
        self.refusal: tuple[int, dict[str, str], dict[str, Any]] | None = None
        self.asked: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.running = self.left = 0
        self.server: uvicorn.Server | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/ready", self._ready),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/echo/{rest:path}", self._echo, methods=["GET", "POST", "PUT", "HEAD"]),
            ]
        )

    @property
    def port(self) -> int:
        assert self.server is not None
        port: int = self.server.servers[0].sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """End every connection in the middle and listen no more, as a killed process does."""

        def now() -> None:
            assert self.server is not None
            for server in self.server.servers:
                server.close()
            for connection in list(self.server.server_state.connections):
                connection.transport.abort()

        assert self.loop is not None
        self.loop.call_soon_threadsafe(now)

    async def _ready(self, request: Request) -> Response:
        self.loop = asyncio.get_running_loop()
        await asyncio.sleep(self.slow)
        return JSONResponse({"status": "ready" if self.ready else "not ready"}, 200 if self.ready else 503)

    async def _models(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"code": "invalid_api_key"}}, 401)
        return JSONResponse({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def _echo(self, request: Request) -> Response:
        body = await request.body()
        if "x-die" in request.headers:
            self.kill()
            await asyncio.sleep(5)
        raw = [[k.decode(), v.decode()] for k, v in request.scope["headers"]]
        target = request.scope["raw_path"].decode() + "?" + request.scope["query_string"].decode()
        told = {"method": request.method, "target": target, "headers": raw, "body": body.decode()}
        return JSONResponse(
            told, headers={"x-kept": "yes", "keep-alive": "timeout=5", "x-once": "1", "connection": "x-once"}
        )

    async def _completions(self, request: Request) -> Response:
        if self.refusal is not None:
            status, headers, body = self.refusal
            return JSONResponse(body, status, headers)
        self.heads.append(dict(request.headers))
        body = await request.json()
        self.asked.append(body)
        if after := body.get("fail_after_reading"):
            return JSONResponse({"error": {"code": after}}, body.get("status", 503), {"retry-after": "2"})
        if body.get("die"):
            self.kill()
            await asyncio.sleep(5)
        count, pause = body.get("max_tokens", 3), body.get("pause", 0.0)
        if body.get("stream"):
            return StreamingResponse(self._tokens(count, pause), media_type="text/event-stream")
        self.running += 1
        try:
            made = 0
            while made < count:
                await asyncio.sleep(0.005 if self._waits(made) else pause)
                made += not self._waits(made)
                if await request.is_disconnected():
                    self.left += 1
                    return Response(status_code=204)
        finally:
            self.running -= 1
        text = " ".join([self.name] * count)
        return JSONResponse({"object": "text_completion", "id": "1", "created": 1, "model": "fake",
                             "choices": [{"index": 0, "text": text, "finish_reason": "length"}]})  # fmt: skip

    def _waits(self, made: int) -> bool:
        return self.allowed is not None and made >= self.allowed

    async def _tokens(self, count: int, pause: float) -> AsyncIterator[str]:
        self.running += 1
        sent = 0
        try:
            for _ in range(count):
                await asyncio.sleep(pause)
                while self._waits(sent):
                    await asyncio.sleep(0.005)
                told = {"id": "1", "object": "text_completion", "created": 1, "model": "fake",
                        "choices": [{"index": 0, "text": self.name, "finish_reason": None}]}  # fmt: skip
                yield f"data: {json.dumps(told)}\n\n"
                sent += 1
            yield "data: [DONE]\n\n"
        finally:
            self.left += sent < count
            self.running -= 1


def _options(app: Any, **more: Any) -> uvicorn.Config:
    return uvicorn.Config(app, host="127.0.0.1", http="h11", log_level="critical", ws="none", **more)


@contextmanager
def in_thread(app: Any, lifespan: str = "off", **more: Any) -> Iterator[uvicorn.Server]:
    """Serve ``app`` on a free port of the loopback."""
    server = uvicorn.Server(_options(app, port=0, lifespan=lifespan, timeout_graceful_shutdown=1, **more))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.01)
        yield server
    finally:
        server.should_exit = server.force_exit = True
        thread.join(60)


@contextmanager
def replica(name: str = "a") -> Iterator[FakeReplica]:
    made = FakeReplica(name)
    with in_thread(made.app()) as made.server:
        yield made


def free_port() -> int:
    """A port to be bound later, and again: one that the system gives to nobody by itself."""
    dice = random.SystemRandom()
    while True:
        port = dice.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


if __name__ == "__main__":
    if sys.argv[1] == "broken":
        sys.exit(3)
    app, option, number = FakeReplica(sys.argv[1]).app(), sys.argv[-2], int(sys.argv[-1])
    port, sockets = (0, [socket.socket(fileno=number)]) if option == "--fd" else (number, None)
    uvicorn.Server(_options(app, port=port, lifespan="off")).run(sockets)
