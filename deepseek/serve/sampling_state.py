"""What sampling remembers of one request: its answer, its random numbers, what its penalties count.

A request's randomness is a table: place ``p`` of its answer has one uniform number, the output of Philox
(Salmon et al. 2011) under the request's seed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deepseek.errors import RequestError
from deepseek.serve.distribution import COLDEST
from deepseek.serve.grammar import GrammarState
from deepseek.serve.sampling_config import SamplingConfig
from deepseek.serve.text import ends_of

_BLOCK = 64  # uniform numbers are made so many at a time

Numbers = npt.NDArray[np.int64]


class Updates(NamedTuple):
    """Tokens whose scores penalties change: ``score = (score / or * factor) - amount``."""

    ids: Numbers
    amounts: npt.NDArray[np.float32]


class SamplingState:
    """What sampling remembers of one request.

    Args:
        prompt: token ids; the repetition penalty counts them.
        seed: 0 … 2^63 - 1; the engine chooses one where ``config.seed`` is ``None``.
        vocabulary: columns of the logits, i.e. ids that can be drawn.
        grammar: a matcher of this request's own, if it has a grammar.
        end_ids: the model's end tokens.

    Attributes:
        tokens: the answer so far.
        ends: the tokens that end the answer: ``stop_token_ids``, and ``end_ids`` unless they are ignored (a
            grammar says itself when it is over, so it never ignores them).
        greedy: the most likely token is taken.
        foreseeable: what changes a place's scores does not depend on the tokens before it, so that the place can be
            drawn before they are known here.
        plain: nothing changes scores at all.
        counts, bias, banned: what penalties change; ``logit_bias``; the ``ends`` that can be drawn.

    Raises:
        RequestError: ``logit_bias`` names a token that the model does not have.
    """

    def __init__(
        self,
        config: SamplingConfig,
        prompt: Sequence[int],
        seed: int,
        vocabulary: int,
        grammar: GrammarState | None = None,
        *,
        end_ids: Collection[int] = (),
    ) -> None:
        if outside := [token for token in config.logit_bias if token >= vocabulary]:
            raise RequestError(
                f"logit_bias names token {outside[0]}, the vocabulary has {vocabulary} tokens", "logit_bias"
            )
        self.config, self.seed, self.vocabulary, self.grammar = config, seed, vocabulary, grammar
        self.tokens: list[int] = []
        self.ends = ends_of(config, end_ids)
        self.greedy = config.temperature < COLDEST or config.top_k == 1
        self.banned = np.array(sorted(i for i in self.ends if i < vocabulary), np.int64)
        self.bias = Updates(
            np.array(list(config.logit_bias), np.int64),
            np.array(list(config.logit_bias.values()), np.float32),
        )
        self.counts = Counts(config, prompt, vocabulary)
        self.foreseeable = grammar is None and not self.counts.on
        self.plain = self.foreseeable and not (len(self.bias.ids) or config.min_tokens)
        self._uniform: npt.NDArray[np.float64] = np.empty(0)
        self._first = 0  # the place of the first of them

    def accept(self, token: int) -> None:
        """``token`` is part of the answer: penalties count it, the grammar goes on."""
        self.tokens.append(token)
        if not self.foreseeable:
            self.counts.add(token)
            if self.grammar is not None:
                self.grammar.accept(token)

    def uniform(self, place: int) -> float:
        """The random number in [0, 1) of the answer's token ``place``."""
        return float(self.uniforms(place, 1)[0])

    def uniforms(self, place: int, count: int) -> npt.NDArray[np.float64]:
        """The random numbers of ``count`` places from ``place`` on; to look at."""
        at = place - self._first
        if at < 0 or at + count > len(self._uniform):
            first, last = place // _BLOCK, (place + count - 1) // _BLOCK
            self._uniform = np.concatenate([_block(self.seed, i) for i in range(first, last + 1)])
            self._first, at = first * _BLOCK, place - first * _BLOCK
        return self._uniform[at : at + count]


def _block(seed: int, block: int) -> npt.NDArray[np.float64]:
    raw = np.random.Philox(key=seed, counter=block * _BLOCK).random_raw(_BLOCK)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Counts:
    """Which tokens a request's penalties touch, how often each was generated, and what that takes from its score.

    It grows by one slot a token.
    """

    def __init__(self, config: SamplingConfig, prompt: Sequence[int], vocabulary: int) -> None:
        self.presence, self.frequency = config.presence_penalty, config.frequency_penalty
        repeats = config.repetition_penalty != 1.0
        self.on = repeats or bool(self.presence or self.frequency)
        seen = np.unique(np.asarray(prompt if repeats else [], np.int64))
        seen = seen[(seen >= 0) & (seen < vocabulary)]
        self._size, self._vocabulary = len(seen), vocabulary
        self._ids = np.zeros(max(64, 2 * len(seen)), np.int64)
        self._ids[: len(seen)] = seen
        self._times = [0] * len(seen)
        self._amounts = np.zeros(len(self._ids), np.float32)
        self._slots = {int(token): slot for slot, token in enumerate(seen)} if self.on else {}

    def add(self, token: int) -> None:
        if not self.on or not 0 <= token < self._vocabulary:
            return
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = self._size
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._amounts = np.concatenate([self._amounts, np.zeros_like(self._amounts)])
            self._ids[slot] = token
            self._times.append(0)
            self._size += 1
        self._set(slot, self._times[slot] + 1)

    def mark(self) -> int:
        return self._size

    def remove(self, tokens: Iterable[int], mark: int) -> None:
        """Undo the ``add`` of ``tokens``, since ``mark``."""
        for token in tokens:
            if self.on and 0 <= token < self._vocabulary:
                slot = self._slots[token]
                self._set(slot, self._times[slot] - 1)
        while self._size > mark:
            self._size -= 1
            self._times.pop()
            del self._slots[int(self._ids[self._size])]

    def updates(self) -> Updates:
        """To look at, before anything is added."""
        return Updates(self._ids[: self._size], self._amounts[: self._size])

    def _set(self, slot: int, times: int) -> None:
        self._times[slot] = times
        self._amounts[slot] = self.presence * (times > 0) + self.frequency * times
