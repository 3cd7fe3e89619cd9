"""Compact token files hold the corpus: every document of the stores, in order, and what damages them is told."""

from pathlib import Path

import numpy as np
import pytest

from deepseek.bench import tokens as module
from deepseek.bench.tokens import load_tokens, write_tokens
from deepseek.data import Corpus, DataConfig, SourceConfig, prepare
from deepseek.errors import DataError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        words = " ".join(f"word{(i * 7 + j) % 91} and {j * i}" for j in range(60))
        (folder / f"{i:02d}.txt").write_text(f"Document {i}: {words}\n")
    source = SourceConfig(kind="text", path=str(folder), split="file")
    return prepare(DataConfig(sources=(source,), vocab_size=400, held_out=0.2), folder / "cache")


def test_what_was_written_is_read(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 1000)  # several parts
    write_tokens(corpus, tmp_path)
    assert len(list(tmp_path.glob("train-*.xz"))) > 1
    found = load_tokens(tmp_path)
    assert corpus.held_out is not None
    for store, ids in ((corpus.train, found.train), (corpus.held_out, found.held_out)):
        ends = np.flatnonzero(ids == found.eos_id)
        assert len(ends) == len(store) + 1
        for i in range(len(store)):
            assert np.array_equal(ids[ends[i] : ends[i + 1] + 1], store.tokens(i))
        assert found.token_bytes.astype(np.int64)[ids].sum() == store.n_bytes
    assert found.report["held_out_bytes"] == corpus.held_out.n_bytes
    assert found.report["train_documents"] == len(corpus.train)


def test_a_limit_leaves_documents_out(corpus: Corpus, tmp_path: Path) -> None:
    whole = write_tokens(corpus, tmp_path)
    size = (tmp_path / "train-00.xz").stat().st_size
    part = write_tokens(corpus, tmp_path, limit=size // 2)
    assert (tmp_path / "train-00.xz").stat().st_size <= size // 2
    assert 0 < part["train_tokens"] < whole["train_tokens"]
    assert part["held_out_tokens"] == whole["held_out_tokens"]
    train = load_tokens(tmp_path).train
    assert train[0] == train[-1] == part["eos_id"]


def test_missing_and_damaged_files_are_told(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokens\.json is missing; write it with"):
        load_tokens(tmp_path)
    write_tokens(corpus, tmp_path)
    data = bytearray((tmp_path / "held_out-00.xz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "held_out-00.xz").write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"held_out-00\.xz has another hash"):
        load_tokens(tmp_path)
