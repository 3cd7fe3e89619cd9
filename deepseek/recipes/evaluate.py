"""Bits per byte on the held-out documents, beside what everybody has: gzip and xz on the same bytes."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from deepseek.assemble import Run, load, pick_device
from deepseek.data import Corpus, prepare
from deepseek.errors import DataError
from deepseek.events import emit
from deepseek.precision import choose
from deepseek.recipes.plan import held_out_shape, read_config
from deepseek.train import Evaluation, evaluate

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda data: gzip.compress(data, 9),
    "xz -9": lambda data: lzma.compress(data, preset=9),
}


@dataclass(frozen=True)
class Compression:
    """``how``: 'each file' by itself, as the model reads them, or 'one archive' of all."""

    name: str
    how: str
    bits_per_byte: float


@dataclass(frozen=True)
class RunEvaluation:
    """The model's evaluation, the compressors', and the step it is of."""

    step: int | None
    model: Evaluation
    compressors: list[Compression]
    documents: int


def evaluate_run(path: Path | str, device: str = "auto", compressors: bool = True) -> RunEvaluation:
    """Evaluate a run's newest checkpoint (or one checkpoint) on its own held-out documents."""
    loaded = load(path, pick_device(device))
    run = Run.open(loaded.path)
    config = read_config(run.config_path)
    corpus = prepare(config.data, config.data.cache or run.path.parent / ".corpora")
    if loaded.tokenizer is None or loaded.tokenizer.fingerprint != corpus.tokenizer.fingerprint:
        raise DataError(
            f"the corpus of {run.path} has changed: its tokenizer is not the one that the model was trained with; "
            "restore the files that data.sources names"
        )
    policy = choose(config.train.precision_mode, pick_device(device))
    rows, length = held_out_shape(config)
    batches = corpus.eval_batches(rows=rows, length=length)
    found = evaluate(loaded.model, batches, policy)
    emit("evaluate", loaded.step, **asdict(found))
    others = compress_held_out(corpus) if compressors else []
    for other in others:
        emit("compress", loaded.step, **asdict(other))
    return RunEvaluation(loaded.step, found, others, len(corpus.held_out or ()))


def compress_held_out(corpus: Corpus) -> list[Compression]:
    """gzip and xz at their best, on exactly the bytes that the model is evaluated on."""
    files = held_out_texts(corpus)
    total = sum(map(len, files))
    results = []
    for name, compress in COMPRESSORS.items():
        each = sum(len(compress(data)) for data in files)
        results.append(Compression(name, "each file", 8 * each / total))
        results.append(Compression(name, "one archive", 8 * len(compress(b"".join(files))) / total))
    return results


def held_out_texts(corpus: Corpus) -> list[bytes]:
    """The held-out documents as UTF-8. Raises ``DataError`` when there are none."""
    store = corpus.held_out
    if store is None or len(store) == 0:
        raise DataError("the corpus has no held-out documents: data.held_out is 0")
    return [corpus.tokenizer.decode(store.tokens(i).tolist()).encode() for i in range(len(store))]
