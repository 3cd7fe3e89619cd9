"""``POST /v1/embeddings``: one vector of length one for each text: the mean of the model's last hidden states."""

from __future__ import annotations

import base64
from contextlib import aclosing
from typing import Any

import numpy as np

from deepseek.serve.request import Request
from deepseek.serve.server.completions import encoded, limits
from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.exchange import Exchange, Json
from deepseek.serve.server.generation import Generation


async def embeddings(exchange: Exchange) -> Json:
    """Handles the route."""
    front, body = exchange.front, exchange.body
    served = await front.served()
    exchange.record.model = body["model"] or served.name
    adapter = served.adapter(body["model"])
    if body["dimensions"] not in (None, served.info.hidden):
        raise ApiError(
            f"dimensions={body['dimensions']}: this model's embeddings have {served.info.hidden} and cannot be cut",
            param="dimensions",
        )
    exchange.admit(len(body["input"]), "input")
    prompts, _ = await encoded(exchange, served, body["input"], "input", answer=False)
    exchange.record.prompt_tokens = total = sum(map(len, prompts))
    exchange.spend(total)
    requests = [
        Request(front.new_id(), tuple(p), adapter=adapter, priority=body["priority"], deadline=exchange.time_left,
                embed=True)
        for p in prompts
    ]  # fmt: skip
    vectors: list[tuple[float, ...]] = [()] * len(requests)
    async with aclosing(Generation(exchange, served, requests).outputs()) as outputs:
        async for number, output in outputs:
            if output.embedding is not None:
                vectors[number] = output.embedding
    data = [
        {"object": "embedding", "index": i, "embedding": _written(v, body["encoding_format"])}
        for i, v in enumerate(vectors)
    ]
    told = {
        "object": "list", "data": data, "model": exchange.record.model,
        "usage": {"prompt_tokens": total, "total_tokens": total},
    }  # fmt: skip
    return Json(told, headers=limits(exchange))


def _written(vector: tuple[float, ...], form: str) -> Any:
    """As numbers, or as the base64 text of little-endian float32, which is what openai-python asks for."""
    if form == "float":
        return vector
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
