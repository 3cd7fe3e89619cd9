"""Routes about the server and its models: lists, health, readiness, metrics, version, reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.responses import Response

from deepseek.errors import DataError, DeepseekError
from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.exchange import Exchange, Json
from deepseek.serve.server.metrics import CONTENT_TYPE
from deepseek.serve.server.served import Served

OWNER = "deepseek-framework"


def described(served: Served, name: str) -> dict[str, Any]:
    """A model as ``/v1/models`` lists it, with what a client may want to know of it."""
    info = served.info
    return {
        "id": name, "object": "model", "created": served.created, "owned_by": OWNER, "root": Path(info.path).name,
        "parent": None if name == served.name else served.name, "max_model_len": info.max_length,
        "vocab_size": info.vocab_size, "hidden_size": info.hidden, "parameters": info.parameters, "step": info.step,
        "experts": info.experts, "expert_layers": list(info.expert_layers), "hybrid_layers": list(info.hybrid_layers),
        "chat": served.chat is not None,
    }  # fmt: skip


async def models(exchange: Exchange) -> Json:
    served = await exchange.front.served()
    return Json({"object": "list", "data": [described(served, name) for name in served.names]})


async def model(exchange: Exchange) -> Json:
    served = await exchange.front.served()
    name = exchange.scope["path_params"]["model"]
    served.adapter(name)
    return Json(described(served, name))


async def health(exchange: Exchange) -> Json:
    """The process is alive; nothing more."""
    return Json({"status": "ok"})


async def ready(exchange: Exchange) -> Json:
    """Whether requests are being worked on."""
    is_ready, reason = exchange.front.ready
    if is_ready:
        return Json({"status": "ready"})
    return Json({"status": "not ready", "reason": reason}, 503, {"retry-after": "1"})


async def metrics(exchange: Exchange) -> Response:
    front = exchange.front
    try:
        name = (await front.served()).name
    except DeepseekError:
        name = front.config.name or "none"
    text = front.metrics.render(name, front.client.stats(), front.admission.inside)
    return Response(text, media_type=CONTENT_TYPE, headers={"cache-control": "no-store"})


async def version(exchange: Exchange) -> Json:
    return Json({"version": exchange.front.version})


async def reload(exchange: Exchange) -> Json:
    """New requests go to the model at ``path``; those that run finish on the old one."""
    path = exchange.body["path"]
    try:
        there = Path(path).exists()
    except (OSError, ValueError):  # a name too long, a null byte
        there = False
    if not there:
        raise ApiError(f"there is nothing at {path[:200]!r}", param="path")
    try:
        served = await exchange.front.reload(path)
    except DataError as error:
        raise ApiError(str(error), param="path") from None
    return Json({"object": "model.reload", "model": described(served, served.name)})
