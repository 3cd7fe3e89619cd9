"""The front end as an ASGI application: its table of routes, and what is around them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route

from deepseek.errors import DeepseekError
from deepseek.serve.server import schemas, service, tokens
from deepseek.serve.server.chat import chat_completions
from deepseek.serve.server.completions import completions
from deepseek.serve.server.embeddings import embeddings
from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.exchange import RECORD, Exchange, Json, Operation
from deepseek.serve.server.front import Front
from deepseek.serve.server.guard import Guard
from deepseek.serve.server.openapi import document, ref
from deepseek.serve.server.page import Page

STREAMED = ("application/json", "text/event-stream")


def operations(front: Front) -> list[Operation]:
    """All routes but those of the page."""

    def get(path: str, name: str, about: str, handler: Any, answer: str, **more: Any) -> Operation:
        answers = {200: ref(answer), **more.pop("answers", {})}
        return Operation("GET", path, name, about, handler, front, answers=answers, **more)

    def post(
        path: str, name: str, about: str, handler: Any, body: Any, answer: str, **more: Any
    ) -> Operation:
        return Operation("POST", path, name, about, handler, front, body, answers={200: ref(answer)}, **more)

    async def openapi(exchange: Exchange) -> Json:
        names: tuple[str, ...] = ()
        with contextlib.suppress(DeepseekError):  # no model is loaded yet
            names = (await front.served()).names
        return Json(document(found, front.version, bool(front.keys), names))

    first = {"model": {"operationId": "model", "parameters": {"model": "$response.body#/data/0/id"}}}
    text = {"detokenize": {"operationId": "detokenize", "requestBody": {"tokens": "$response.body#/tokens"}}}
    found = [
        get("/v1/models", "models", "The model and its adapters.", service.models, "Models", links=first),
        get("/v1/models/{model}", "model", "One of them.", service.model, "Model"),
        post("/v1/completions", "completions", "Continue texts or token ids.", completions, schemas.COMPLETION,
             "Completion", generates=True, media=STREAMED),
        post("/v1/chat/completions", "chat", "The next message of a conversation.", chat_completions, schemas.CHAT,
             "ChatCompletion", generates=True, media=STREAMED),
        post("/v1/embeddings", "embeddings", "One vector for each text.", embeddings, schemas.EMBEDDING, "Embeddings",
             generates=True),
        post("/tokenize", "tokenize", "Text or messages as token ids.", tokens.tokenize, schemas.TOKENIZE, "Tokens",
             links=text),
        post("/detokenize", "detokenize", "Token ids as text.", tokens.detokenize, schemas.DETOKENIZE, "Prompt"),
        get("/health", "health", "The process is alive.", service.health, "Status", secured=False),
        get("/ready", "ready", "Requests are being worked on.", service.ready, "Status", secured=False,
            answers={503: ref("Status")}),
        get("/metrics", "metrics", "Prometheus metrics.", service.metrics, "Status", media=("text/plain",)),
        get("/version", "version", "The version of this server.", service.version, "Version"),
        post("/admin/reload", "reload", "Serve another model from now on.", service.reload, schemas.RELOAD, "Reloaded",
             admin=True),
        get("/openapi.json", "openapi", "This description.", openapi, "OpenApi"),
    ]  # fmt: skip
    return found


def application(front: Front, page: Page | None = None) -> Starlette:
    """The whole front end over ``front``."""
    page = page or Page()

    async def told(request: Any, error: Any) -> Response:
        reason = error.detail if error.status_code != 404 else f"there is no route {request.url.path[:200]!r}"
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            reason = f"{request.method[:20]} is not for this route; use {allowed}"
        code = {404: "unknown_route", 405: "method_not_allowed"}.get(error.status_code)
        known = ApiError(reason, error.status_code, code=code, headers=error.headers)
        return Json(known.body(), known.status, known.headers)

    async def shown(request: Any) -> Response:
        request.scope[RECORD].route = "page"
        return page.answer(request.scope)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        async with front.running():
            yield

    # A model's name may hold slashes.
    routes = [
        Route(o.path.replace("{model}", "{model:path}"), o, methods=[o.method]) for o in operations(front)
    ]
    routes += [Route(path, shown, methods=["GET"]) for path in page.assets]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, front=front, page=page)],
        exception_handlers={HTTPException: told},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app
