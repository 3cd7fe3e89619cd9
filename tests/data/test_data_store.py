"""Token stores: what goes in comes out; what is damaged is refused by name; half a store is never seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek.data import StoreWriter, TokenStore
from deepseek.data.store import RECORD
from deepseek.errors import DataError


def writer(path: Path, vocab_size: int = 300, shard_tokens: int = 100) -> StoreWriter:
    return StoreWriter(
        path,
        vocab_size=vocab_size,
        eos_id=0,
        pad_id=1,
        tokenizer="t",
        sources=["a", "b"],
        shard_tokens=shard_tokens,
    )


def filled(path: Path, documents: int = 40, **options: Any) -> tuple[TokenStore, list[np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(0)
    written = [rng.integers(2, 300, n).astype(np.int32) for n in rng.integers(0, 30, documents)]
    with writer(path, **options) as out:
        for i, ids in enumerate(written):
            out.add(ids, 3 * len(ids), source=i % 2, path=f"dir/{i // 4}.txt", offset=i * 10)
    return TokenStore(path), written


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_round_trip_over_shards(tmp_path: Path, vocab_size: int) -> None:
    store, written = filled(tmp_path / "s", vocab_size=vocab_size)
    assert len(list((tmp_path / "s").glob("tokens-*.bin"))) > 3
    assert len(store) == len(written)
    for i, ids in enumerate(written):
        assert store.tokens(i).tolist() == [0, *ids.tolist(), 0]
        assert store.tokens(i, 1, 3).tolist() == [0, *ids.tolist(), 0][1:3]
        assert store.provenance(i) == ("ab"[i % 2], f"dir/{i // 4}.txt", i * 10)
    assert store.n_tokens == sum(len(w) + 1 for w in written)
    assert store.n_bytes == sum(3 * len(w) for w in written)
    assert store.tokens(0).dtype == (np.uint16 if vocab_size == 300 else np.uint32)
    store.verify()


def test_equal_content_has_an_equal_fingerprint(tmp_path: Path) -> None:
    first, _ = filled(tmp_path / "a")
    assert filled(tmp_path / "b")[0].fingerprint == first.fingerprint
    assert filled(tmp_path / "c", documents=39)[0].fingerprint != first.fingerprint


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "s") as out:  # noqa: PT012 - two steps on purpose
        out.add(np.array([3, 4]), 2)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    out = writer(tmp_path / "s")
    out.add(np.array([3, 4]), 2)
    assert not (tmp_path / "s").exists()  # a killed writer's folder is hidden and never opened
    with pytest.raises(DataError, match=r"store\.json is missing"):
        TokenStore(tmp_path / "s")
    out.abandon()


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents.bin", "paths.jsonl"])
def test_truncated_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    filled(tmp_path / "s")
    path = tmp_path / "s" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name} has \d+ bytes"):
        TokenStore(tmp_path / "s")
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        TokenStore(tmp_path / "s")


def test_a_flipped_bit_is_found_by_verify(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    path = tmp_path / "s" / "tokens-00002.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"tokens-00002\.bin is damaged"):
        TokenStore(tmp_path / "s").verify()


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="outside the vocabulary of 300"), writer(tmp_path / "w") as out:
        out.add(np.array([300]), 1)
    with pytest.raises(DataError, match="outside"), writer(tmp_path / "w") as out:
        out.add(np.array([-1]), 1)
    filled(tmp_path / "s")
    path = tmp_path / "s" / "tokens-00000.bin"
    data = np.frombuffer(path.read_bytes(), "<u2").copy()
    data[1] = 999
    path.write_bytes(data.tobytes())
    with pytest.raises(DataError, match="document 0 holds token id 999"):
        TokenStore(tmp_path / "s").tokens(0)


@pytest.mark.parametrize(
    ("column", "value"),
    [("start", 10**9), ("shard", 99), ("shard", -1), ("length", 0), ("source", 7), ("start", -5)],
)
def test_records_that_point_outside_are_refused(tmp_path: Path, column: str, value: int) -> None:
    filled(tmp_path / "s")
    path = tmp_path / "s" / "documents.bin"
    records = np.frombuffer(path.read_bytes(), RECORD).copy()
    records[column][5] = value
    path.write_bytes(records.tobytes())
    with pytest.raises(DataError, match="document 5"):
        TokenStore(tmp_path / "s")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"version": 2},
        {"dtype": "O"},
        {"dtype": 3},
        {"shards": 10**9},
        {"shards": -1},
        {"files": {"../../etc/passwd": {"bytes": 1, "blake2b": ""}}},
        {"files": []},
        {"documents": 3},
        {"sources": "ab"},
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    filled(tmp_path / "s")
    path = tmp_path / "s" / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="is damaged"):
        TokenStore(tmp_path / "s")
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="is damaged"):
        TokenStore(tmp_path / "s")


def test_a_store_is_not_overwritten(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    with pytest.raises(DataError, match="exists already"):
        writer(tmp_path / "s")
