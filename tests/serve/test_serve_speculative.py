"""The n-gram proposer against a search of the whole text, its cost, and how its drafts' length follows their luck."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.serve.speculative import NgramProposer


def searched(tokens: Sequence[int], longest: int, shortest: int, count: int) -> list[int]:
    """What followed the newest earlier place of the longest n-gram that ends the text; goes round if it must."""
    for size in range(longest, shortest - 1, -1):
        if size > len(tokens):
            continue
        gram = list(tokens[-size:])
        for end in range(len(tokens) - 1, size - 1, -1):
            if list(tokens[end - size : end]) == gram:
                longer = list(tokens)
                while len(longer) < len(tokens) + count:
                    longer.append(longer[end + len(longer) - len(tokens)])
                return longer[len(tokens) :]
    return []


@settings(max_examples=400, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    longest=st.integers(1, 5),
    shortest=st.integers(1, 5),
    most=st.integers(0, 4),
)
def test_drafts_are_what_followed_last_time(
    text: list[int], cuts: list[int], longest: int, shortest: int, most: int
) -> None:
    longest, shortest = max(longest, shortest), min(longest, shortest)
    proposer = NgramProposer(longest, shortest)
    borders = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    for a, b in itertools.pairwise(borders):  # told in pieces
        proposer.extend(text[a:b])
        assert proposer.propose(most) == searched(text[:b], longest, shortest, most)


@pytest.mark.parametrize("seed", range(20))
def test_a_long_prompt_is_indexed_like_a_short_one(seed: int) -> None:
    dice = random.Random(seed)
    text = [dice.randrange(8) for _ in range(400)]
    proposer, begin = NgramProposer(4, 1), dice.randrange(5)
    proposer.extend(text[:begin])
    proposer.extend(text[begin:300])
    for end in range(300, 400):
        assert proposer.propose(4) == searched(text[:end], 4, 1, 4)
        proposer.extend(text[end : end + 1])


def test_only_the_end_of_a_very_long_prompt_is_indexed() -> None:
    proposer = NgramProposer(2, 2, known=100)
    proposer.extend([1, 2, 3, *range(1000, 1200), 5, 6, 7, *range(2000, 2050), 1, 2])
    assert proposer.propose(4) == []
    proposer.extend([5, 6])
    assert proposer.propose(2) == [7, 2000]


def test_a_text_that_repeats_itself_is_drafted_on() -> None:
    proposer = NgramProposer()
    proposer.extend([7, 8, 9] * 3)
    proposer.learn(4, 4)
    assert proposer.propose(8) == [7, 8, 9, 7, 8, 9, 7, 8]


def test_right_drafts_grow_and_wrong_ones_shrink() -> None:
    proposer = NgramProposer()
    proposer.extend([*range(100), 0, 1, 2, 3])
    assert len(proposer.propose(99)) == 4
    proposer.learn(4, 4)
    proposer.learn(8, 8)
    assert len(proposer.propose(99)) == 16
    assert len(proposer.propose(5)) == 5
    proposer.learn(16, 2)
    assert len(proposer.propose(99)) == 3
    proposer.learn(0, 0)  # nothing was drafted: nothing is learnt
    assert len(proposer.propose(99)) == 3


def test_useless_drafts_stop() -> None:
    """Text that repeats its n-grams but never goes on as before: few tokens are drafted for nothing."""
    dice, proposer, drafted = random.Random(0), NgramProposer(2, 1), 0
    for _ in range(2000):
        token = dice.randrange(40)
        draft = proposer.propose(8)
        drafted += len(draft)
        right = 0
        while right < len(draft) and draft[right] == token:
            right += 1
        proposer.learn(len(draft), right)
        proposer.extend([token])
    assert 0 < drafted < 150  # without a pause over 1,900


def test_useful_drafts_come_back_after_a_pause() -> None:
    proposer = NgramProposer()
    proposer.extend([1, 2, 3, 4, 5, 1, 2, 3])
    for _ in range(2):
        proposer.learn(4, 0)
    assert proposer.propose(4) == []
    proposer.extend([4, 5, 1])
    assert proposer.propose(4) == []
    proposer.extend([2])
    assert len(proposer.propose(4)) == 1
    proposer.learn(1, 1)
    assert len(proposer.propose(4)) == 2


class Counted(list[int]):
    """Tokens, and how many of them were read."""

    read = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.read += len(found) if isinstance(key, slice) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        self.read += len(self)
        return super().__iter__()


class CountedTable(dict[int, int]):
    """A table, and how often it was asked or changed."""

    used = 0

    def get(self, *args: Any) -> Any:
        self.used += 1
        return super().get(*args)

    def __setitem__(self, *args: Any) -> None:
        self.used += 1
        super().__setitem__(*args)

    def __iter__(self) -> Iterator[int]:
        self.used += len(self)
        return super().__iter__()


@pytest.mark.parametrize("period", [5, 10**9])
def test_a_token_costs_the_same_in_a_long_text(period: int) -> None:
    """In tokens of the text that are read, and in look-ups; seconds depend on who else uses the machine."""

    def cost(length: int) -> tuple[int, int]:
        proposer = NgramProposer()
        proposer.extend([i % period for i in range(length)])
        proposer._tokens, proposer._places = Counted(proposer._tokens), CountedTable(proposer._places)
        for i in range(2000):
            proposer.extend([(length + i) % period])
            proposer.propose(8)
        return proposer._tokens.read, proposer._places.used

    assert cost(200_000) == cost(2_000)
    assert cost(200_000)[0] <= 2000 * (
        3 + 2 + 2 * 8
    )  # the n-grams at the end, and a draft that repeats itself
    assert cost(200_000)[1] == 2000 * 2 * 2
