"""Log-probabilities as the two OpenAI routes write them: lists side by side (completions), and objects (chat)."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deepseek.serve.request import TokenLogprobs, TokenTrace
from deepseek.serve.server.served import Served

LEAST = -9999.0  #: what JSON gets for the logarithm of zero, as OpenAI's servers do


def finite(value: float) -> float:
    return value if math.isfinite(value) else LEAST


@dataclass
class TextLogprobs:
    """The ``logprobs`` of a completion, growing. ``text_offset`` counts characters of the text that is answered."""

    served: Served
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)
    _characters: int = 0
    _utf8: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def add(self, token: int, found: TokenLogprobs | None) -> None:
        """``found`` is ``None`` for the first token of a prompt, which nothing predicts."""
        served = self.served
        self.text_offset.append(self._characters)
        self._characters += len(self._utf8.decode(served.tokenizer.piece(token)))
        self.tokens.append(served.token_text(token))
        self.token_logprobs.append(None if found is None else finite(found.logprob))
        top: dict[str, float] | None = None
        if found is not None:
            top = {
                served.token_text(t): finite(p) for t, p in reversed(found.top)
            }  # of equal texts the best stays
            top = dict(reversed(top.items()))
            top.setdefault(self.tokens[-1], finite(found.logprob))
        self.top_logprobs.append(top)

    def take(self) -> dict[str, Any]:
        """All of it, and begin anew."""
        taken = {
            "tokens": self.tokens, "token_logprobs": self.token_logprobs, "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }  # fmt: skip
        self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset = [], [], [], []
        return taken


def chat_logprobs(served: Served, found: Sequence[TokenLogprobs], top: int) -> list[dict[str, Any]]:
    """The ``content`` of a chat's ``logprobs``, with the ``top`` most likely tokens at each place."""
    return [
        {
            **_one(served, entry.token, entry.logprob),
            "top_logprobs": [_one(served, token, p) for token, p in entry.top[:top]],
        }
        for entry in found
    ]


def _one(served: Served, token: int, logprob: float) -> dict[str, Any]:
    piece = served.tokenizer.piece(token, skip_special=False)
    return {"token": served.token_text(token), "logprob": finite(logprob), "bytes": list(piece)}


def prompt_logprobs(
    served: Served, ids: Sequence[int], found: Sequence[TokenLogprobs | None]
) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for each token of the prompt a table from ids to what is known of them."""
    told: list[dict[str, Any] | None] = []
    for token, entry in zip(ids, found):
        if entry is None:
            told.append(None)
            continue
        table = {
            str(t): {"logprob": finite(p), "rank": place + 1, "decoded_token": served.token_text(t)}
            for place, (t, p) in enumerate(entry.top)
        }
        table[str(token)] = {
            "logprob": finite(entry.logprob),
            "rank": entry.rank,
            "decoded_token": served.token_text(token),
        }
        told.append(table)
    return told


def traces(served: Served, tokens: Sequence[int], found: Sequence[TokenTrace]) -> list[dict[str, Any]]:
    """Which experts and branches each token used."""
    return [
        {
            "id": token, "token": served.token_text(token), "experts": trace.experts,
            "gates": [(layer, finite(share)) for layer, share in trace.gates],
        }
        for token, trace in zip(tokens, found)
    ]  # fmt: skip
