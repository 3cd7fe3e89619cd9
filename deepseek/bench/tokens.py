"""A prepared corpus as a few small files: what travels to the machine that trains, and is read there in seconds.

    tokens.json       counts, bytes, hashes, where it came from
    tokenizer/        tokenizer.json and its config
    train-00.xz ...   little-endian uint16 ids, compressed: every document is [EOS] d1 ... dn, an EOS at the end
    held_out-00.xz    likewise
    token_bytes.xz    UTF-8 bytes each id stands for, uint16

LZMA brings documentation to about 5.5 bits a token. It is slow to write and fast to read, in parallel parts.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek.data.corpus import Corpus
from deepseek.data.store import TokenStore
from deepseek.errors import DataError
from deepseek.files import write_atomic

FORMAT = "deepseek-tokens"
PART = 2**24  #: tokens compressed together; also the unit of parallel work
Ids = npt.NDArray[np.uint16]

#: Ids are two bytes, so literals depend on the position within a pair.
_FILTERS = [
    {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "dict_size": 2**25,
        "lc": 3,
        "lp": 1,
        "pb": 1,
    }
]


@dataclass(frozen=True)
class Tokens:
    """A corpus read back.

    Attributes:
        train: ``[N]`` uint16 ids, documents one after another, an EOS before each and one at the end.
        held_out: ``[M]`` likewise, of the documents kept from training.
        token_bytes: ``[vocab_size]`` UTF-8 bytes each id stands for; 0 for special tokens.
        vocab_size, eos_id: of the tokenizer.
        report: ``tokens.json`` as plain values.
    """

    train: Ids
    held_out: Ids
    token_bytes: Ids
    vocab_size: int
    eos_id: int
    report: dict[str, Any]


def write_tokens(corpus: Corpus, directory: Path | str, limit: int = 0) -> dict[str, Any]:
    """Write ``corpus`` as compressed files.

    Args:
        corpus: prepared, with held-out documents and a vocabulary of at most 65,536.
        directory: created; files of an earlier call are replaced.
        limit: bytes of compressed training tokens, at most; documents are left out by a stable hash until
            they fit. 0 writes all.

    Raises:
        DataError: ids do not fit 16 bits, or nothing is held out.
    """
    directory = Path(directory)
    if corpus.held_out is None or corpus.tokenizer.vocab_size > 2**16:
        raise DataError(
            f"compact files need held-out documents and at most 65,536 ids; this corpus has "
            f"{corpus.tokenizer.vocab_size} and held_out={corpus.config.held_out}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob("*.xz"):
        stale.unlink()
    corpus.tokenizer.save(directory / "tokenizer")
    kept, parts, train = 1.0, [], joined(corpus.train, 1.0)
    while True:
        parts = compress(train)
        size = sum(map(len, parts))
        if not limit or size <= limit:
            break
        kept *= 0.985 * limit / size
        train = joined(corpus.train, kept)
    held_out = joined(corpus.held_out, 1.0)
    files = {f"train-{i:02d}.xz": part for i, part in enumerate(parts)}
    files |= {f"held_out-{i:02d}.xz": part for i, part in enumerate(compress(held_out))}
    files["token_bytes.xz"] = compress(corpus.tokenizer.token_bytes.astype(np.uint16))[0]
    for name, data in files.items():
        (directory / name).write_bytes(data)
    sizes = corpus.tokenizer.token_bytes.astype(np.int64)
    report = {
        "format": FORMAT,
        "corpus": corpus.fingerprint,
        "vocab_size": corpus.tokenizer.vocab_size,
        "eos_id": corpus.tokenizer.eos_id,
        "train_tokens": len(train),
        "train_bytes": int(sizes[train].sum()),
        "train_documents": int((train == corpus.tokenizer.eos_id).sum()) - 1,
        "share_of_documents": round(kept, 4),
        "held_out_tokens": len(held_out),
        "held_out_bytes": int(sizes[held_out].sum()),
        "held_out_documents": len(corpus.held_out),
        "files": {name: hashlib.blake2b(data, digest_size=16).hexdigest() for name, data in files.items()},
        "file_bytes": sum(map(len, files.values())),
    }
    write_atomic(directory / "tokens.json", json.dumps(report, indent=2) + "\n")
    return report


def joined(store: TokenStore, share: float) -> Ids:
    """The documents of ``store``, or the ``share`` of them that a hash of their number picks, in its order."""

    def chosen() -> Iterable[Ids]:
        for i in range(len(store)):
            if (
                share >= 1
                or int.from_bytes(hashlib.blake2b(b"%d" % i, digest_size=4).digest(), "big") < share * 2**32
            ):
                yield np.asarray(store.tokens(i))[:-1].astype(np.uint16)
        yield np.array([store.eos_id], np.uint16)

    return np.concatenate(list(chosen()))


def compress(ids: Ids) -> list[bytes]:
    """Parts of ``PART`` tokens, compressed side by side (LZMA lets go of the interpreter)."""

    def one(start: int) -> bytes:
        raw = ids[start : start + PART].astype("<u2").tobytes()
        return lzma.compress(raw, lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=_FILTERS)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, range(0, max(1, len(ids)), PART)))


def load_tokens(directory: Path | str) -> Tokens:
    """Read what ``write_tokens`` wrote. Raises ``DataError`` when a file is missing or damaged."""
    directory = Path(directory)
    try:
        report = json.loads((directory / "tokens.json").read_text(encoding="utf-8"))
        names = dict(report["files"])
        with ThreadPoolExecutor(min(16, len(names))) as pool:
            arrays = dict(zip(names, pool.map(lambda n: _read(directory / n, names[n]), names)))
        return Tokens(
            train=_series(arrays, "train-"), held_out=_series(arrays, "held_out-"),
            token_bytes=arrays["token_bytes.xz"], vocab_size=int(report["vocab_size"]), eos_id=int(report["eos_id"]),
            report=report,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise DataError(
            f"no corpus of tokens at {directory}: {Path(error.filename).name} is missing; "
            f"write it with: python benchmarks/corpus_debian.py --out {directory}"
        ) from None
    except (ValueError, KeyError, TypeError, lzma.LZMAError) as error:
        raise DataError(f"the corpus of tokens at {directory} is damaged: {error}") from None


def _read(path: Path, digest: str) -> Ids:
    data = path.read_bytes()
    if hashlib.blake2b(data, digest_size=16).hexdigest() != digest:
        raise ValueError(f"{path.name} has another hash than tokens.json says")
    return np.frombuffer(lzma.decompress(data), "<u2").astype(np.uint16, copy=False)


def _series(arrays: dict[str, Ids], prefix: str) -> Ids:
    return np.concatenate([arrays[name] for name in sorted(arrays) if name.startswith(prefix)])
