"""``prepare``: from sources to token stores on disk, once. ``Corpus``: what it leaves behind.

    cache/<fingerprint>/
        corpus.json   counts, drops per rule, bad records, duplicates, the exact config
        tokenizer/    tokenizer.json and its config
        train/        a TokenStore
        held_out/     a TokenStore of whole documents, chosen by a stable hash

The fingerprint covers the config, the tokenizer given, and the names, sizes and times of the files, so an
equal corpus is
found and used again: the second start, and every rank but the first, costs milliseconds. Everything is
    written in a
hidden folder and renamed at the end; a killed ``prepare`` leaves nothing that could be mistaken for a corpus.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.batch import Batch
from deepseek.config import configclass, from_dict, replace, to_dict
from deepseek.data.clean import CleanConfig, Cleaner
from deepseek.data.dedup import DedupConfig, Deduplicator
from deepseek.data.loader import Loader, eval_batches
from deepseek.data.quarantine import read_quarantine
from deepseek.data.records import open_source
from deepseek.data.source import BadRecords, Document, Source, SourceConfig, default_name, is_held_out
from deepseek.data.store import StoreWriter, TokenStore, write_json
from deepseek.data.tokenizer import MIN_VOCAB, Tokenizer, train_tokenizer
from deepseek.errors import ConfigError, DataError
from deepseek.events import emit
from deepseek.files import flush, locked

VERSION = 1
BATCH_BYTES = 4 * 2**20  #: text tokenised at a time
_NOT_IN_FINGERPRINT = ("cache", "seed", "prefetch", "quarantine")


@configclass
class DataConfig:
    """What to train on. One TOML table, ``[data]``.

    Attributes:
        sources: where text comes from; the Python standard library unless told.
        vocab_size: ids of the tokenizer to train; unused with ``tokenizer``.
        tokenizer: a directory with a ``tokenizer.json`` to use instead of training one.
        train_bytes: text that the tokenizer is trained on, sampled over all sources.
        held_out: share of documents kept for evaluation.
        clean: quality rules.
        dedup: de-duplication.
        cache: where corpora are kept; the caller's choice when empty.
        seed: of the order in which documents are seen.
        prefetch: batches built ahead.
        quarantine: files of documents that are not trained on, such as the ``quarantine.jsonl`` of earlier runs.
    """

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    vocab_size: int = 4096
    tokenizer: str = ""
    train_bytes: int = 4_000_000
    held_out: float = 0.05
    clean: CleanConfig = CleanConfig()
    dedup: DedupConfig = DedupConfig()
    cache: str = ""
    seed: int = 0
    prefetch: int = 4
    quarantine: tuple[str, ...] = ()

    def check(self) -> None:
        if not self.sources:
            raise ConfigError("data.sources is empty; leave it out for the Python standard library")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"data.held_out={self.held_out} must be at least 0 and below 1")
        if self.vocab_size < MIN_VOCAB:
            raise ConfigError(f"data.vocab_size={self.vocab_size} must be at least {MIN_VOCAB}")
        if self.train_bytes < 1 or self.prefetch < 0:
            raise ConfigError(
                f"data.train_bytes={self.train_bytes} and data.prefetch={self.prefetch} cannot be used"
            )


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Attributes:
        directory: where it lies.
        config: what it was made with.
        tokenizer: of its tokens.
        train: the training documents.
        held_out: the others; ``None`` when ``config.held_out`` is 0.
        report: ``corpus.json`` as plain values.
    """

    directory: Path
    config: DataConfig
    tokenizer: Tokenizer
    train: TokenStore
    held_out: TokenStore | None
    report: dict[str, Any]

    @classmethod
    def load(cls, directory: Path | str) -> Corpus:
        """Open a corpus. Raises ``DataError`` when it is missing or damaged."""
        directory = Path(directory)
        try:
            report = json.loads((directory / "corpus.json").read_text(encoding="utf-8"))
            config = from_dict(DataConfig, report["config"], "data")
        except FileNotFoundError:
            raise DataError(f"no corpus at {directory}: corpus.json is missing") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{directory / 'corpus.json'} is damaged: {error}") from None
        held_out = TokenStore(directory / "held_out") if config.held_out else None
        tokenizer, train = Tokenizer.load(directory / "tokenizer"), TokenStore(directory / "train")
        if train.tokenizer_fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"{directory / 'train'} was not written with {directory / 'tokenizer'}; prepare it again"
            )
        return cls(directory, config, tokenizer, train, held_out, report)

    @property
    def fingerprint(self) -> str:
        return str(self.report["fingerprint"])

    @property
    def weights(self) -> dict[str, float]:
        """Share of the training tokens per source name, relative."""
        return {open_name(s, i, self.config): s.weight for i, s in enumerate(self.config.sources)}

    def loader(
        self,
        *,
        rows: int,
        length: int,
        rank: int = 0,
        world: int = 1,
        weights: Mapping[str, float] | None = None,
        epochs: int | None = None,
    ) -> Loader:
        """A ``Loader`` of the training documents with this corpus's weights, seed, prefetching and quarantine.

        Quarantined documents that this corpus does not have are passed over; a file that is missing is an error.
        """
        loader = Loader(
            self.train,
            rows=rows,
            length=length,
            seed=self.config.seed,
            rank=rank,
            world=world,
            weights=self.weights if weights is None else weights,
            token_bytes=self.tokenizer.token_bytes,
            prefetch=self.config.prefetch,
            epochs=epochs,
        )
        for name in self.config.quarantine:
            if not Path(name).is_file():
                raise DataError(f"data.quarantine names {name}, which is no file")
            loader.exclude(read_quarantine(name), missing_ok=True)
        return loader

    def eval_batches(self, *, rows: int, length: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches over all held-out documents. Raises ``DataError`` when there are none."""
        if self.held_out is None:
            raise DataError("the corpus has no held-out documents: held_out is 0")
        sizes = self.tokenizer.token_bytes
        return eval_batches(
            self.held_out, rows=rows, length=length, token_bytes=sizes, rank=rank, world=world
        )


def prepare(config: DataConfig, directory: Path | str = "", tokenizer: Tokenizer | None = None) -> Corpus:
    """Read, clean, de-duplicate, tokenise and store; or find that this has been done.

    Args:
        config: what to read and how.
        directory: where corpora are kept (each in a folder of its own); ``config.cache`` when empty.
        tokenizer: to use instead of training one or loading ``config.tokenizer``.

    Emits ``prepare`` events: ``stage`` ('tokenizer', 'tokenize', 'done', 'reused') with counts, and
    ``bad_record`` events.

    Raises:
        DataError: a source is missing or empty, nothing is left after cleaning, or a split is empty.
    """
    place = directory or config.cache
    if not place:
        raise ConfigError("prepare needs a directory to keep the corpus in: pass one, or set data.cache")
    names = [open_name(s, i, config) for i, s in enumerate(config.sources)]
    bad = BadRecords()
    sources = [open_source(named(s, n), bad) for s, n in zip(config.sources, names)]
    if tokenizer is None and config.tokenizer:
        tokenizer = Tokenizer.load(config.tokenizer)
    fingerprint = corpus_fingerprint(config, sources, tokenizer)
    target = Path(place).expanduser() / fingerprint[:20]
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}.lock")):
        if (target / "corpus.json").is_file():
            # What is not in the fingerprint, such as the seed, is as asked for now, not as it was at first.
            corpus = dataclasses.replace(Corpus.load(target), config=config)
            emit("prepare", stage="reused", directory=str(target), tokens=corpus.train.n_tokens)
            return corpus
        for stale in target.parent.glob(f".{target.name}.*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
        try:
            _Preparation(config, sources, bad, fingerprint, temporary).run(tokenizer)
            temporary.rename(target)
            flush(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Corpus.load(target)


def corpus_fingerprint(config: DataConfig, sources: list[Source], tokenizer: Tokenizer | None) -> str:
    """Hash of what decides the content of a corpus; reads no text."""
    plain = {k: v for k, v in to_dict(config).items() if k not in _NOT_IN_FINGERPRINT}
    parts = [VERSION, plain, [s.signature() for s in sources], tokenizer.fingerprint if tokenizer else ""]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class _Preparation:
    """One pass over the sources into ``directory``."""

    def __init__(
        self, config: DataConfig, sources: list[Source], bad: BadRecords, fingerprint: str, directory: Path
    ) -> None:
        self.config, self.sources, self.bad = config, sources, bad
        self.fingerprint, self.directory = fingerprint, directory
        self.cleaner, self.dedup = Cleaner(config.clean), Deduplicator(config.dedup)
        self.seconds: dict[str, float] = {}
        self.read_documents = self.read_bytes = 0
        self._told = 0.0

    def run(self, tokenizer: Tokenizer | None) -> None:
        began = time.perf_counter()
        tokenizer = tokenizer or self._train_tokenizer()
        tokenizer.save(self.directory / "tokenizer")
        self.seconds["tokenizer"] = time.perf_counter() - began
        began = time.perf_counter()
        stores = self._write(tokenizer)
        self.seconds["tokenize"] = time.perf_counter() - began
        write_json(self.directory / "corpus.json", self._report(tokenizer, stores))
        train = stores["train"]
        emit("prepare", stage="done", documents=len(train), tokens=train.n_tokens, bad=self.bad.total)

    def _train_tokenizer(self) -> Tokenizer:
        cleaner, total = Cleaner(self.config.clean), sum(s.weight for s in self.config.sources)

        def texts() -> Iterator[str]:
            for config, source in zip(self.config.sources, self.sources):
                quiet = open_source(named(config, source.name), BadRecords(quiet=True))
                share = config.weight / total if total else 1 / len(self.sources)
                for document in quiet.sample(int(self.config.train_bytes * share)) if share else ():
                    if not is_held_out(document, self.config.held_out):
                        yield cleaner.clean(document.text) or ""

        emit("prepare", stage="tokenizer", vocab_size=self.config.vocab_size, bytes=self.config.train_bytes)
        return train_tokenizer(texts(), self.config.vocab_size)

    def _write(self, tokenizer: Tokenizer) -> dict[str, TokenStore]:
        splits = ["train", "held_out"] if self.config.held_out else ["train"]
        writers = {name: self._writer(name, tokenizer) for name in splits}
        try:
            for batch in self._batches():
                ids = tokenizer.encode_batch([d.text for _, d in batch])
                for (source, document), tokens in zip(batch, ids):
                    split = "held_out" if is_held_out(document, self.config.held_out) else "train"
                    size = len(document.text.encode())
                    writers[split].add(
                        tokens, size, source=source, path=document.path, offset=document.offset
                    )
                self._tell()
            self._check_splits({name: writer.documents for name, writer in writers.items()})
            return {name: writer.close() for name, writer in writers.items()}
        except BaseException:
            for writer in writers.values():
                writer.abandon()
            raise

    def _writer(self, name: str, tokenizer: Tokenizer) -> StoreWriter:
        return StoreWriter(
            self.directory / name,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            tokenizer=tokenizer.fingerprint,
            sources=[s.name for s in self.sources],
        )

    def _batches(self) -> Iterator[list[tuple[int, Document]]]:
        batch: list[tuple[int, Document]] = []
        size = 0
        for index, document in self._kept():
            batch.append((index, document))
            size += len(document.text)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        yield batch

    def _kept(self) -> Iterator[tuple[int, Document]]:
        for index, source in enumerate(self.sources):
            for document in source:
                self.read_documents += 1
                self.read_bytes += len(document.text.encode())
                text = self.cleaner.clean(document.text)
                if text is not None:
                    kept = Document(text, document.source, document.path, document.offset)
                    if self.dedup.check(kept) is None:
                        yield index, kept

    def _check_splits(self, documents: dict[str, int]) -> None:
        if not sum(documents.values()):
            raise DataError(
                f"the corpus is empty: {self.read_documents} documents read, "
                f"{sum(self.cleaner.dropped.values())} "
                f"dropped by cleaning, {sum(self.dedup.counts.values())} duplicates, {self.bad.total} bad "
                f"records"
            )
        for name, found in documents.items():
            if not found:
                raise DataError(
                    f"none of {sum(documents.values())} documents fell into the split '{name}' with "
                    f'held_out={self.config.held_out}; set held_out = 0, or split = "paragraph" for text'
                )

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told > 0.5:
            self._told = now
            emit(
                "prepare",
                stage="tokenize",
                documents=self.read_documents,
                bytes=self.read_bytes,
                bad=self.bad.total,
            )

    def _report(self, tokenizer: Tokenizer, stores: dict[str, TokenStore]) -> dict[str, Any]:
        return {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "config": to_dict(self.config),
            "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
            "read": {"documents": self.read_documents, "bytes": self.read_bytes},
            "splits": {
                name: {
                    "documents": len(s),
                    "tokens": s.n_tokens,
                    "bytes": s.n_bytes,
                    "fingerprint": s.fingerprint,
                }
                for name, s in stores.items()
            },
            "dropped": dict(self.cleaner.dropped),
            "scrubbed": dict(self.cleaner.scrubbed),
            "duplicates": self.dedup.summary(),
            "bad_records": self.bad.summary(),
            "seconds": {k: round(v, 3) for k, v in self.seconds.items()},
        }


def open_name(source: SourceConfig, index: int, config: DataConfig) -> str:
    """The name of a source, made unique among ``config.sources`` by a number where it has to be."""
    names = [s.name or default_name(s) for s in config.sources]
    clash = names.count(names[index]) > 1
    if clash and source.name:
        raise ConfigError(f"two sources are called '{source.name}'; names must differ")
    return f"{names[index]}-{index}" if clash else names[index]


def named(source: SourceConfig, name: str) -> SourceConfig:
    """``source`` under ``name``."""
    return replace(source, name=name)
