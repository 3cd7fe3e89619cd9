"""Data: MB of text per second and core, stage by stage, beside ``datasets.map`` in the same run.

    python benchmarks/bench_data.py            # the Python standard library of this machine
    python benchmarks/bench_data.py PATH       # a folder of text files

Every stage runs on one core (``TOKENIZERS_PARALLELISM=false``) except where the line says otherwise.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from deepseek.data import (
    CleanConfig,
    Cleaner,
    DataConfig,
    DedupConfig,
    Deduplicator,
    SourceConfig,
    Tokenizer,
    open_source,
    prepare,
    train_tokenizer,
)


def best(work: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of ``repeats`` runs."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def peer(tokenizer: Tokenizer, texts: list[str], folder: Path, processes: int | None) -> float:
    """Seconds of ``datasets.map`` over ``texts`` with the library's ``encode_batch``, as tutorials do."""
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"text": texts})
    inner = tokenizer._inner

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [e.ids for e in inner.encode_batch(batch["text"], add_special_tokens=False)]}

    began = time.perf_counter()
    data.map(encode, batched=True, remove_columns=["text"], num_proc=processes, load_from_cache_file=False)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", default="")
    parser.add_argument("--vocab-size", type=int, default=4096)
    options = parser.parse_args()
    config = SourceConfig(kind="text", path=options.path) if options.path else SourceConfig()
    documents = list(open_source(config))
    texts = [d.text for d in documents]
    size = sum(len(t.encode()) for t in texts) / 1e6
    ascii_share = sum(len(t) for t in texts if t.isascii()) / sum(map(len, texts))
    print(f"{len(texts)} documents, {size:.1f} MB, {ascii_share:.0%} of it in files of ASCII only")

    def line(name: str, seconds: float, megabytes: float = size) -> None:
        print(f"{name:<46}{megabytes / seconds:10.1f} MB/s{seconds:10.2f} s")

    def clean(cleaner: Cleaner) -> object:
        return [cleaner.clean(t) for t in texts]

    line("read", best(lambda: list(open_source(config))))
    for preset in ("code", "web"):
        line(f"clean, preset {preset}", best(partial(clean, Cleaner(CleanConfig(preset=preset))), 1))
    line("dedup, exact", best(lambda: [Deduplicator(DedupConfig()).check(d) for d in documents]))
    near = Deduplicator(DedupConfig(near=True))
    line("dedup, exact and near", best(lambda: [near.check(d) for d in documents], 1))

    sample = [d.text for d in open_source(config).sample(4_000_000)]
    trained = sum(len(t.encode()) for t in sample) / 1e6
    tokenizer = train_tokenizer(sample[:1], 300)

    def train() -> None:
        nonlocal tokenizer
        tokenizer = train_tokenizer(sample, options.vocab_size)

    line(f"train a tokenizer of {options.vocab_size} ids", best(train, 1), trained)
    line("tokenize, first pass", best(lambda: tokenizer.encode_batch(texts), 1))
    line("tokenize", best(lambda: tokenizer.encode_batch(texts)))
    ids = tokenizer.encode_batch(texts)
    inner = tokenizer._inner
    line("  library alone, encode_batch_fast", best(lambda: inner.encode_batch_fast(texts)))
    theirs = inner.encode_batch(texts, add_special_tokens=False)
    assert all(a.tolist() == b.ids for a, b in zip(ids, theirs)), "the fast lane differs from the library"
    with tempfile.TemporaryDirectory() as folder:
        line("  peer: datasets.map", peer(tokenizer, texts, Path(folder), None))
        line("  peer: datasets.map, 2 processes", peer(tokenizer, texts, Path(folder), 2))
        began = time.perf_counter()
        corpus = prepare(DataConfig(sources=(config,), vocab_size=options.vocab_size), folder)
        line("prepare: all of it, tokenizer included", time.perf_counter() - began)
        began = time.perf_counter()
        prepare(DataConfig(sources=(config,), vocab_size=options.vocab_size), folder)
        print(f"{'prepare again':<46}{'':15}{time.perf_counter() - began:10.2f} s")
        for length in (512, 4096):
            filled = total = n_bytes = 0
            began = time.perf_counter()
            with corpus.loader(rows=16, length=length, epochs=1) as loader:
                for batch in loader:
                    filled, total = filled + batch.n_targets, total + batch.tokens.numel()
                    n_bytes += batch.n_bytes
            seconds = time.perf_counter() - began
            line(
                f"load, T={length}: {filled / seconds / 1e6:.1f} M tokens/s, {filled / total:.2%} full",
                seconds,
                n_bytes / 1e6,
            )


if __name__ == "__main__":
    main()
