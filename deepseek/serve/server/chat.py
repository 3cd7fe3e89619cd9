"""``POST /v1/chat/completions``: the next message of a conversation."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import orjson

from deepseek.serve.request import Output, Request
from deepseek.serve.sampler import Grammar
from deepseek.serve.server.completions import limits, other_seed
from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.exchange import Exchange, Json
from deepseek.serve.server.generation import Generation, check_prompt, sampling_of, usage
from deepseek.serve.server.logprobs import chat_logprobs, traces
from deepseek.serve.server.served import Served
from deepseek.serve.server.sse import event
from deepseek.serve.server.tools import Event, Parser, ToolPlan


@dataclass
class Choice:
    """One answer, growing."""

    index: int
    parser: Parser
    short_ids: bool = False
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    finish: str | None = None
    stop: str | int | None = None
    logprobs: list[Any] = field(default_factory=list)
    traces: list[Any] = field(default_factory=list)

    def take(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """Adds ``events``; the deltas that tell a streaming client of them."""
        deltas: list[dict[str, Any]] = []
        for found in events:
            if found.kind == "text":
                self.content += found.text
                deltas.append({"content": found.text})
            elif found.kind == "call":
                name, function = call_id(self.short_ids), {"name": found.text, "arguments": ""}
                deltas.append({"tool_calls": [{"index": len(self.calls), "id": name, "type": "function",
                                               "function": dict(function)}]})  # fmt: skip
                self.calls.append({"id": name, "type": "function", "function": function})
            else:
                self.calls[-1]["function"]["arguments"] += found.text
                deltas.append(
                    {"tool_calls": [{"index": len(self.calls) - 1, "function": {"arguments": found.text}}]}
                )
        return deltas


class ChatCompletion:
    """One request of this route."""

    def __init__(self, exchange: Exchange, served: Served, prompt: list[int], plan: ToolPlan) -> None:
        body = self.body = exchange.body
        self.served, self.prompt, self.plan = served, prompt, plan
        self.created, self.id = int(time.time()), f"chatcmpl-{exchange.record.id}"
        exchange.admit(body["n"])
        exchange.spend(len(prompt))
        room = max(1, served.info.max_length - len(prompt))
        grammar = grammar_of(body, plan)
        sampling = sampling_of(
            body,
            max_tokens=body["max_completion_tokens"] or body["max_tokens"] or room,
            logprobs=(body["top_logprobs"] or 0) if body["logprobs"] else None,
            **({"grammar": grammar} if grammar is not None else {}),
            shown_ids=served.call_marks if plan.mode == "auto" else (),
        )
        adapter = served.adapter(body["model"])
        self.requests = [
            Request(
                exchange.front.new_id(), tuple(prompt), other_seed(sampling, i), adapter, body["priority"],
                exchange.time_left, trace=body["trace"],
            )
            for i in range(body["n"])
        ]  # fmt: skip
        self.choices = [Choice(i, plan.parser(), served.short_call_ids) for i in range(body["n"])]
        self.generation = Generation(exchange, served, self.requests)

    def take(self, choice: Choice, output: Output) -> list[dict[str, Any]]:
        """Adds ``output`` to ``choice``; the deltas of it."""
        choice.tokens += len(output.tokens)
        if self.body["logprobs"]:
            choice.logprobs += chat_logprobs(self.served, output.logprobs, self.body["top_logprobs"] or 0)
        if output.traces:
            choice.traces += traces(self.served, output.tokens, output.traces)
        deltas = choice.take(choice.parser.push(output.text))
        if output.finish is not None:
            deltas += choice.take(choice.parser.finish())
            called = choice.calls and output.finish == "stop" and self.plan.mode != "named"
            choice.finish = "tool_calls" if called else output.finish
            choice.stop = output.stop
        return deltas

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        async with aclosing(self.generation.outputs()) as outputs:
            async for number, output in outputs:
                self.take(self.choices[number], output)
        told = []
        for choice in self.choices:
            message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
            if choice.calls:
                message |= {"content": choice.content or None, "tool_calls": choice.calls}
            told.append({"index": choice.index, "message": message, **self._tail(choice)})
        return {**self._frame("chat.completion", told), "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[bytes]:
        """The answer as events: after the opening, deltas; for each choice a last one with its ``finish_reason``."""
        options = self.body["stream_options"] or {}
        running = bool(options.get("continuous_usage_stats"))
        encode = self._encoder() if not running else None
        async with aclosing(self.generation.outputs()) as outputs:
            async for number, output in outputs:
                choice = self.choices[number]
                deltas = self.take(choice, output)
                if (
                    encode is not None
                    and output.finish is None
                    and len(deltas) == 1
                    and "content" in deltas[0]
                ):
                    yield encode(number, deltas[0]["content"])
                    continue
                found = b""
                if not deltas and (choice.logprobs or choice.traces):
                    deltas = [{"content": ""}]
                for delta in deltas:
                    found += self._chunk(choice, delta, running)
                if choice.finish is not None:
                    found += self._chunk(choice, {}, running, choice.finish)
                yield found
        if options.get("include_usage"):
            yield event({**self._frame("chat.completion.chunk", []), "usage": self._usage()})

    def opening(self) -> bytes:
        """The first chunk of each choice: its role."""
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(choice, delta, False) for choice in self.choices)

    def _chunk(
        self, choice: Choice, delta: dict[str, Any], running: bool, finish: str | None = None
    ) -> bytes:
        told: dict[str, Any] = {
            "index": choice.index, "delta": delta, "logprobs": self._take_logprobs(choice), "finish_reason": finish,
        }  # fmt: skip
        if finish is not None:
            told["stop_reason"] = choice.stop
        if self.body["trace"]:
            told["trace"], choice.traces = choice.traces, []
        frame = self._frame("chat.completion.chunk", [told])
        return event({**frame, "usage": self._usage()} if running else frame)

    def _encoder(self) -> Any:
        """Writes the chunk of a plain piece of text: all but the text and the index is the same every time."""
        if self.body["logprobs"] or self.body["trace"]:
            return None
        mark = "\x00deepseek\x00"
        frame = event(self._frame("chat.completion.chunk", [mark])).split(orjson.dumps(mark))

        def encode(index: int, text: str) -> bytes:
            choice = b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}' % (
                index, orjson.dumps(text),
            )  # fmt: skip
            return frame[0] + choice + frame[1]

        return encode

    def _take_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if not self.body["logprobs"]:
            return None
        taken, choice.logprobs = choice.logprobs, []
        return {"content": taken, "refusal": None}

    def _tail(self, choice: Choice) -> dict[str, Any]:
        found = {
            "logprobs": self._take_logprobs(choice), "finish_reason": choice.finish, "stop_reason": choice.stop,
        }  # fmt: skip
        return found | ({"trace": choice.traces} if self.body["trace"] else {})

    def _usage(self) -> dict[str, Any]:
        return usage(self.generation, [self.prompt], sum(choice.tokens for choice in self.choices))

    def _frame(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.body["model"] or self.served.name,
            "system_fingerprint": self.served.fingerprint, "choices": choices,
        }  # fmt: skip


def call_id(short: bool) -> str:
    """A name for a call that no other of the conversation has."""
    return secrets.token_hex(5)[:9] if short else f"call_{secrets.token_hex(12)}"


def grammar_of(body: Mapping[str, Any], plan: ToolPlan) -> Grammar | None:
    """What the answer must match, from ``tool_choice`` and ``response_format``. Raises ``ApiError``."""
    forced, wanted = plan.grammar(), body["response_format"]
    kind = "text" if wanted is None else wanted["type"]
    asked = [n for n, there in (("tool_choice", forced is not None), ("response_format", kind != "text"),
                                ("structured_outputs", body["structured_outputs"] is not None)) if there]  # fmt: skip
    if len(asked) > 1:
        raise ApiError(
            f"{' and '.join(asked)} both say what the answer must look like; give one", param=asked[-1]
        )
    if kind == "json_object":
        return Grammar(kind="json")
    if kind == "json_schema":
        schema = wanted["json_schema"]["schema"] if wanted is not None else None
        if schema is None:
            return Grammar(kind="json")
        return Grammar(kind="json_schema", text=orjson.dumps(schema).decode())
    return forced


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates want them: content as text, calls with their arguments read, nothing left out as ``null``.

    Raises:
        ApiError: the arguments of a call are no JSON.
    """
    found = []
    for i, message in enumerate(messages):
        content = message["content"]
        text = "".join(part["text"] for part in content) if isinstance(content, list) else content
        told: dict[str, Any] = {"role": message["role"], "content": text or ""}
        if message.get("name"):
            told["name"] = message["name"]
        if message.get("tool_call_id"):
            told["tool_call_id"] = message["tool_call_id"]
        if message.get("tool_calls"):
            told["tool_calls"] = [_plain_call(c, f"messages[{i}].tool_calls[{j}]")
                                  for j, c in enumerate(message["tool_calls"])]  # fmt: skip
        found.append(told)
    return found


