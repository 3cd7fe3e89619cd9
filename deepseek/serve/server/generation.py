"""The sequences of one HTTP request: made from its fields, sent to the engine, and their outputs in one stream.

A request for ``n`` answers to several prompts is ``prompts × n`` sequences. They run side by side; what they yield is
merged as it comes, with the number of the sequence.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from deepseek.errors import ConfigError
from deepseek.serve.request import Output, Request
from deepseek.serve.sampler import Grammar, SamplingConfig
from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.exchange import Exchange
from deepseek.serve.server.instruments import Progress
from deepseek.serve.server.schemas import LAST_SEED
from deepseek.serve.server.served import Served

PLAIN = ("temperature", "top_p", "min_p", "min_tokens", "ignore_eos", "presence_penalty", "frequency_penalty",
         "repetition_penalty")  # fmt: skip


def sampling_of(body: Mapping[str, Any], **more: Any) -> SamplingConfig:
    """The sampling options of a completion or a chat. Raises ``ApiError``."""
    values: dict[str, Any] = {name: body[name] for name in PLAIN}
    seed = body["seed"]
    values |= {
        "top_k": max(0, body["top_k"]),
        "seed": None if seed is None else seed & LAST_SEED,  # a negative one is as good a name for a stream
        "stop": body["stop"],
        "include_stop": body["include_stop_str_in_output"],
        "stop_token_ids": tuple(body["stop_token_ids"]),
        "logit_bias": body["logit_bias"] or {},
    }
    if body["structured_outputs"] is not None:
        values["grammar"] = structured(body["structured_outputs"])
    try:
        return SamplingConfig(**(values | more))
    except ConfigError as error:
        raise ApiError(str(error)) from None


def structured(given: Mapping[str, Any]) -> Grammar:
    """vLLM's ``structured_outputs``. Raises ``ApiError`` unless exactly one kind is given."""
    import orjson

    kinds = {k: v for k, v in given.items() if v is not None and v is not False}
    if len(kinds) != 1:
        raise ApiError(
            f"structured_outputs takes exactly one of {', '.join(given)}; found: {', '.join(kinds) or 'none'}",
            param="structured_outputs",
        )
    ((kind, value),) = kinds.items()
    if kind == "json_object":
        return Grammar(kind="json")
    if kind == "json":
        return Grammar(
            kind="json_schema", text=value if isinstance(value, str) else orjson.dumps(value).decode()
        )
    if kind == "choice":
        return Grammar(kind="choice", text=orjson.dumps(value).decode())
    return Grammar(kind="regex" if kind == "regex" else "lark", text=value)


def check_prompt(served: Served, ids: Sequence[int], param: str, *, answer: bool = True) -> None:
    """Raises ``ApiError`` for a prompt that the model cannot take. ``answer``: a token has to follow it."""
    info = served.info
    if not ids:
        raise ApiError("an empty prompt has nothing to continue; give at least one token", param=param)
    if len(ids) > info.max_length - answer:
        raise ApiError(
            f"the prompt has {len(ids):,} tokens, and the model's context is {info.max_length:,}"
            f"{' with one token of answer' if answer else ''}; shorten it",
            param=param,
            code="context_length_exceeded",
        )
    if min(ids) < 0 or max(ids) >= info.vocab_size:
        bad = next(i for i in ids if not 0 <= i < info.vocab_size)
        raise ApiError(f"token id {bad} is outside the vocabulary of {info.vocab_size:,}", param=param)


def check_length(served: Served, text: str, param: str) -> None:
    """Refuse a text that cannot fit before any time is spent on it."""
    if len(text) > served.longest_text:
        raise ApiError(
            f"the text has {len(text):,} characters; the model's context of {served.info.max_length:,} tokens holds "
            f"at most {served.longest_text:,}",
            param=param,
            code="context_length_exceeded",
        )


