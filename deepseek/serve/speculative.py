"""Guessing the next tokens cheaply, so that the model checks several in one step.

What is guessed changes only the speed: ``sampling.sample_drafts`` keeps of a draft what it would have drawn
anyway. ``NgramProposer`` guesses that what followed the last few tokens before will follow them again ("prompt
lookup"), which costs no model: good for answers that quote their prompt, edit code, or repeat themselves.

The seam for a trained draft head (multi-token prediction, arXiv 2404.19737; DeepSeek-V3's MTP module): a
``Proposer`` per request that the engine tells every accepted token. A head reads hidden states, too; it is a
``Proposer`` whose ``propose`` runs the head on the last accepted position's hidden state, which the engine's
decoder can keep per row (``Step.hidden``), and drafts token after token up to ``most``. Nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

_MULTIPLIER, _MASK = 6364136223846793005, 2**64 - 1  # Knuth's, for 64 bits


class Proposer(Protocol):
    """Drafts for one request; knows the tokens it was told."""

    def extend(self, tokens: Sequence[int]) -> None:
        """``tokens`` follow those told before: first the prompt, later what was accepted."""

    def propose(self, most: int) -> list[int]:
        """What may come next, at most ``most`` tokens, perhaps none."""

    def learn(self, drafted: int, accepted: int) -> None:
        """Of the last draft, as many tokens were checked, and as many were right."""


class NgramProposer:
    """Looks the last tokens up in what came before: longest match first, newest place first.

    A table has the newest place of every n-gram, so a token costs ``longest - shortest + 1`` look-ups however long
    the text is. The draft's length follows its luck: it doubles when all of it was right and falls to what was
    right when not; after ``patience`` drafts in a row without a right token it pauses, twice as long every time,
    up to 64 tokens.

    Args:
        longest, shortest: of the n-grams looked up, in tokens.
        known: tokens of the prompt that are indexed, its last ones; each takes about 200 bytes per length.
    """

    def __init__(self, longest: int = 3, shortest: int = 2, patience: int = 2, known: int = 65_536) -> None:
        assert 1 <= shortest <= longest
        self._sizes, self._patience, self._most_known = range(longest, shortest - 1, -1), patience, known
        self._tokens: list[int] = []
        self._places: dict[int, int] = {}  # hash of an n-gram -> where its continuation begins
        self._last: list[
            int
        ] = []  # where the n-grams that end the text were before, longest first; -1: nowhere
        self._length, self._misses, self._pause, self._rest = 4, 0, 4, 0

    def extend(self, tokens: Sequence[int]) -> None:
        if len(tokens) > 64:
            self._index(tokens[:-1])
            tokens = tokens[-1:]
        known, places = self._tokens, self._places
        for token in tokens:
            known.append(token)
            end, self._last = len(known), []
            for size in self._sizes:
                if size <= end:
                    key = size
                    for part in known[-size:]:
                        key = (key * _MULTIPLIER + part) & _MASK
                    self._last.append(places.get(key, -1))
                    places[key] = end
        self._rest = max(0, self._rest - len(tokens))

    def _index(self, tokens: Sequence[int]) -> None:
        """Add many tokens at once, a hundred times as fast."""
        overlap = min(len(self._tokens), self._sizes[0] - 1)
        self._tokens.extend(tokens)
        first = len(self._tokens) - min(len(tokens) + overlap, self._most_known)
        text = np.array(self._tokens[first:], np.uint64)
        for size in self._sizes:
            count = len(text) - size + 1
            if count < 1:
                continue
            keys = np.full(count, size, np.uint64)
            for part in range(size):
                keys = keys * np.uint64(_MULTIPLIER) + text[part : part + count]
            self._places.update(zip(keys.tolist(), range(first + size, first + size + count)))

    def propose(self, most: int) -> list[int]:
        if self._rest or most < 1:
            return []
        at = next((place for place in self._last if place >= 0), -1)
        if at < 0:
            return []
        wanted = min(most, self._length)
        draft = self._tokens[at : at + wanted]
        period = len(self._tokens) - at  # a text that repeats itself goes on doing so
        while len(draft) < wanted:
            draft.append(draft[len(draft) - period])
        return draft

    def learn(self, drafted: int, accepted: int) -> None:
        if not drafted:
            return
        if accepted == drafted:
            self._length = min(2 * self._length, 64)
        else:
            self._length = max(1, accepted + 1)
        if accepted:
            self._misses, self._pause = 0, 4
            return
        self._misses += 1
        if self._misses >= self._patience:
            self._rest, self._pause = self._pause, min(2 * self._pause, 64)
