"""A server with the API's shape whose answers are told by the question, so that a test knows every word and number.

``say: TEXT`` answers TEXT; ``slow: TEXT`` the same, 30 ms a token; ``drop: TEXT`` breaks the connection half way, and
the rest comes when asked to continue; ``long: TEXT`` ends by its length; ``busy``, ``fail``, ``bad``, ``broken: TEXT``
are 429, 500, 400, and an error in the middle of the stream; ``text: NAME`` answers ``State.texts[NAME]`` in pieces of
``State.piece`` characters. Anything else gets a fixed answer. ``State.ready`` and
``State.key`` make 503 and 401. ``python fake_chat_server.py [PORT]`` serves it for a look.

The extension that the page reads, as ``deepseek serve`` writes it: asked with ``"trace": true``, each streamed choice
has a list ``"trace"`` with, for each of its tokens, ``{"id": 42, "token": " the", "experts": [[layer, [[expert, gate],
…]], …], "gates": [[layer, share], …]}``: the largest gate of an expert layer first; of a hybrid layer the share of its
global branch.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deepseek.serve.server.page import POLICY

DIST = Path(__file__).parents[3] / "deepseek" / "serve" / "web" / "dist"
TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".json": "application/json",
}
MODEL, ADAPTER = "moe-16x2", "moe-16x2-polite"
EXPERT_LAYERS, EXPERTS, HYBRID_LAYERS = (1, 2, 3, 4, 5, 6, 7), 16, (1, 3, 5, 7)
KNOWN = {
    "model", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "response_format", "trace", "logprobs",
    "top_logprobs", "messages", "prompt", "continue_final_message", "add_generation_prompt",
}  # fmt: skip
ANSWER = """A **router** scores all experts for each token and keeps the best two:

1. It multiplies the token's vector with a learned matrix, one row an expert.
2. A softmax over the scores gives the *gates*; only the two largest stay.
3. The token's output is the sum of both experts, weighted by their gates.

```python
def route(x_TD, router_ED, k=2):
    scores_TE = x_TD @ router_ED.T          # one score an expert
    gates_TK, experts_TK = scores_TE.softmax(-1).topk(k)
    return experts_TK, gates_TK / gates_TK.sum(-1, keepdim=True)
```

| layer | experts | active | share of the work |
|:--|--:|--:|--:|
| dense | 1 | 1 | 100 % |
| MoE-64x2 | 64 | 2 | 3.1 % |

