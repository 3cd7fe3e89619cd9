"""``prepare``: from files to a corpus, once; what it counts; what it leaves when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deepseek.config import from_dict, to_toml
from deepseek.data import (
    CleanConfig,
    Corpus,
    DataConfig,
    DedupConfig,
    SourceConfig,
    TokenStore,
    is_held_out,
    open_source,
    prepare,
)
from deepseek.data.source import StdlibSource
from deepseek.errors import ConfigError, DataError
from deepseek.events import MemorySink, attached


def folder(path: Path, documents: int = 200) -> SourceConfig:
    path.mkdir(parents=True)
    for i in range(documents):
        (path / f"{i}.txt").write_text(
            f"File {i} tells of the number {i * i}, and of {i} other things.\n" * 3
        )
    return SourceConfig(kind="text", path=str(path))


def small(tmp_path: Path, **options: Any) -> DataConfig:
    return DataConfig(sources=(folder(tmp_path / "in"),), vocab_size=300, **options)


def text_of(store: TokenStore, corpus: Corpus) -> dict[str, str]:
    return {store.provenance(i)[1]: corpus.tokenizer.decode(store.tokens(i)) for i in range(len(store))}


def test_every_document_is_stored_whole_in_its_split(tmp_path: Path) -> None:
    corpus = prepare(small(tmp_path, held_out=0.2), tmp_path / "out")
    assert corpus.held_out is not None
    train, held_out = text_of(corpus.train, corpus), text_of(corpus.held_out, corpus)
    documents = list(open_source(corpus.config.sources[0]))
    assert train == {d.path: d.text for d in documents if not is_held_out(d, 0.2)}
    assert held_out == {d.path: d.text for d in documents if is_held_out(d, 0.2)}
    assert corpus.train.n_bytes == sum(len(t.encode()) for t in train.values())
    report = corpus.report
    assert report["read"]["documents"] == 200
    assert report["splits"]["train"]["tokens"] == corpus.train.n_tokens
    batches = list(corpus.eval_batches(rows=4, length=32))
    assert sum(b.n_bytes for b in batches) == sum(len(t.encode()) for t in held_out.values())
    corpus.train.verify()


def test_the_standard_library_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = StdlibSource.skipped | {
        "encodings",
        "asyncio",
        "idlelib",
        "email",
        "pydoc_data",
        "multiprocessing",
    }
    monkeypatch.setattr(StdlibSource, "skipped", skipped)
    corpus = prepare(DataConfig(vocab_size=1024, train_bytes=300_000), tmp_path)
    filled = total = 0
    with corpus.loader(rows=8, length=512, epochs=1) as loader:
        for batch in loader:
            filled, total = filled + batch.n_targets, total + batch.tokens.numel()
    assert filled == corpus.train.n_tokens
    assert (total - filled) / total < 0.03


def test_an_equal_corpus_is_found_again(tmp_path: Path) -> None:
    config = small(tmp_path)
    first = prepare(config, tmp_path / "out")
    before = (first.directory / "corpus.json").stat().st_mtime_ns
    sink = MemorySink()
    with attached(sink):
        again = prepare(DataConfig(**{**vars(config), "seed": 5, "prefetch": 0}), tmp_path / "out")
    assert sink.series("prepare", "stage") == ["reused"]
    assert again.directory == first.directory
    assert (again.directory / "corpus.json").stat().st_mtime_ns == before
    os.utime(tmp_path / "in" / "3.txt", (1, 1))
    assert prepare(config, tmp_path / "out").directory != first.directory
    assert (
        prepare(DataConfig(**{**vars(config), "vocab_size": 301}), tmp_path / "out").directory
        != first.directory
    )


def test_equal_content_elsewhere_has_an_equal_fingerprint(tmp_path: Path) -> None:
    first = prepare(small(tmp_path / "a"), tmp_path / "out")
    second = prepare(small(tmp_path / "b"), tmp_path / "out")
    assert first.directory != second.directory
    assert first.train.fingerprint == second.train.fingerprint
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint


def test_drops_duplicates_and_bad_records_are_reported(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 100)
    for i in range(5):
        (tmp_path / "in" / f"copy{i}.txt").write_text((tmp_path / "in" / f"{i}.txt").read_text())
        (tmp_path / "in" / f"bad{i}.txt").write_bytes(b"\xff\xfe\xfd")
        (tmp_path / "in" / f"short{i}.txt").write_text(f"short {i}")
    config = DataConfig(
        sources=(source,),
        vocab_size=300,
        clean=CleanConfig(min_words=5),
        dedup=DedupConfig(near=True, threshold=0.95),
    )
    report = prepare(config, tmp_path / "out").report
    assert report["dropped"] == {"min_words": 5}
    assert report["duplicates"]["counts"] == {"exact": 5}
    assert {(e["dropped"], e["kept"]) for e in report["duplicates"]["examples"]} >= {
        ("in:copy3.txt:0", "in:3.txt:0")
    }
    assert report["bad_records"]["counts"] == {"undecodable": 5}


def test_a_tokenizer_can_be_given(tmp_path: Path) -> None:
    first = prepare(small(tmp_path), tmp_path / "out")
    other = DataConfig(sources=(folder(tmp_path / "other"),), tokenizer=str(first.directory / "tokenizer"))
    by_path = prepare(other, tmp_path / "out")
    by_object = prepare(DataConfig(**{**vars(other), "tokenizer": ""}), tmp_path / "out", first.tokenizer)
    assert by_path.tokenizer.fingerprint == by_object.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert by_path.train.fingerprint == by_object.train.fingerprint


def test_several_sources_mix_by_weight(tmp_path: Path) -> None:
    sources = (
        folder(tmp_path / "a" / "texts", 100),
        SourceConfig(kind="text", path=folder(tmp_path / "b" / "texts", 300).path, weight=3.0),
    )
    corpus = prepare(
        DataConfig(sources=sources, vocab_size=300, dedup=DedupConfig(exact=False)), tmp_path / "out"
    )
    assert corpus.train.sources == ["texts-0", "texts-1"]
    assert corpus.weights == {"texts-0": 1.0, "texts-1": 3.0}
    drawn = {"texts-0": 0, "texts-1": 0}
    with corpus.loader(rows=8, length=64) as loader:
        for n in range(40):
            next(loader)
            for sample in loader.provenance(n):
                drawn[sample.source] += sample.length
    assert abs(drawn["texts-1"] / drawn["texts-0"] - 3) < 0.3


def test_what_cannot_be_prepared_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        prepare(DataConfig(sources=(SourceConfig(kind="text", path=str(tmp_path / "no")),)), tmp_path / "out")
    config = small(tmp_path, clean=CleanConfig(min_words=10_000))
    with pytest.raises(DataError):
        prepare(config, tmp_path / "out")
    one = SourceConfig(kind="text", path=str(tmp_path / "in" / "1.txt"))
    with pytest.raises(DataError, match="none of 1 documents fell into the split"):
        prepare(DataConfig(sources=(one,), vocab_size=300), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"set data\.cache"):
        prepare(DataConfig())
    named = SourceConfig(kind="stdlib", name="x")
    with pytest.raises(ConfigError, match="must differ"):
        prepare(DataConfig(sources=(named, named)), tmp_path / "out")
    left = [p.name for p in (tmp_path / "out").iterdir() if not p.name.endswith(".lock")]
    assert left == []


@pytest.mark.parametrize("damage", ["corpus.json", "tokenizer/tokenizer.json", "train/store.json"])
def test_a_damaged_corpus_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    corpus = prepare(small(tmp_path), tmp_path / "out")
    path = corpus.directory / damage
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=path.name):
        Corpus.load(corpus.directory)


def test_config_reads_back_from_toml(tmp_path: Path) -> None:
    import sys as system

    if system.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    config = small(tmp_path, clean=CleanConfig(preset="web", languages=("en",)), dedup=DedupConfig(near=True))
    assert from_dict(DataConfig, tomllib.loads(to_toml(config))) == config
    with pytest.raises(ConfigError, match=r"choose one of.*did you mean 'jsonl'"):
        from_dict(DataConfig, {"sources": [{"kind": "jsonnl", "path": "x"}]})


SCRIPT = """
import sys
from deepseek.data import DataConfig, SourceConfig, prepare
config = DataConfig(sources=(SourceConfig(kind="text", path=sys.argv[1]),), vocab_size=300)
print("start", flush=True)
print(prepare(config, sys.argv[2]).train.fingerprint, flush=True)
"""


def start(tmp_path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "in"), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "start\n"
    return process


def test_killing_leaves_nothing_half_done(tmp_path: Path) -> None:
    folder(tmp_path / "in", 1500)
    for delay in (0.02, 0.1, 0.25):
        process = start(tmp_path)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for visible in (tmp_path / "out").glob("[!.]*"):
            Corpus.load(visible).train.verify()
    process = start(tmp_path)
    out, _ = process.communicate(timeout=120)
    (done,) = (tmp_path / "out").glob("[!.]*")
    corpus = Corpus.load(done)
    assert out.strip() == corpus.train.fingerprint
    corpus.train.verify()
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_two_processes_prepare_once(tmp_path: Path) -> None:
    folder(tmp_path / "in", 500)
    both = [start(tmp_path) for _ in range(2)]
    outs = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert outs[0] == outs[1]
    (done,) = (tmp_path / "out").glob("[!.]*")
    assert json.loads((done / "corpus.json").read_text())["read"]["documents"] == 500
