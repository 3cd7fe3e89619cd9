"""The nouns that cross the serving package: what is asked, what comes back, and what the engine is doing.

All of them are plain values (numbers, strings, tuples), so that they can be sent to another process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from deepseek.serve.sampling_config import SamplingConfig

#: Why a request ended. 'stop': an end token or a stop text; 'length': max_tokens or the model's room;
#: 'abort': the client went; 'timeout': its deadline passed; 'error': the engine failed it (``Output.error``).
FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt to continue, or to embed.

    Attributes:
        prompt: token ids, at least one.
        adapter: the name of a LoRA adapter the engine was given, or ``None``.
        priority: smaller runs first; equal ones in order of arrival.
        deadline: seconds after arrival at which it ends with what it has; ``None``: never.
        embed: answer with an embedding of the prompt instead of text (``Output.embedding``).
        trace: also tell which experts and branches every token used (``TokenTrace``).
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    adapter: str | None = None
    priority: int = 0
    deadline: float | None = None
    embed: bool = False
    trace: bool = False


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of one token, and of the ``top`` most likely ones at its place, best first; nats."""

    token: int
    logprob: float
    rank: int  # 1: the most likely
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenTrace:
    """How the model worked on the token that was *read* to produce an answer's token.

    Attributes:
        experts: for every expert layer ``(layer, ((expert, gate), …))``, largest gate first.
        gates: for every hybrid layer ``(layer, mean share of the global branch over its heads)``.
    """

    experts: tuple[tuple[int, tuple[tuple[int, float], ...]], ...] = ()
    gates: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What one step adds to one request.

    Attributes:
        text: what may be shown now: complete characters, and nothing that may still become a stop text.
        tokens: the ids sampled in this step (several with speculation; none while a long prompt is read).
        logprobs, traces: one each for ``tokens``, where asked.
        prompt_logprobs: for the whole prompt, once, with the first output; ``None`` for its first token.
        finish: why it ended, ``None`` while it goes on. stop: the stop text or token id that ended it.
        prompt_tokens, cached_tokens: its prompt's length, and how much of it the prefix cache held.
        queued: seconds that it waited before its first step, in every output.
        error: for ``finish='error'``.
    """

    id: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    traces: tuple[TokenTrace, ...] = ()
    embedding: tuple[float, ...] | None = None
    finish: FinishReason | None = None
    stop: str | int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    queued: float = 0.0


@dataclass(frozen=True)
class ModelInfo:
    """What a front end needs to know of the model that an engine has loaded."""

    name: str
    path: str
    max_length: int
    vocab_size: int
    hidden: int
    parameters: int
    step: int | None = None
    adapters: tuple[str, ...] = ()
    expert_layers: tuple[int, ...] = ()
    experts: int = 0
    hybrid_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class EngineStats:
    """Counters (ever growing) and gauges (now) of an engine, cheap enough to be read after every step."""

    running: int = 0  # gauges
    waiting: int = 0
    pages_total: int = 0
    pages_used: int = 0  # by running requests; cached pages that nobody uses count as free
    prompt_rows: int = 0  # tokens of prompts that are left to compute, of waiting and running requests
    steps: int = 0  # counters
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0  # tokens of prompts looked up in the prefix cache
    prefix_hits: int = 0  # tokens found there
    drafted: int = 0  # tokens proposed by speculation
    accepted: int = 0
    step_seconds: float = 0.0
    rows: int = 0  # tokens computed, of prompts and answers, and those that the prefix cache had
