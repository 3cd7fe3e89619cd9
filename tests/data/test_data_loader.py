"""The loader: every target once an epoch, exact resume over any history of stops and world sizes, clean
threads.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek.batch import IGNORE, Batch
from deepseek.data import Loader, StoreWriter, TokenStore, eval_batches
from deepseek.errors import ConfigError, DataError

VOCAB = 70_000
BYTES = np.arange(VOCAB, dtype=np.int32) % 7
BYTES[0] = 0


def make_store(path: Path, sizes: list[int], sources: list[str], seed: int = 0) -> TokenStore:
    """Documents whose tokens tell where they are: id = 10 + 200 * document + position."""
    with StoreWriter(path, vocab_size=VOCAB, eos_id=0, pad_id=1, tokenizer="t", sources=sources) as out:
        for i, size in enumerate(sizes):
            ids = 10 + 200 * i + np.arange(size)
            out.add(ids, int(BYTES[ids].sum()), source=i % len(sources), path=f"{i}.txt", offset=i)
    return TokenStore(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    sizes = np.random.default_rng(0).integers(1, 150, 300).tolist()
    return make_store(tmp_path_factory.mktemp("store") / "s", sizes, ["only"])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    sizes = np.random.default_rng(1).integers(1, 150, 300).tolist()
    return make_store(tmp_path_factory.mktemp("store") / "m", sizes, ["a", "b", "c"])


def pairs(batch: Batch) -> Counter[tuple[int, int]]:
    """How often each (input, target) occurs among the counted targets."""
    counted = batch.targets != IGNORE
    return Counter(zip(batch.tokens[counted].tolist(), batch.targets[counted].tolist()))


def all_pairs(store: TokenStore) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for i in range(len(store)):
        ids = store.tokens(i).tolist()
        found.update(pairwise(ids))
    return found


def check_batch(batch: Batch) -> None:
    """The promises of ``Batch``, position by position."""
    assert batch.documents is not None
    assert batch.positions is not None
    assert (batch.tokens.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
    assert (batch.documents.dtype, batch.positions.dtype) == (torch.int32, torch.int32)
    assert ((batch.documents == -1) == (batch.targets == IGNORE)).all()
    for r in range(batch.rows):
        documents, positions = batch.documents[r].tolist(), batch.positions[r].tolist()
        starts = [i for i, d in enumerate(documents) if i == 0 or d != documents[i - 1]]
        assert len({documents[i] for i in starts}) == len(starts)
        for i, (before, here) in enumerate(pairwise(documents), 1):
            assert positions[i] == (positions[i - 1] + 1 if before == here else 0)
            if here != -1 and before == here:
                assert batch.tokens[r, i] == batch.targets[r, i - 1]


def same(a: Batch, b: Batch) -> bool:
    tensors = ("tokens", "targets", "documents", "positions")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in tensors) and (a.n_targets, a.n_bytes) == (
        b.n_targets,
        b.n_bytes,
    )


@pytest.mark.parametrize("length", [7, 64, 300])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_every_target_comes_exactly_once_an_epoch(store: TokenStore, length: int, prefetch: int) -> None:
    found: Counter[tuple[int, int]] = Counter()
    n_bytes = n_targets = 0
    with Loader(store, rows=5, length=length, token_bytes=BYTES, epochs=2, prefetch=prefetch) as loader:
        for batch in loader:
            check_batch(batch)
            assert batch.tokens.shape == (5, length)
            found += pairs(batch)
            assert sum(pairs(batch).values()) == batch.n_targets
            n_targets, n_bytes = n_targets + batch.n_targets, n_bytes + batch.n_bytes
    assert found == all_pairs(store) + all_pairs(store)
    assert (n_targets, n_bytes) == (2 * store.n_tokens, 2 * store.n_bytes)


def test_epochs_differ_and_follow_each_other(store: TokenStore) -> None:
    loader = Loader(store, rows=1, length=64, prefetch=0)
    epochs: list[list[int]] = [[], []]
    while loader.epoch < 2:
        epoch = loader.epoch
        epochs[epoch] += [t for t in next(loader).targets.flatten().tolist() if t != IGNORE]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    first = [t for t in epochs[0] if t]
    assert first != sorted(first)


def test_ranks_share_one_global_batch(store: TokenStore) -> None:
    whole = Loader(store, rows=6, length=64, token_bytes=BYTES, prefetch=0)
    ranks = [
        Loader(store, rows=6, length=64, token_bytes=BYTES, rank=r, world=3, prefetch=2) for r in range(3)
    ]
    for _ in range(20):
        expected, parts = next(whole), [next(r) for r in ranks]
        for r, part in enumerate(parts):
            assert torch.equal(part.tokens, expected.tokens[r::3])
            assert (part.n_targets, part.n_bytes) == (expected.n_targets, expected.n_bytes)
        assert expected.n_targets == int((expected.targets != IGNORE).sum())
        assert expected.n_bytes == int(BYTES[expected.targets[expected.targets != IGNORE].numpy()].sum())
        assert all(r.state_dict() == whole.state_dict() for r in ranks)
    for loader in ranks:
        loader.close()


history = st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 2, 3, 4, 6, 12])), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=history, prefetch=st.sampled_from([0, 1, 4]), several=st.booleans(), seed=st.integers(0, 3))
def test_any_history_of_resumes_and_world_sizes_gives_the_same_rows(
    store: TokenStore,
    mixed: TokenStore,
    history: list[tuple[int, int]],
    prefetch: int,
    several: bool,
    seed: int,
) -> None:
    options: dict[str, Any] = {"rows": 12, "length": 48, "seed": seed, "token_bytes": BYTES}
    if several:
        options["weights"] = {"a": 3.0, "b": 1.0, "c": 0.5}
    data = mixed if several else store
    straight = Loader(data, **options, prefetch=0)
    state: dict[str, Any] | None = None
    for batches, world in history:
        loaders = [Loader(data, **options, rank=r, world=world, prefetch=prefetch) for r in range(world)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(batches):
            expected = next(straight)
            for r, part in enumerate(next(loader) for loader in loaders):
                mine = {
                    n: getattr(expected, n)[r::world] for n in ("tokens", "targets", "documents", "positions")
                }
                assert same(part, Batch(**mine, n_targets=expected.n_targets, n_bytes=expected.n_bytes))
        states = [loader.state_dict() for loader in loaders]
        assert all(s == straight.state_dict() for s in states)
        state = states[0]
        for loader in loaders:
            loader.close()


@pytest.mark.parametrize("length", [16, 64, 3000])
def test_starts_are_those_of_the_documents(store: TokenStore, length: int) -> None:
    with Loader(store, rows=4, length=length, epochs=1, shuffle=False) as loader:
        for batch in loader:
            assert batch.documents is not None
            assert batch.starts is not None
            assert batch.starts.dtype == torch.int32
            slots = batch.starts.shape[1]
            assert slots & (slots - 1) == 0
            for ids, starts in zip(batch.documents.tolist(), batch.starts.tolist()):
                changes = [t for t in range(length) if t == 0 or ids[t] != ids[t - 1]]
                assert starts == changes + [length] * (slots - len(changes))


def test_the_batch_size_may_change_at_a_resume(store: TokenStore) -> None:
    straight = Loader(store, rows=60, length=48, prefetch=0)
    rows = list(next(straight).tokens)
    first = Loader(store, rows=10, length=48, prefetch=0)
    got = list(next(first).tokens)
    second = Loader(store, rows=25, length=48, prefetch=0)
    second.load_state_dict(first.state_dict())
    got += list(next(second).tokens) + list(next(second).tokens)
    assert all(torch.equal(a, b) for a, b in zip(got, rows))


def test_state_is_small_and_loading_twice_changes_nothing(mixed: TokenStore) -> None:
    loader = Loader(mixed, rows=4, length=64)
    for _ in range(3):
        next(loader)
    state = loader.state_dict()
    assert len(json.dumps(state)) < 500
    kept, after = copy.deepcopy(state), next(loader)
    loader.load_state_dict(state)
    loader.load_state_dict(state)
    assert same(next(loader), after)
    assert state == kept
    loader.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "another seed.*seed=0.*seed=1"),
        ({"length": 32}, "another length.*length=64.*length=32"),
        ({"weights": {"a": 2.0}}, "another mixture"),
    ],
)
def test_a_state_of_other_options_is_refused(mixed: TokenStore, change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"rows": 4, "length": 64, "seed": 0, "prefetch": 0}
    state = Loader(mixed, **options).state_dict()
    with pytest.raises(DataError, match=message):
        Loader(mixed, **{**options, **change}).load_state_dict(state)


def test_a_state_of_another_corpus_is_refused(store: TokenStore, mixed: TokenStore) -> None:
    state = Loader(mixed, rows=4, length=64, prefetch=0).state_dict()
    with pytest.raises(DataError, match="another corpus"):
        Loader(store, rows=4, length=64, prefetch=0).load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 9},
        {"row": -1},
        {"row": "3"},
        {"window": None},
        {"epoch": [0]},
        {"position": [10**9, 0, 0]},
        {"drawn": "abc"},
        {"batch": True},
    ],
)
def test_a_damaged_state_is_refused(mixed: TokenStore, change: dict[str, Any]) -> None:
    loader = Loader(mixed, rows=4, length=64, prefetch=0)
    with pytest.raises(DataError):
        loader.load_state_dict(loader.state_dict() | change)
    loader.load_state_dict(loader.state_dict() | {"row": 10**6})
    with pytest.raises(DataError, match="rows, not 1000000"):
        next(loader)


def test_impossible_shapes_say_what_would_work(store: TokenStore, mixed: TokenStore) -> None:
    with pytest.raises(ConfigError, match="3 ranks do not divide 8 rows; try 6 or 9 rows"):
        Loader(store, rows=8, length=8, world=3)
    with pytest.raises(ConfigError, match="rank 3 is not one of the 3"):
        Loader(store, rows=9, length=8, rank=3, world=3)
    with pytest.raises(ConfigError, match="holds nothing"):
        Loader(store, rows=0, length=8)
    with pytest.raises(ConfigError, match="no source is called 'onli' \\(did you mean 'only'"):
        Loader(store, rows=8, length=8, weights={"onli": 1.0})
    with pytest.raises(ConfigError, match="exactly one source"):
        Loader(mixed, rows=8, length=8, epochs=1)


def test_weights_set_the_shares_of_tokens(mixed: TokenStore) -> None:
    loader = Loader(mixed, rows=8, length=64, weights={"a": 3.0, "b": 1.0, "c": 0.0}, prefetch=0)
    drawn = Counter[str]()
    for n in range(200):
        next(loader)
        for sample in loader.provenance(n):
            drawn[sample.source] += sample.length
    assert drawn["c"] == 0
    assert abs(drawn["a"] / drawn["b"] - 3) < 0.15


def test_provenance_leads_back_to_the_document(store: TokenStore) -> None:
    loader = Loader(store, rows=4, length=64, prefetch=2)
    states, batches = [], []
    for _ in range(12):
        states.append(loader.state_dict())
        batches.append(next(loader))
    fresh = Loader(store, rows=4, length=64, prefetch=0)
    for n in (0, 5, 11):
        samples = loader.provenance(n)
        assert samples == loader.provenance(states[n]) == fresh.provenance(n)
        assert sum(s.length for s in samples) == batches[n].n_targets
        for s in samples:
            document = int(s.path.removesuffix(".txt"))
            inputs = batches[n].tokens[s.row, s.column : s.column + s.length]
            assert inputs.tolist() == store.tokens(document, s.start, s.start + s.length).tolist()
    loader.load_state_dict(states[7])
    with pytest.raises(DataError, match="before this loader began"):
        loader.provenance(3)
    assert loader.provenance(9) == fresh.provenance(9)
    loader.close()


def test_errors_of_the_thread_reach_the_consumer(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [20] * 50, ["x"])
    path = tmp_path / "s" / "tokens-00000.bin"
    data = np.frombuffer(path.read_bytes(), "<u4").copy()
    data[500] = VOCAB
    path.write_bytes(data.tobytes())
    for prefetch in (0, 2):
        loader = Loader(TokenStore(store.directory), rows=2, length=32, prefetch=prefetch)
        with pytest.raises(DataError, match="the store is damaged"):
            list(zip(range(100), loader))


def loader_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name == "deepseek-loader"}


def test_threads_end_with_close_and_with_the_loader(store: TokenStore) -> None:
    before = loader_threads()  # of other tests, which may end meanwhile
    with Loader(store, rows=2, length=32) as loader:
        next(loader)
        assert len(loader_threads() - before) == 1
        expected = loader.state_dict()
    assert loader_threads() <= before
    assert loader.state_dict() == expected
    next(loader)
    del loader
    assert loader_threads() <= before


def test_an_open_loader_does_not_hold_up_the_interpreter(store: TokenStore) -> None:
    code = (
        "from deepseek.data import Loader, TokenStore\n"
        f"keep = Loader(TokenStore({str(store.directory)!r}), rows=2, length=32)\n"
        "print(next(keep).n_targets)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("length", [7, 64, 300])
def test_evaluation_covers_the_store_once_in_order(store: TokenStore, length: int) -> None:
    batches = list(eval_batches(store, rows=4, length=length, token_bytes=BYTES))
    found: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        check_batch(batch)
        assert batch.tokens.shape == (4, length)
        found += pairs(batch)
    assert found == all_pairs(store)
    assert sum(b.n_targets for b in batches) == store.n_tokens
    assert sum(b.n_bytes for b in batches) == store.n_bytes
    again = list(eval_batches(store, rows=4, length=length, token_bytes=BYTES))
    assert all(same(a, b) for a, b in zip(batches, again))
    halves = [list(eval_batches(store, rows=4, length=length, rank=r, world=2)) for r in range(2)]
    for whole, left, right in zip(batches, *halves):
        assert torch.equal(whole.tokens[0::2], left.tokens)
        assert torch.equal(whole.tokens[1::2], right.tokens)
        assert left.n_targets == right.n_targets == whole.n_targets


def test_two_stores_are_one_mixture(tmp_path: Path) -> None:
    first = make_store(tmp_path / "a", [30] * 40, ["first"])
    second = make_store(tmp_path / "b", [30] * 300, ["second"])
    loader = Loader([first, second], rows=8, length=31, weights={"first": 1.0, "second": 3.0}, prefetch=0)
    drawn = Counter(s.source for n in range(64) if next(loader) for s in loader.provenance(n))
    assert abs(drawn["second"] / drawn["first"] - 3) < 0.3