def _plain_call(call: Mapping[str, Any], at: str) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = orjson.loads(function["arguments"] or "{}")
    except orjson.JSONDecodeError as error:
        raise ApiError(
            f"{at}.function.arguments is no JSON: {error}", param=f"{at}.function.arguments"
        ) from None
    return {
        "id": call["id"],
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


async def chat_prompt(exchange: Exchange, served: Served, plan: ToolPlan) -> list[int]:
    """Token ids of the conversation, through the model's chat template. Raises ``ApiError``."""
    body, template = exchange.body, served.chat
    if template is None:
        raise ApiError(
            f"the model {served.name!r} has no chat template; use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    messages = plain_messages(body["messages"])
    size = sum(len(m["content"]) for m in messages)
    if size > served.longest_text:
        raise ApiError(
            f"the messages have {size:,} characters; the model's context of {served.info.max_length:,} tokens holds at "
            f"most {served.longest_text:,}", param="messages", code="context_length_exceeded",
        )  # fmt: skip
    tools = list(plan.tools) or None
    if tools and not template.takes_tools:
        first = messages[0]
        told = plan.message()
        if first["role"] == "system":
            messages[0] = {**first, "content": f"{first['content']}\n\n{told['content']}"}
        else:
            messages.insert(0, told)
        tools = None
    going_on, begin = body["continue_final_message"], body["add_generation_prompt"]
    variables = body["chat_template_kwargs"] or {}

    def work() -> list[int]:
        return template.ids(
            served.tokenizer, messages, tools=tools, add_generation_prompt=not going_on if begin is None else begin,
            continue_final_message=going_on, variables=variables,
        )  # fmt: skip

    effort = max(
        exchange.size or 0, 50 * len(messages)
    )  # tools and variables are rendered too, however large they are
    ids = await served.threaded(effort, exchange.front.config.long_text, work)
    check_prompt(served, ids, "messages")
    return ids


async def chat_completions(exchange: Exchange) -> Json | None:
    """Handles the route."""
    body, served = exchange.body, await exchange.front.served()
    exchange.record.model = body["model"] or served.name
    served.adapter(body["model"])
    if body["top_logprobs"] is not None and not body["logprobs"]:
        raise ApiError("top_logprobs needs logprobs=true", param="top_logprobs")
    if body["stream_options"] is not None and not body["stream"]:
        raise ApiError("stream_options needs stream=true", param="stream_options")
    plan = ToolPlan.of(body)
    prompt = await chat_prompt(exchange, served, plan)
    exchange.record.prompt_tokens = len(prompt)
    completion = ChatCompletion(exchange, served, prompt, plan)
    if not body["stream"]:
        return Json(await completion.whole(), headers=limits(exchange))
    await exchange.streamed(completion.chunks(), completion.opening())
    return None
