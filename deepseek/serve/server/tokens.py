"""``POST /tokenize`` and ``/detokenize``, in the shape of vLLM's server."""

from __future__ import annotations

from typing import Any

from deepseek.serve.server.chat import chat_prompt
from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.exchange import Exchange, Json
from deepseek.serve.server.generation import check_length
from deepseek.serve.server.tools import ToolPlan


async def tokenize(exchange: Exchange) -> Json:
    """Handles the route."""
    body, served = exchange.body, await exchange.front.served()
    served.adapter(body["model"])
    prompt, messages = body["prompt"], body["messages"]
    if (prompt is None) == (messages is None):
        raise ApiError("give either prompt or messages", param="prompt")
    if messages is not None:
        plan = ToolPlan.of({"tools": body["tools"], "tool_choice": None, "parallel_tool_calls": True})
        ids = await chat_prompt(exchange, served, plan)
    else:
        check_length(served, prompt, "prompt")
        tokenizer = served.tokenizer
        encode = tokenizer.prompt if body["add_special_tokens"] else tokenizer.encode
        ids = await served.threaded(len(prompt), exchange.front.config.long_text, lambda: encode(prompt))
    told: dict[str, Any] = {"count": len(ids), "max_model_len": served.info.max_length, "tokens": ids}
    if body["return_token_strs"]:
        told["token_strs"] = [served.token_text(i) for i in ids]
    return Json(told)


async def detokenize(exchange: Exchange) -> Json:
    """Handles the route."""
    body, served = exchange.body, await exchange.front.served()
    served.adapter(body["model"])
    ids: list[int] = body["tokens"]
    if ids and max(ids) >= served.tokenizer.vocab_size:
        bad = max(ids)
        raise ApiError(
            f"token id {bad} is outside the vocabulary of {served.tokenizer.vocab_size:,}", param="tokens"
        )

    def work() -> str:
        return served.tokenizer.decode(ids, skip_special=False)

    text = await served.threaded(len(ids), exchange.front.config.long_text, work)
    return Json({"prompt": text})
