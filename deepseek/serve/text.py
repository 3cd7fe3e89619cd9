"""From a request's tokens to the text that may be shown: whole characters, nothing that may become a stop text.

Stop texts are found character by character with the automaton of Aho and Corasick (1975), whose state also says
how many of the last characters may still grow into a stop text. So a token costs its own characters, however long
the answer is, and where an answer is cut does not depend on how its text falls into tokens: at the stop text that
is complete first, the longest one if several are.
"""

from __future__ import annotations

import codecs
import contextlib
from collections import deque
from collections.abc import Collection, Sequence
from functools import lru_cache

from deepseek.data import Tokenizer
from deepseek.serve.request import FinishReason
from deepseek.serve.sampler import SamplingConfig


class TextStream:
    """The text of one answer, as its tokens come.

    Args:
        end_ids: the model's end tokens.
        first: no text comes before the answer. Then a tokenizer that writes a word with its space in front, and
            strips the first one when it decodes, strips it here too.

    Attributes:
        finish: 'stop' or 'length' once the answer is over; ``None`` before.
        stop: the stop text, or the id of the end token, that ended it.
        pushed: how many tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: SamplingConfig,
        end_ids: Collection[int] = (),
        *,
        first: bool = False,
    ) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._ends = ends_of(config, end_ids)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = _automaton(config.stop) if config.stop else None
        self._node, self._held, self._skip = 0, "", first and _strips_first_space(tokenizer)
        self._texts, self._most = _texts(tokenizer), config.max_tokens
        self._apart = not self._skip  # the next token's text is its own, whatever came before
        self._easy = self._apart and self._stops is None  # and there is nothing to look for in it
        self._shown: list[str] = []
        self.finish: FinishReason | None = None
        self.stop: str | int | None = None
        self.pushed = 0

    @property
    def text(self) -> str:
        """All that was shown so far."""
        return "".join(self._shown)

    def push(self, token: int) -> str:
        """The text that ``token`` makes showable, perhaps none; after it, look at ``finish``."""
        pushed = self.pushed + 1
        if self._easy and pushed < self._most and token not in self._ends:
            text = self._texts.get(token)
            if text is not None:
                self.pushed = pushed
                self._shown.append(text)
                return text
        return self._push(token)

    def _push(self, token: int) -> str:
        assert self.finish is None, "the answer is over"
        self.pushed += 1
        c = self._config
        if token in self._ends and self.pushed > c.min_tokens:
            self.finish, self.stop, self._easy = "stop", token, False
            last = self._piece(token) if c.include_stop else b""
            return self._show(self._held + self._utf8.decode(last, final=True))
        final = self.pushed >= self._most
        shown = self._take(self._decode(token, final))
        if final and self.finish is None:
            shown += self._let_go("length")
        return self._show(shown)

    def _decode(self, token: int, final: bool) -> str:
        """The characters that ``token`` completes."""
        if self._apart and (text := self._texts.get(token)) is not None:
            return text
        piece = self._piece(token)
        if self._apart and token not in self._tokenizer.special_ids:
            with contextlib.suppress(UnicodeDecodeError):
                self._texts[token] = piece.decode()
        text = self._utf8.decode(piece, final=final)
        self._apart = not self._skip and not self._utf8.getstate()[0]
        self._easy = self._apart and self._stops is None
        return text

    def close(self, finish: FinishReason) -> str:
        """The text held back, when something else ends the answer; nothing if it is over."""
        if self.finish is not None:
            return ""
        self._easy = False
        shown = self._take(self._utf8.decode(b"", final=True))
        if self.finish is None:
            shown += self._let_go(finish)
        return self._show(shown)

    def _piece(self, token: int) -> bytes:
        piece = self._tokenizer.piece(token, skip_special=token not in self._config.shown_ids)
        if self._skip and piece:
            self._skip = False
            return piece.removeprefix(b" ")
        return piece

    def _take(self, new: str) -> str:
        """What may be shown after ``new`` characters; sets ``finish`` at a stop text."""
        if self._stops is None:
            return new
        if not self._node and self._stops.first.isdisjoint(new):
            return new
        text, early = self._held + new, self.pushed < self._config.min_tokens
        at = len(self._held)
        for at, character in enumerate(new, len(self._held) + 1):
            self._node = self._stops.step(self._node, character)
            if (found := self._stops.found[self._node]) and not early:
                self.finish, self.stop, self._held = "stop", found, ""
                return text[: at if self._config.include_stop else at - len(found)]
        keep = self._stops.growing[self._node]
        self._held = text[at - keep :]
        return text[: at - keep]

    def _let_go(self, finish: FinishReason) -> str:
        self.finish, held, self._held = finish, self._held, ""
        return held

    def _show(self, text: str) -> str:
        if text:
            self._shown.append(text)
        return text


def ends_of(config: SamplingConfig, end_ids: Collection[int]) -> frozenset[int]:
    """The tokens that end an answer: ``stop_token_ids``, and the model's ``end_ids`` unless they are ignored.

    A grammar says itself when the answer is over, by an end token, so they are never ignored with one.
    """
    ignored = config.ignore_eos and config.grammar is None
    return frozenset(config.stop_token_ids) | frozenset(() if ignored else end_ids)


def begins_text(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether an answer to ``prompt`` is where the text begins: ``first`` of ``TextStream``."""
    return not any(map(tokenizer.piece, prompt))


@lru_cache(maxsize=8)
def _texts(tokenizer: Tokenizer) -> dict[int, str]:
    """Of tokens that are whole characters, as far as they have been met."""
    return {}


@lru_cache(maxsize=8)
def _strips_first_space(tokenizer: Tokenizer) -> bool:
    """Whether decoding drops the space that the first token of a text begins with."""
    for token in range(tokenizer.vocab_size):
        if token not in tokenizer.special_ids and tokenizer.piece(token).startswith(b" "):
            return not tokenizer.decode([token]).startswith(" ")
    return False


class _Automaton:
    """All stop texts in one trie with failure links; node 0 is the root.

    Attributes:
        found: the longest stop text that ends at each node, or ''.
        growing: how many of the last characters may still become part of a stop text.
        first: the characters that stop texts begin with.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail, self.found, depth = [0], [""], [0]
        for stop in stops:
            node = 0
            for character in stop:
                if character not in self._next[node]:
                    self._next[node][character] = len(self._next)
                    depth.append(depth[node] + 1)
                    self._next.append({})
                    self._fail.append(0)
                    self.found.append("")
                node = self._next[node][character]
            self.found[node] = stop
        self.first = frozenset(self._next[0])
        self.growing = [0] * len(depth)
        waiting = deque(self._next[0].values())
        while waiting:  # by depth, so that a failure link's target is finished first
            node = waiting.popleft()
            fail = self._fail[node]
            self.found[node] = self.found[node] or self.found[fail]
            self.growing[node] = depth[node] if self._next[node] else self.growing[fail]
            for character, child in self._next[node].items():
                self._fail[child] = self.step(fail, character)
                waiting.append(child)

    def step(self, node: int, character: str) -> int:
        while node and character not in self._next[node]:
            node = self._fail[node]
        return self._next[node].get(character, 0)


@lru_cache(maxsize=256)
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    return _Automaton(stops)
