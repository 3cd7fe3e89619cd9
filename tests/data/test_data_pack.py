"""Packing, permutations and mixtures: nothing lost, nothing twice, shares met."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.data.mixture import Mixture, Permutation
from deepseek.data.pack import cut, fill_rate, pack
from deepseek.errors import ConfigError, DataError


@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=60), length=st.integers(1, 64))
def test_pieces_cover_every_input_once(sizes: list[int], length: int) -> None:
    pieces = cut(np.array(sizes), length)
    seen = [
        (d, i)
        for d, s, n in zip(pieces.document.tolist(), pieces.start.tolist(), pieces.length.tolist())
        for i in range(s, s + n)
    ]
    assert seen == [(d, i) for d, size in enumerate(sizes) for i in range(size)]
    assert pieces.length.max() <= length
    assert pieces.length.min() >= 1


@given(lengths=st.lists(st.integers(1, 50), max_size=200), spare=st.integers(0, 30))
def test_rows_hold_every_piece_once_and_never_overflow(lengths: list[int], spare: int) -> None:
    capacity = max(lengths, default=1) + spare
    array = np.array(lengths, np.int64)
    rows = pack(array, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    # No two rows could have been one: the second was opened because nothing fitted into the first.
    loads = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


def test_packing_fills_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 512, 4000)
    assert fill_rate(lengths, pack(lengths, 512), 512) > 0.98


@settings(deadline=None)
@given(n=st.integers(1, 5000), key=st.binary(max_size=8))
def test_permutations_are_permutations(n: int, key: bytes) -> None:
    order = Permutation(n, key)(np.arange(n))
    assert sorted(order.tolist()) == list(range(n))
    some = np.arange(n)[:: max(1, n // 7)]
    assert Permutation(n, key)(some).tolist() == order[some].tolist()


def test_permutations_differ_and_spread() -> None:
    n = 10_000
    first, second = (Permutation(n, k)(np.arange(n)) for k in (b"0", b"1"))
    assert np.mean(first == second) < 0.01
    assert abs(np.corrcoef(np.arange(n), first)[0, 1]) < 0.05
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05
    large = Permutation(10**12, b"big")(np.array([0, 1, 10**12 - 1]))
    assert ((large >= 0) & (large < 10**12)).all()


def test_shares_are_met_at_every_moment() -> None:
    rng = np.random.default_rng(1)
    sizes = [rng.integers(10, 400, n) for n in (50, 300, 20, 40)]
    weights = [1.0, 3.0, 0.5, 0.0]
    mixture = Mixture(sizes, weights, seed=3)
    cursor, drawn, largest = mixture.start(), np.zeros(4), 400
    for _ in range(40):
        sources, documents, cursor = mixture.take(cursor, 2000)
        for s, d in zip(sources.tolist(), documents.tolist()):
            drawn[s] += sizes[s][d]
            assert (np.abs(drawn - np.array(weights) / 4.5 * drawn.sum()) <= 3 * largest).all()
    assert drawn[3] == 0
    assert cursor.drawn == drawn.tolist()


def test_each_epoch_of_a_source_sees_every_document_once() -> None:
    sizes = [np.full(37, 10), np.full(5000, 10)]
    mixture = Mixture(sizes, [1.0, 1.0], seed=0)
    cursor, seen = mixture.start(), {0: list[int](), 1: list[int]()}
    while cursor.epoch[1] < 2:
        sources, documents, cursor = mixture.take(cursor, 777)
        for s, d in zip(sources.tolist(), documents.tolist()):
            seen[s].append(d)
    for s, n in ((0, 37), (1, 5000)):
        first, second = seen[s][:n], seen[s][n : 2 * n]
        assert sorted(first) == sorted(second) == list(range(n))
        assert first != second


def test_impossible_mixtures() -> None:
    one = [np.array([5])]
    with pytest.raises(DataError, match="empty"):
        Mixture(one, [0.0], 0)
    with pytest.raises(ConfigError, match="2 weights for 1"):
        Mixture(one, [1.0, 1.0], 0)
    with pytest.raises(ConfigError, match=">= 0"):
        Mixture(one, [-1.0], 0)
    with pytest.raises(ConfigError, match="finite"):
        Mixture(one, [float("nan")], 0)
