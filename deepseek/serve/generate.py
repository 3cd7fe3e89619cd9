"""A loaded model one can talk to: ``ds.load("runs/quickstart").generate("def main(")``.

Prompt in one pass, then a token at a time through the key/value cache; the text streams out as complete characters.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from deepseek.assemble import Loaded, pick_device
from deepseek.assemble import load as load_model
from deepseek.config import replace
from deepseek.data import Tokenizer
from deepseek.errors import ConfigError, DataError, WeightsError
from deepseek.events import emit
from deepseek.models import ModelConfig, Transformer
from deepseek.precision import Policy, choose
from deepseek.serve.chat_template import ChatTemplate
from deepseek.serve.grammar import Grammars
from deepseek.serve.sampling import SamplingState, sample
from deepseek.serve.sampling_config import SamplingConfig
from deepseek.serve.text import TextStream, begins_text


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; ``role`` is 'system', 'user' or 'assistant'."""

    role: str
    content: str


@dataclass(frozen=True)
class Completion:
    """What was generated. ``finish_reason``: 'stop' (end of text, or a stop text), 'length' (no room or max_tokens)."""

    text: str
    tokens: list[int]
    finish_reason: str
    seconds: float


class LanguageModel:
    """A transformer, its tokenizer, and where both came from."""

    def __init__(self, loaded: Loaded, policy: Policy | None = None) -> None:
        self.model: Transformer = loaded.model.eval()
        self._tokenizer, self.path, self.step = loaded.tokenizer, loaded.path, loaded.step
        self.device = next(self.model.parameters()).device
        self.policy = policy or choose("fp32", self.device)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ``DataError`` when the directory has none."""
        if self._tokenizer is None:
            raise DataError(f"{self.path} has no tokenizer.json: put one there, or use `tokens(ids)`")
        return self._tokenizer

    def generate(
        self, prompt: str | Sequence[int], sampling: SamplingConfig | None = None, **options: object
    ) -> str:
        """The continuation of ``prompt`` as text. ``options`` are those of ``SamplingConfig``: ``temperature=0``, …"""
        return self.complete(prompt, sampling, **options).text

    def complete(
        self, prompt: str | Sequence[int], sampling: SamplingConfig | None = None, **options: object
    ) -> Completion:
        """Like ``generate``, with token ids and the reason why it ended."""
        return _drain(self._pieces(prompt, _options(sampling, options)))[1]

    def stream(
        self, prompt: str | Sequence[int], sampling: SamplingConfig | None = None, **options: object
    ) -> Iterator[str]:
        """The continuation, piece by piece, as soon as each is complete text."""
        for piece in self._pieces(prompt, _options(sampling, options)):
            if isinstance(piece, str):
                yield piece

    def chat(
        self, messages: Sequence[Message], sampling: SamplingConfig | None = None, **options: object
    ) -> str:
        """The assistant's answer to a conversation, through the chat tokens of the tokenizer."""
        return self.generate(self.chat_prompt(messages), sampling, **options)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids through the model's own chat template, or ``[EOS] <|user|> … <|end|> <|assistant|>``.

        Raises:
            DataError: the model has neither a template nor our chat tokens. RequestError: the template refuses.
        """
        tokenizer = self.tokenizer
        if tokenizer.chat_templates:
            return self._template.render([{"role": m.role, "content": m.content} for m in messages])
        ids = [tokenizer.eos_id]
        for message in messages:
            if message.role not in ("system", "user", "assistant"):
                raise ConfigError(f"role {message.role!r} is not system, user or assistant")
            turn = tokenizer.encode(message.content)
            ids += [tokenizer.token_id(f"<|{message.role}|>"), *turn, tokenizer.token_id("<|end|>")]
        return [*ids, tokenizer.token_id("<|assistant|>")]

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """What the model sees: text begins as the model was trained, ids are taken as they are."""
        ids = self.tokenizer.prompt(prompt) if isinstance(prompt, str) else list(prompt)
        vocabulary = self.config.vocab_size
        if not ids:
            raise ConfigError(
                "an empty prompt of token ids has nothing to continue; give at least the start token"
            )
        if bad := [i for i in ids if not 0 <= i < vocabulary]:
            raise ConfigError(f"token id {bad[0]} is outside the vocabulary of {vocabulary}")
        if len(ids) >= self.config.max_length:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, the model is meant for {self.config.max_length}: shorten it"
            )
        return ids

    @torch.no_grad()
    def tokens(self, ids: Sequence[int], sampling: SamplingConfig) -> Iterator[int]:
        """Sampled token ids after ``ids``, without end: the caller decides when to stop.

        Raises:
            WeightsError: the logits are not finite.
        """
        tokenizer, grammar = self._tokenizer, sampling.grammar
        limit = tokenizer.vocab_size if tokenizer else self.config.vocab_size
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        state = SamplingState(
            sampling, ids, seed, limit, self._grammars.state(grammar) if grammar else None,
            end_ids=tokenizer.end_ids if tokenizer else (),
        )  # fmt: skip
        cache, step = self.model.new_cache(), torch.tensor([list(ids)], device=self.device)
        while True:
            with self.policy.compute(self.device):
                hidden = self.model(step, cache=cache).hidden[:, -1]
                logits = self.model.logits(hidden)[
                    :, :limit
                ]  # ids above the tokenizer's are padding of the matrix
            found = sample(logits, [state])[0]
            if found.token < 0:
                raise WeightsError(
                    f"position {cache.length - 1}: {found.error}; the weights of {self.path} are bad, "
                    f"or {self.policy.name} is too narrow for them: try an earlier checkpoint or precision='fp32'"
                )
            state.accept(found.token)
            step = torch.tensor([[found.token]], device=self.device)
            yield found.token

    def _pieces(self, prompt: str | Sequence[int], sampling: SamplingConfig) -> Iterator[str | Completion]:
        """Complete pieces of text, then the ``Completion``."""
        ids, began, out = self.prompt_ids(prompt), time.perf_counter(), list[int]()
        room = min(sampling.max_tokens, self.config.max_length - len(ids))
        sampling = replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))
        first = begins_text(self.tokenizer, ids)
        stream = TextStream(self.tokenizer, sampling, self.tokenizer.end_ids, first=first)
        for token in self.tokens(ids, sampling):
            if piece := stream.push(token):
                yield piece
            if stream.stop != token:
                out.append(token)
            if stream.finish:
                break
        seconds, text = time.perf_counter() - began, stream.text
        emit("generate", prompt=prompt if isinstance(prompt, str) else list(prompt), text=text, tokens=len(out),
             seconds=seconds)  # fmt: skip
        yield Completion(text, out, stream.finish or "length", seconds)

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.tokenizer.vocab_size)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)


def load(path: Path | str, device: str = "auto", precision: str = "fp32") -> LanguageModel:
    """A run, a checkpoint, a Hugging Face directory or a GGUF file, ready to ``generate``.

    Args:
        device: 'auto', 'cpu', 'cuda', …
        precision: compute format, as in ``TrainingConfig.precision_mode``.
    """
    place = pick_device(device)
    return LanguageModel(load_model(path, place), choose(precision, place))


def _options(sampling: SamplingConfig | None, options: dict[str, object]) -> SamplingConfig:
    return replace(sampling or SamplingConfig(), **options)


def _drain(pieces: Iterator[str | Completion]) -> tuple[list[str], Completion]:
    texts, last = [], None
    for piece in pieces:
        if isinstance(piece, Completion):
            last = piece
        else:
            texts.append(piece)
    assert last is not None
    return texts, last