So a model of 64 experts costs about as much as one of two."""


class State:
    """What a test sets and reads."""

    def __init__(self) -> None:
        self.key, self.ready, self.why = "", True, "the engine is loading its weights"
        self.asked: list[dict[str, Any]] = []
        self.stopped = 0  # streams that the client left
        self.busy = 1  # how often ``busy`` is answered with 429
        self.retry_after = 3  # seconds, told with it
        self.pause = 0.002  # seconds between two tokens
        self.texts: dict[str, str] = {}
        self.piece = 1000
        self.error: dict[str, Any] = {"message": "the engine died", "code": 500}  # of ``broken``
        self.template, self.tells = True, True  # whether the model has a chat template, and the list says so


def pieces(text: str) -> list[str]:
    """Tokens, roughly as a tokenizer of bytes would cut them: a space goes with the word that follows it."""
    return re.findall(r"\n+| ?[^\W_]{1,7}| ?[^\s]|\s", text)


def traced(text: str, position: int) -> dict[str, Any]:
    """An invented trace: equal tokens take equal experts in early layers, and drift apart in later ones."""
    experts, gates = [], []
    for layer in EXPERT_LAYERS:
        random_ = random.Random(f"{layer} {text.strip().lower()} {position // max(1, 9 - layer)}")
        first, second = (min(int(random_.expovariate(0.28)), EXPERTS - 1) * 5 % EXPERTS for _ in range(2))
        gate = 0.5 + 0.45 * random_.random()
        experts.append(
            [
                layer,
                [
                    [first, round(gate, 4)],
                    [second if second != first else (first + 1) % EXPERTS, round(1 - gate, 4)],
                ],
            ]
        )
    for layer in HYBRID_LAYERS:
        wave = 0.5 + 0.3 * math.sin(position / 7 + layer) + (0.15 if text.strip()[:1].isupper() else -0.05)
        gates.append([layer, round(min(max(wave, 0.02), 0.98), 4)])
    return {
        "id": 1000 + sum(text.encode()) % 30000,
        "token": text,
        "experts": experts,
        "gates": gates,
    }


def weighed(text: str, position: int, top: int) -> dict[str, Any]:
    random_ = random.Random(f"{text} {position}")
    sure = 0.999 if random_.random() < 0.45 else random_.random() ** 0.6
    sure = max(sure, 0.01)
    rest, others = 1 - sure, []
    for word in (" a", " the", " one", " of", "\n")[: max(top - 1, 0)]:
        rest *= 0.55
        others.append({"token": word, "logprob": math.log(max(rest, 1e-9)), "bytes": list(word.encode())})
    mine = {"token": text, "logprob": math.log(sure), "bytes": list(text.encode())}
    return {**mine, "top_logprobs": sorted([mine, *others], key=lambda x: -x["logprob"])[:top]}


def error(status: int, message: str, kind: str = "invalid_request_error", **headers: str) -> JSONResponse:
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, status, headers)


class Routes:
    def __init__(self, state: State) -> None:
        self.state = state

    def refused(self, request: Request) -> Response | None:
        if self.state.key and request.headers.get("authorization") != f"Bearer {self.state.key}":
            return error(401, "a key is needed: send it as 'Authorization: Bearer KEY'")
        if not self.state.ready:
            return error(503, self.state.why, "service_unavailable", **{"Retry-After": "5"})
        return None

    async def models(self, request: Request) -> Response:
        if refusal := self.refused(request):
            return refusal
        entry = {"object": "model", "created": 1_760_000_000, "owned_by": "deepseek", "max_model_len": 8192,
                 "parameters": 1_240_000_000, "experts": EXPERTS, "expert_layers": EXPERT_LAYERS,
                 "hybrid_layers": HYBRID_LAYERS}  # fmt: skip
        if self.state.tells:
            entry["chat"] = self.state.template
        listed = [{"id": MODEL, "parent": None, **entry}, {"id": ADAPTER, "parent": MODEL, **entry}]
        return JSONResponse({"object": "list", "data": listed})

    async def ready(self, _: Request) -> Response:
        if self.state.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": self.state.why}, 503)

    async def answer(self, request: Request) -> Response:
        if refusal := self.refused(request):
            return refusal
        body = json.loads(await request.body())
        self.state.asked.append(body)
        if unknown := sorted(set(body) - KNOWN):
            return error(400, f"unknown fields: {unknown}")
        chat = "messages" in body
        if chat and not self.state.template:
            return error(400, "the model has no chat template; use /v1/completions")
        if chat:
            asked = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")
            begun = body["messages"][-1]["content"] if body.get("continue_final_message") else ""
        else:
            asked, begun = "say:  and so on.", ""
        word, _, rest = asked.partition(": ")
        if asked == "busy" and self.state.busy > 0:
            self.state.busy -= 1
            wait = {"Retry-After": str(self.state.retry_after)}
            return error(429, "12 requests wait already", "rate_limit_error", **wait)
        if asked in ("fail", "bad"):
            status = 500 if asked == "fail" else 400
            return error(status, f"asked to {asked}: <b>no markup</b>")
        if word == "text":
            return StreamingResponse(
                self.stream(body, "text", self.state.texts[rest].removeprefix(begun), chat, bool(begun)),
                media_type="text/event-stream",
            )
        tells = word in ("say", "slow", "drop", "long", "broken") and rest
        text = rest if tells else "Here I am again." if asked == "busy" else ANSWER
        stream = self.stream(body, word if tells else "say", text.removeprefix(begun), chat, bool(begun))
        return StreamingResponse(stream, media_type="text/event-stream")

    async def stream(
        self, body: dict[str, Any], how: str, text: str, chat: bool, onward: bool
    ) -> AsyncIterator[str]:
        size = self.state.piece
        tokens = pieces(text) if how != "text" else [text[i : i + size] for i in range(0, len(text), size)]
        sent, done = 0, False
        prompt = sum(len(pieces(str(m.get("content", "")))) + 4 for m in body.get("messages", []))
        head = {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": body["model"],
        }
        try:
            for i, token in enumerate(tokens):
                await asyncio.sleep(0.03 if how == "slow" else self.state.pause)
                choice: dict[str, Any] = {"index": 0, "finish_reason": None}
                choice.update({"delta": {"content": token}} if chat else {"text": token})
                if body.get("trace"):
                    choice["trace"] = [traced(token, i)]
                if chat and body.get("logprobs"):
                    choice["logprobs"] = {"content": [weighed(token, i, body["top_logprobs"])]}
                elif not chat and body.get("logprobs") is not None:
                    one = weighed(token, i, body["logprobs"])
                    choice["logprobs"] = {
                        "tokens": [token], "token_logprobs": [one["logprob"]], "text_offset": [0],
                        "top_logprobs": [{x["token"]: x["logprob"] for x in one["top_logprobs"]}],
                    }  # fmt: skip
                yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
                sent += 1
                if i + 1 >= max(1, len(tokens) // 2) and not onward:
                    if how == "drop":
                        await asyncio.sleep(
                            0.4
                        )  # a browser drops what it has not read when the connection breaks
                        raise ConnectionResetError("as asked")
                    if how == "broken":
                        yield f"data: {json.dumps({'error': self.state.error})}\n\n"
                        return
            last = {
                "index": 0,
                "finish_reason": "length" if how == "long" and not onward else "stop",
                "delta": {},
            }
            yield f"data: {json.dumps({**head, 'choices': [last]})}\n\n"
            if (body.get("stream_options") or {}).get("include_usage"):
                cached = {"cached_tokens": prompt // 2}
                usage = {
                    "prompt_tokens": prompt,
                    "completion_tokens": sent,
                    "total_tokens": prompt + sent,
                    "prompt_tokens_details": cached,
                }
                yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
            done = True
        finally:
            self.state.stopped += not done

    async def page(self, request: Request) -> Response:
        file = DIST / (request.path_params["path"] or "index.html")
        if not file.is_file() or DIST not in file.resolve().parents:
            return error(404, "not found")
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        return Response(file.read_bytes(), 200, headers, TYPES.get(file.suffix, "application/octet-stream"))


def application(state: State) -> Starlette:
    routes = Routes(state)
    return Starlette(
        routes=[
            Route("/v1/models", routes.models),
            Route("/v1/chat/completions", routes.answer, methods=["POST"]),
            Route("/v1/completions", routes.answer, methods=["POST"]),
            Route("/ready", routes.ready),
            Route("/{path:path}", routes.page),
        ]
    )


class FakeChatServer:
    def __init__(self, port: int = 0) -> None:
        self.state = State()
        self.socket = socket.create_server(("127.0.0.1", port))
        config = uvicorn.Config(
            application(self.state), log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=1
        )  # fmt: skip
        self.server = uvicorn.Server(config)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}/"

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self.server.serve(sockets=[self.socket])


@contextmanager
def fake_chat_server() -> Iterator[FakeChatServer]:
    """Serve the built page with invented answers on a free port of the loopback."""
    server = FakeChatServer()
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.server.should_exit = True
        thread.join(60)
        server.socket.close()


if __name__ == "__main__":
    FakeChatServer(int(sys.argv[1]) if len(sys.argv) > 1 else 6180).run()
