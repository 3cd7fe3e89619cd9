"""``POST /v1/completions``: continue texts or token ids."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from deepseek.serve.request import Output, Request, TokenLogprobs
from deepseek.serve.sampler import SamplingConfig
from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.exchange import Exchange, Json
from deepseek.serve.server.generation import Generation, check_length, check_prompt, sampling_of, usage
from deepseek.serve.server.logprobs import TextLogprobs, prompt_logprobs, traces
from deepseek.serve.server.served import Served
from deepseek.serve.server.sse import event


@dataclass
class Choice:
    """One answer, growing."""

    index: int
    prompt: list[int]
    text: str = ""
    echoed: bool = False
    tokens: int = 0
    finish: str | None = None
    stop: str | int | None = None
    logprobs: TextLogprobs | None = None
    prompt_logprobs: list[Any] | None = None
    traces: list[Any] = field(default_factory=list)
    total: float = 0.0  # of the log-probabilities, for best_of


class Completion:
    """One request of this route.

    ``max_tokens=0`` computes the prompt only (for its log-probabilities): the engine is asked for one token, which
    nobody sees.
    """

    def __init__(
        self, exchange: Exchange, served: Served, prompts: list[list[int]], texts: list[str]
    ) -> None:
        body = self.body = exchange.body
        self.served, self.prompts, self.texts = served, prompts, texts
        self.n = body["n"]
        self.drawn = body["best_of"] or self.n
        self.silent = body["max_tokens"] == 0
        self.created, self.id = int(time.time()), f"cmpl-{exchange.record.id}"
        exchange.admit(len(prompts) * self.drawn)
        exchange.spend(sum(map(len, prompts)))
        adapter = served.adapter(body["model"])
        self.requests = [
            Request(
                exchange.front.new_id(), tuple(prompt), self._sampling(i), adapter, body["priority"],
                exchange.time_left, trace=body["trace"],
            )
            for prompt in prompts for i in range(self.drawn)
        ]  # fmt: skip
        self.choices = [self._choice(i) for i in range(len(self.requests))]
        self.generation = Generation(exchange, served, self.requests)

    def _sampling(self, draw: int) -> SamplingConfig:
        body = self.body
        logprobs, wanted = body["logprobs"], body["prompt_logprobs"]
        of_prompt = [n for n in (logprobs if body["echo"] else None, wanted) if n is not None]
        known = sampling_of(
            body,
            max_tokens=max(1, body["max_tokens"]),
            logprobs=0 if logprobs is None and self.drawn > self.n else logprobs,
            prompt_logprobs=max(of_prompt) if of_prompt else None,
        )
        return other_seed(known, draw)

    def _choice(self, number: int) -> Choice:
        choice = Choice(number, self.prompts[number // self.drawn])
        if self.body["logprobs"] is not None:
            choice.logprobs = TextLogprobs(self.served)
        return choice

    def take(self, choice: Choice, output: Output) -> str:
        """Adds ``output`` to ``choice``; what it adds to the text."""
        added = ""
        if self.body["echo"] and not choice.echoed:
            added, choice.echoed = self.texts[choice.index // self.drawn], True
        if output.prompt_logprobs is not None:
            self._take_prompt(choice, output.prompt_logprobs)
        if not self.silent:
            added += output.text
            choice.tokens += len(output.tokens)
            choice.total += sum(entry.logprob for entry in output.logprobs)
            if choice.logprobs is not None:
                for entry in output.logprobs:
                    choice.logprobs.add(entry.token, entry)
            if output.traces:
                choice.traces += traces(self.served, output.tokens, output.traces)
        if output.finish is not None:
            choice.finish = "length" if self.silent else output.finish
            choice.stop = None if self.silent else output.stop
        choice.text += added
        return added

    def _take_prompt(self, choice: Choice, found: Sequence[TokenLogprobs | None]) -> None:
        if self.body["echo"] and choice.logprobs is not None:
            top = self.body["logprobs"]
            for token, entry in zip(choice.prompt, found):
                cut = (
                    None
                    if entry is None
                    else TokenLogprobs(entry.token, entry.logprob, entry.rank, entry.top[:top])
                )
                choice.logprobs.add(token, cut)
        if self.body["prompt_logprobs"] is not None:
            choice.prompt_logprobs = prompt_logprobs(self.served, choice.prompt, found)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        async with aclosing(self.generation.outputs()) as outputs:
            async for number, output in outputs:
                self.take(self.choices[number], output)
        generated = sum(choice.tokens for choice in self.choices)
        told = [{**self._head(i), "text": c.text, **self._tail(c)} for i, c in enumerate(self._best())]
        return {**self._frame(told), "usage": usage(self.generation, self.prompts, generated)}

    def _best(self) -> list[Choice]:
        """The ``n`` answers of each prompt with the highest mean log-probability."""
        if self.drawn == self.n:
            return self.choices
        kept = []
        for start in range(0, len(self.choices), self.drawn):
            group = self.choices[start : start + self.drawn]
            kept += sorted(group, key=lambda c: -c.total / max(1, c.tokens))[: self.n]
        return kept

    async def chunks(self) -> AsyncIterator[bytes]:
        """The answer as events."""
        options = self.body["stream_options"] or {}
        running = bool(options.get("continuous_usage_stats"))
        async with aclosing(self.generation.outputs()) as outputs:
            async for number, output in outputs:
                choice = self.choices[number]
                text = self.take(choice, output)
                if not (text or choice.finish or output.tokens):
                    continue
                frame = self._frame([{**self._head(number), "text": text, **self._tail(choice)}])
                if running:
                    frame["usage"] = self._usage()
                yield event(frame)
        if options.get("include_usage"):
            yield event({**self._frame([]), "usage": self._usage()})

    def _usage(self) -> dict[str, Any]:
        return usage(self.generation, self.prompts, sum(choice.tokens for choice in self.choices))

    def _frame(self, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id, "object": "text_completion", "created": self.created,
            "model": self.body["model"] or self.served.name, "choices": choices,
            "system_fingerprint": self.served.fingerprint,
        }  # fmt: skip

    @staticmethod
    def _head(index: int) -> dict[str, Any]:
        return {"index": index}

    def _tail(self, choice: Choice) -> dict[str, Any]:
        found: dict[str, Any] = {
            "logprobs": choice.logprobs.take() if choice.logprobs is not None else None,
            "finish_reason": choice.finish,
            "stop_reason": choice.stop,
        }
        if choice.prompt_logprobs is not None:
            found["prompt_logprobs"], choice.prompt_logprobs = choice.prompt_logprobs, None
        if self.body["trace"]:
            found["trace"], choice.traces = choice.traces, []
        return found


def other_seed(sampling: SamplingConfig, draw: int) -> SamplingConfig:
    """The options of the answer number ``draw``: a seed of its own, if there is one."""
    if not draw or sampling.seed is None:
        return sampling
    from deepseek.config import replace

    return replace(sampling, seed=(sampling.seed + draw) % 2**63)


async def completions(exchange: Exchange) -> Json | None:
    """Handles the route."""
    body, served = exchange.body, await exchange.front.served()
    exchange.record.model = body["model"] or served.name
    served.adapter(body["model"])
    if body["best_of"] is not None and (body["best_of"] < body["n"] or body["stream"]):
        reason = "cannot be streamed" if body["stream"] else f"must be at least n={body['n']}"
        raise ApiError(f"best_of={body['best_of']} {reason}", param="best_of")
    if body["stream_options"] is not None and not body["stream"]:
        raise ApiError("stream_options needs stream=true", param="stream_options")
    if len(body["prompt"]) * (body["best_of"] or body["n"]) > exchange.front.config.max_sequences:
        exchange.admit(len(body["prompt"]) * (body["best_of"] or body["n"]))
    prompts, texts = await encoded(exchange, served, body["prompt"], "prompt")
    exchange.record.prompt_tokens = sum(map(len, prompts))
    completion = Completion(exchange, served, prompts, texts)
    if not body["stream"]:
        return Json(await completion.whole(), headers=limits(exchange))
    await exchange.streamed(completion.chunks(), b"")
    return None


def limits(exchange: Exchange) -> dict[str, str]:
    return exchange.key.headers() if exchange.key is not None else {}


async def encoded(
    exchange: Exchange, served: Served, given: Sequence[str | list[int]], param: str, *, answer: bool = True
) -> tuple[list[list[int]], list[str]]:
    """Token ids of each prompt, and its text. Raises ``ApiError``."""
    for item in given:
        if isinstance(item, str):
            check_length(served, item, param)

    def work() -> tuple[list[list[int]], list[str]]:
        tokenizer = served.tokenizer
        ids = [tokenizer.prompt(item) if isinstance(item, str) else item for item in given]
        echo = bool(exchange.body.get("echo"))
        for i in ids:
            check_prompt(served, i, param, answer=answer)
        texts = [item if isinstance(item, str) else tokenizer.decode(item) for item in given] if echo else []
        return ids, texts

    size = sum(map(len, given))
    return await served.threaded(size, exchange.front.config.long_text, work)
