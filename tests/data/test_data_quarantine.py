"""Documents that are never trained on again, and batches that are left out: nothing else moves."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.batch import IGNORE, Batch
from deepseek.data import Loader, StoreWriter, TokenStore
from deepseek.data.quarantine import (
    Quarantined,
    add_to_quarantine,
    bring_forward,
    delivered_index,
    is_skipped,
    merged,
    read_quarantine,
)
from deepseek.errors import DataError

ROWS, LENGTH = 6, 32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """90 documents of two sources, three to a file; ids tell the document: 10 + 200 * document + position."""
    path = tmp_path_factory.mktemp("store") / "s"
    sizes = np.random.default_rng(0).integers(1, 120, 90)
    with StoreWriter(path, vocab_size=60_000, eos_id=0, pad_id=1, tokenizer="t", sources=["a", "b"]) as out:
        for i, size in enumerate(sizes.tolist()):
            out.add(10 + 200 * i + np.arange(size), size, source=i % 2, path=f"{i // 6}.txt", offset=i)
    return TokenStore(path)


def loader(store: TokenStore, prefetch: int = 0, rank: int = 0, world: int = 1, rows: int = ROWS) -> Loader:
    return Loader(store, rows=rows, length=LENGTH, prefetch=prefetch, rank=rank, world=world)


def named(store: TokenStore, *documents: int) -> list[Quarantined]:
    return [Quarantined(*store.provenance(d)) for d in documents]


def pairs(batch: Batch) -> Counter[tuple[int, int]]:
    counted = batch.targets != IGNORE
    return Counter(zip(batch.tokens[counted].tolist(), batch.targets[counted].tolist()))


def pairs_of(store: TokenStore, documents: set[int]) -> set[tuple[int, int]]:
    return {pair for d in documents for pair in pairwise(store.tokens(d).tolist())}


def equal(a: Batch, b: Batch) -> bool:
    both = zip(
        (a.tokens, a.targets, a.documents, a.positions), (b.tokens, b.targets, b.documents, b.positions)
    )
    return (
        all(torch.equal(x, y) for x, y in both if x is not None and y is not None)
        and a.n_targets == b.n_targets
    )


@pytest.mark.parametrize("prefetch", [0, 3])
def test_quarantined_documents_are_gone_and_everything_else_is_where_it_was(
    store: TokenStore, prefetch: int
) -> None:
    banned = {3, 17, 40, 41}
    plain, with_less = loader(store), loader(store, prefetch)
    for _ in range(5):
        assert equal(next(plain), next(with_less))
    assert with_less.exclude(named(store, *banned)) == 4
    gone = pairs_of(store, banned)
    lost = 0
    for n in range(5, 60):  # several epochs
        want, got = next(plain), next(with_less)
        assert plain.state_dict().items() <= with_less.state_dict().items()
        expected = Counter({p: k for p, k in pairs(want).items() if p not in gone})
        # EOS → first token may be shared by no two documents: ids are unique, so pairs are
        assert pairs(got) == expected
        assert got.n_targets == sum(expected.values())
        lost += want.n_targets - got.n_targets
        assert not {(s.path, s.offset) for s in with_less.provenance(n)} & {
            store.provenance(d)[1:] for d in banned
        }
    assert lost > 0
    with_less.close()


@settings(deadline=None, max_examples=25)
@given(
    data=st.data(),
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    banned=st.sets(st.integers(0, 89), max_size=8),
    at=st.integers(0, 12),
    skips=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 3)), max_size=3),
)
def test_any_history_of_resumes_and_world_sizes_delivers_the_same(
    store: TokenStore,
    data: st.DataObject,
    cuts: list[int],
    banned: set[int],
    at: int,
    skips: list[tuple[int, int]],
) -> None:
    """Quarantine after ``at`` batches and skips from the start, against a single loader that never stopped."""
    ranges = [(a, a + n) for a, n in skips]
    whole = loader(store)
    whole.skip(ranges)
    want = []
    for n in range(sum(cuts)):
        if n == at:
            whole.exclude(named(store, *banned))
        want.append(pairs(next(whole)))

    state, done, got = None, 0, []
    for cut in cuts:
        world = data.draw(st.sampled_from([1, 2, 3]))
        parts = [
            loader(store, prefetch=data.draw(st.sampled_from([0, 2])), rank=r, world=world)
            for r in range(world)
        ]
        for part in parts:
            if state is not None:
                part.load_state_dict(json.loads(json.dumps(state)))
            else:
                part.skip(ranges)
        for _ in range(cut):
            if done == at:
                for part in parts:
                    part.exclude(named(store, *banned))
            batches = [next(part) for part in parts]
            got.append(sum((pairs(b) for b in batches), Counter()))
            assert {b.n_targets for b in batches} == {sum(got[-1].values())}
            done += 1
        states = [part.state_dict() for part in parts]
        assert all(s == states[0] for s in states)
        state = states[0]
        for part in parts:
            part.close()
    assert got == want


def test_skipped_batches_are_left_out_once_and_the_rest_follow(store: TokenStore) -> None:
    plain, skipping = loader(store), loader(store, prefetch=2)
    batches = [next(plain) for _ in range(20)]
    next(skipping), next(skipping)
    skipping.skip([(4, 6), (7, 7), (11, 11)])
    assert skipping.skips == ((4, 7), (11, 11))
    numbers = []
    for _ in range(10):
        batch = next(skipping)
        assert skipping.last is not None
        numbers.append(skipping.last.number)
        assert equal(batch, batches[numbers[-1]])
        assert skipping.provenance(numbers[-1]) == plain.provenance(numbers[-1])
    assert numbers == [2, 3, 8, 9, 10, 12, 13, 14, 15, 16]
    assert skipping.batch == 17
    skipping.close()


def test_peeking_does_not_move(store: TokenStore) -> None:
    plain, other = loader(store), loader(store, prefetch=2)
    batches = [next(plain) for _ in range(12)]
    state = None
    for n in range(9):
        if n == 4:
            state = other.state_dict()
        assert equal(next(other), batches[n])
        assert equal(other.peek(max(0, n - 3)).batch, batches[max(0, n - 3)])
        assert equal(other.peek(n + 2).batch, batches[n + 2])
    assert state is not None
    assert equal(other.peek(state).batch, batches[4])
    assert other.batch == 9
    other.close()


@given(
    skips=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=5),
    start=st.integers(0, 30),
    n=st.integers(0, 30),
)
def test_delivered_index_counts_what_is_not_skipped(skips: list[tuple[int, int]], start: int, n: int) -> None:
    ranges = merged([(a, a + k) for a, k in skips])
    delivered = [i for i in range(start, start + 100) if not is_skipped(ranges, i)]
    assert delivered_index(ranges, start, n) == delivered[n]
    assert {i for a, k in skips for i in range(a, a + k + 1)} == {
        i for a, b in ranges for i in range(a, b + 1)
    }


def test_the_file_keeps_each_document_once_from_its_first_step_on(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    assert read_quarantine(path) == []
    one, two = Quarantined("a", "x/你.txt", 0), Quarantined("a", "y.txt", None)
    assert [q.from_step for q in add_to_quarantine(path, [one], from_step=9, by="me", reason="noise")] == [9]
    assert [q.path for q in add_to_quarantine(path, [one, two], from_step=20)] == ["y.txt"]
    held = read_quarantine(path)
    assert [(q.key, q.from_step) for q in held] == [(one.key, 9), (two.key, 20)]
    assert (held[0].by, held[0].reason) == ("me", "noise")
    bring_forward(path, 11)
    assert [q.from_step for q in read_quarantine(path)] == [9, 11]


def test_what_is_no_document_is_refused_with_the_way_out(store: TokenStore, tmp_path: Path) -> None:
    held = loader(store)
    with pytest.raises(
        DataError, match="no source is called 'aa' \\(did you mean 'a'\\?\\); there are: a, b"
    ):
        held.exclude([Quarantined("aa", "0.txt", 0)])
    with pytest.raises(
        DataError, match=r"'0\.txt' of 'a' has no document at offset 3; the nearest begins at [24]"
    ):
        held.exclude([Quarantined("a", "0.txt", 3)])
    with pytest.raises(DataError, match=r"no training document 'z\.txt'"):
        held.exclude([Quarantined("a", "z.txt", None)])
    assert held.exclude([Quarantined("a", "z.txt", None)], missing_ok=True) == 0
    assert held.exclude([Quarantined("a", "0.txt", None)]) == 3  # every document of the file
    for bad in (
        {},
        {"source": "a", "path": "p", "offset": -1},
        {"source": "a", "path": "p", "offset": True},
        3,
    ):
        with pytest.raises(DataError):
            Quarantined.of(bad)
    for ranges in ([(3, 2)], [(-1, 2)], [(1, 2, 3)], [(True, 2)]):
        with pytest.raises(DataError, match="a range of batches"):
            merged(ranges)
    (tmp_path / "q.jsonl").write_text('{"source": "a", "path": "p"}\n{"source"\n')
    with pytest.raises(DataError, match=r"q\.jsonl, line 2"):
        read_quarantine(tmp_path / "q.jsonl")
