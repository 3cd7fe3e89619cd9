"""The model that answers now, as the front end needs it: its facts, its tokenizer, its chat template.

The engine lives in another process; text becomes tokens here, and long text does so in a thread, so that one prompt of
a hundred thousand characters delays nobody else's next word.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import anyio.to_thread

from deepseek.data import Tokenizer
from deepseek.serve.request import ModelInfo
from deepseek.serve.server.call_formats import MARKS
from deepseek.serve.server.errors import ApiError

T = TypeVar("T")


class Chat(Protocol):
    """A chat template: ``deepseek.serve.chat_template.ChatTemplate``."""

    @property
    def takes_tools(self) -> bool:
        """Whether the template itself tells the model of tools."""

    def ids(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The conversation as token ids. Raises ``RequestError``."""


#: Reads the tokenizer and the chat template of a run, a checkpoint, a Hugging Face directory or a GGUF file.
Loader = Callable[[str], tuple[Tokenizer, Chat | None]]


@dataclass(frozen=True)
class Served:
    """A model as clients see it.

    Attributes:
        name: what they call it.
        fingerprint: changes with whatever may change the answer to an equal request with an equal seed.
        longest_text: characters above which no text fits the model, however it is tokenised.
    """

    info: ModelInfo
    name: str
    tokenizer: Tokenizer
    chat: Chat | None
    fingerprint: str
    longest_text: int
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, info: ModelInfo, name: str, tokenizer: Tokenizer, chat: Chat | None) -> Served:
        """Computes what takes long for a large vocabulary; call it in a thread."""
        tokenizer.prompt("warm")
        known = f"{info.path} {info.step} {info.parameters} {tokenizer.fingerprint}"
        fingerprint = "fp_" + hashlib.blake2b(known.encode(), digest_size=6).hexdigest()
        longest = info.max_length * max(1, int(tokenizer.token_bytes.max(initial=1)))
        return cls(info, name, tokenizer, chat, fingerprint, longest)

    @cached_property
    def call_marks(self) -> tuple[int, ...]:
        """Special tokens that models write around calls of functions."""
        tokenizer, special = self.tokenizer, self.tokenizer.special_ids
        return tuple(
            i for i in special if tokenizer.piece(i, skip_special=False).decode("utf-8", "replace") in MARKS
        )

    @cached_property
    def short_call_ids(self) -> bool:
        """Mistral's templates take ids of calls that are nine letters and digits, and no others."""
        names = (self.tokenizer.piece(i, skip_special=False) for i in self.tokenizer.special_ids)
        return b"[TOOL_CALLS]" in names

    @property
    def names(self) -> tuple[str, ...]:
        """The model and its adapters, each of which is a model to clients."""
        return (self.name, *(a for a in self.info.adapters if a != self.name))

    def adapter(self, name: str | None) -> str | None:
        """The adapter that the model name of a request means. Raises ``ApiError`` 404."""
        if name is None or name == self.name:
            return None
        if name in self.info.adapters:
            return name
        raise ApiError(
            f"the model {name[:200]!r} does not exist here; there are: {', '.join(self.names)}",
            404,
            param="model",
            code="model_not_found",
        )

    @staticmethod
    async def threaded(size: int, limit: int, work: Callable[[], T]) -> T:
        """``work`` on a text of ``size``: here if that is at most ``limit``, else in a thread.

        Tokenizers and templates keep nothing of one text while they work on it, so several threads may.
        """
        return work() if size <= limit else await anyio.to_thread.run_sync(work)

    def token_text(self, token: int) -> str:
        """A token as text; one that is part of a character as ``bytes:\\xe2\\x82``, as the OpenAI API writes it."""
        piece = self.tokenizer.piece(token, skip_special=False)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in piece)