class Generation:
    """Runs ``requests`` for ``exchange`` and keeps its record and the metrics.

    Attributes:
        progress: of each sequence.
    """

    def __init__(self, exchange: Exchange, served: Served, requests: Sequence[Request]) -> None:
        self.exchange, self.served, self.requests = exchange, served, requests
        self.progress = [Progress(exchange.record.began) for _ in requests]
        metrics = exchange.front.metrics
        metrics.n.observe(exchange.body.get("n") or 1, served.name)
        for request in requests:
            metrics.most.observe(request.sampling.max_tokens, served.name)

    async def outputs(self) -> AsyncGenerator[tuple[int, Output], None]:
        """``(sequence, output)`` until each sequence has ended. Closing it aborts those that have not.

        Raises:
            RequestError, EngineError: of the engine. ApiError: a sequence failed (500) or its time was over (504).
        """
        front, record = self.exchange.front, self.exchange.record
        metrics, name = front.metrics, self.served.name
        began = time.monotonic()
        for progress in self.progress:
            progress.began = began
        whole = not self.exchange.body.get("stream")  # then log-probabilities are held to the end
        try:
            with front.logprobs.hold() as more:
                async with aclosing(merged([front.client.generate(r) for r in self.requests])) as found:
                    async for index, output in found:
                        if whole and (output.logprobs or output.prompt_logprobs):
                            more(entries(output))
                        now = time.monotonic()
                        progress = self.progress[index]
                        metrics.progress(name, progress, output, now)
                        if output.tokens:
                            record.generated_tokens += len(output.tokens)
                            if record.first is None:
                                record.first = now
                        self.exchange.spend(len(output.tokens))
                        if output.finish is not None:
                            record.cached_tokens += progress.cached_tokens
                            _check_finish(output, progress)
                        yield index, output
        except BaseException as error:
            reason = "error" if isinstance(error, Exception) else "abort"
            for progress in self.progress:
                metrics.ended(name, progress, reason, time.monotonic())
            raise
        finally:
            record.finish = ",".join(dict.fromkeys(p.finish or "abort" for p in self.progress))


def entries(output: Output) -> int:
    """Log-probabilities in it, of tokens and of their alternatives."""
    told = (*output.logprobs, *(entry for entry in output.prompt_logprobs or () if entry is not None))
    return sum(1 + len(entry.top) for entry in told)


def _check_finish(output: Output, progress: Progress) -> None:
    if output.finish == "error":
        raise ApiError(output.error or "the engine failed this request", 500, code="engine_error")
    if output.finish == "timeout":
        raise ApiError(
            f"the time is over, after {progress.tokens:,} tokens; ask for fewer, or for more time with 'timeout'",
            504,
            code="deadline_exceeded",
        )
    if output.finish == "abort":
        raise ApiError(
            f"the server stopped this request after {progress.tokens:,} tokens, because it is shutting down",
            503,
            code="aborted",
            headers={"retry-after": "1"},
        )


async def merged(sources: Sequence[AsyncIterator[Output]]) -> AsyncGenerator[tuple[int, Output], None]:
    """The outputs of several sequences as they come. The first error ends all of them."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:  # type: ignore[type-var]
            async for output in source:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, Output | Exception | None]] = asyncio.Queue(2 * len(sources))

    async def pull(index: int, source: AsyncIterator[Output]) -> None:
        try:
            async with aclosing(source) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    await queue.put((index, output))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(pull(i, source)) for i, source in enumerate(sources)]
    try:
        left = len(sources)
        while left:
            index, found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                left -= 1
            else:
                yield index, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage(generation: Generation, prompts: Sequence[Sequence[int]], generated: int) -> dict[str, Any]:
    """OpenAI's account of tokens: each prompt counts once, however many answers it got."""
    prompt = sum(len(p) for p in prompts)
    per_prompt = max(1, len(generation.progress) // max(1, len(prompts)))
    cached = sum(p.cached_tokens for p in generation.progress[::per_prompt])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
    }
