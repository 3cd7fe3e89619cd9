"""A tokenised corpus on disk, read through memory maps: corpora larger than memory cost only what is touched.

    store.json        sizes and hashes of the other files, counts, vocabulary, tokenizer fingerprint
    tokens-00000.bin  little-endian uint16 or uint32 token ids; every document is [EOS] d1 ... dn [EOS]
    documents.bin     one RECORD per document: where its tokens are, how many bytes of text, where it came
    from paths.jsonl       one JSON string per line: the file names that the records refer to

A store is written in a hidden folder beside its place, flushed to disk, and renamed: there is never half a
store. Opening checks sizes and bounds; ``verify`` also reads every byte and checks the hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from deepseek.errors import DataError
from deepseek.files import flush, write_atomic

FORMAT, VERSION = "deepseek-token-store", 1
SHARD_TOKENS = 2**29  #: a new shard begins once the last one holds this many tokens

RECORD = np.dtype(
    [
        ("shard", "<i4"),
        ("source", "<i4"),
        ("start", "<i8"),  # first token in the shard
        ("length", "<i8"),  # tokens stored, both EOS included
        ("bytes", "<i8"),  # UTF-8 bytes of the text
        ("path", "<i8"),  # line of paths.jsonl
        ("offset", "<i8"),  # Document.offset
    ]
)

Array = npt.NDArray[Any]


class TokenStore:
    """A store opened for reading.

    Attributes:
        records: ``[documents]`` memory-mapped array of ``RECORD``.
        vocab_size, eos_id, pad_id: of the tokenizer that wrote it.
        sources: names of the sources, by ``records["source"]``.
        fingerprint: hash of the content; equal on every machine that holds the same tokens.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        m = self.manifest
        self.vocab_size, self.eos_id, self.pad_id = int(m["vocab_size"]), int(m["eos_id"]), int(m["pad_id"])
        self.sources = [str(s) for s in m["sources"]]
        self.fingerprint = str(m["fingerprint"])
        self.tokenizer_fingerprint = str(m["tokenizer"])
        self._check_sizes()
        dtype = np.dtype(str(m["dtype"]))
        self.records: Array = _map(self.directory / "documents.bin", RECORD)
        self._shards = [_map(self.directory / _shard_name(i), dtype) for i in range(int(m["shards"]))]
        self._paths: list[str] | None = None
        self._check_bounds()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def n_tokens(self) -> int:
        """Targets in the store: tokens of the documents and one closing EOS each."""
        return int(self.manifest["targets"])

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of text."""
        return int(self.manifest["bytes"])

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> Array:
        """Stored ids ``[start, stop)`` of one document (a view; index 0 is the opening EOS).

        Raises:
            DataError: an id lies outside the vocabulary.
        """
        record = self.records[document]
        first, length = int(record["start"]), int(record["length"])
        stop = length if stop is None else min(stop, length)
        ids: Array = self._shards[int(record["shard"])][first + start : first + stop]
        if ids.size and int(ids.max()) >= self.vocab_size:
            raise DataError(
                f"{self.directory}: document {document} holds token id {int(ids.max())}, but the vocabulary "
                f"has "
                f"{self.vocab_size}; the store is damaged, prepare it again"
            )
        return ids

    def provenance(self, document: int) -> tuple[str, str, int]:
        """Source name, path and offset that a document came from."""
        record = self.records[document]
        return self.sources[int(record["source"])], self.paths[int(record["path"])], int(record["offset"])

    def find(self, source: str, path: str, offset: int | None = None) -> list[int]:
        """Numbers of the documents that came from ``path`` of ``source``: the one at ``offset``, or all of them."""
        if source not in self.sources or path not in self.paths:
            return []
        r = self.records
        here = (r["path"] == self.paths.index(path)) & (r["source"] == self.sources.index(source))
        if offset is not None:
            here &= r["offset"] == offset
        return [int(d) for d in np.flatnonzero(here)]

    @property
    def paths(self) -> list[str]:
        """The file names that the records refer to."""
        if self._paths is None:
            lines = (self.directory / "paths.jsonl").read_text(encoding="utf-8").splitlines()
            self._paths = [str(json.loads(line)) for line in lines]
        return self._paths

    def verify(self) -> None:
        """Read everything; raise ``DataError`` naming the file whose hash differs from the manifest's."""
        for name, entry in self.manifest["files"].items():
            digest = hashlib.blake2b(digest_size=16)
            with (self.directory / name).open("rb") as file:
                while part := file.read(2**20):
                    digest.update(part)
            if digest.hexdigest() != entry["blake2b"]:
                raise DataError(f"{self.directory / name} is damaged: its hash is not the one in store.json")

    def _check_sizes(self) -> None:
        for name, entry in self.manifest["files"].items():
            path = self.directory / name
            size = path.stat().st_size if path.is_file() else -1
            if size != entry["bytes"]:
                found = "is missing" if size < 0 else f"has {size} bytes"
                raise DataError(f"{path} {found}; store.json says {entry['bytes']}: prepare the corpus again")

    def _check_bounds(self) -> None:
        r = self.records
        sizes = np.array([len(s) for s in self._shards] or [0], np.int64)
        inside = (r["shard"] >= 0) & (r["shard"] < len(self._shards)) & (r["start"] >= 0) & (r["length"] >= 2)
        inside &= (r["source"] >= 0) & (r["source"] < len(self.sources)) & (r["bytes"] >= 0)
        inside &= r["start"] <= sizes[np.where(inside, r["shard"], 0)] - r["length"]
        if not inside.all():
            bad = int(np.flatnonzero(~inside)[0])
            raise DataError(
                f"{self.directory}: document {bad} of documents.bin points outside its shard; it is damaged"
            )


class StoreWriter:
    """Writes a store, document by document; nothing is visible at ``directory`` until ``close`` (or leaving
    ``with``).

    Args:
        directory: where the store goes; must not exist.
        vocab_size, eos_id, pad_id, tokenizer: the vocabulary and the tokenizer's fingerprint.
        sources: names of the sources.
        shard_tokens: tokens after which a new shard begins.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        vocab_size: int,
        eos_id: int,
        pad_id: int,
        tokenizer: str,
        sources: list[str],
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.directory = Path(directory)
        if self.directory.exists():
            raise DataError(f"{self.directory} exists already; remove it or choose another place")
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.directory.with_name(f".{self.directory.name}.{os.getpid()}.tmp")
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        self._dtype = np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")
        self._eos = np.array([eos_id], self._dtype)
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self._dtype.str,
            "vocab_size": vocab_size,
            "eos_id": eos_id,
            "pad_id": pad_id,
            "tokenizer": tokenizer,
            "sources": sources,
        }
        self._limit = shard_tokens
        self._files = {name: _HashedFile(self._temporary / name) for name in ("documents.bin", "paths.jsonl")}
        self._paths: dict[str, int] = {}
        self._shard, self._start = -1, 0
        self.documents = self._targets = self._bytes = 0

    def add(self, ids: Array, n_bytes: int, *, source: int = 0, path: str = "", offset: int = 0) -> None:
        """Append a document's ids (without EOS), the bytes of its text, and where it came from."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._manifest["vocab_size"]:
            raise DataError(
                f"{path}:{offset}: a token id lies outside the vocabulary of {self._manifest['vocab_size']}"
            )
        if self._shard < 0 or self._start >= self._limit:
            self._shard, self._start = self._shard + 1, 0
            self._files[_shard_name(self._shard)] = _HashedFile(self._temporary / _shard_name(self._shard))
        stored = np.concatenate([self._eos, ids.astype(self._dtype), self._eos])
        self._files[_shard_name(self._shard)].write(stored.tobytes())
        where = self._path(path)
        row = (self._shard, source, self._start, len(stored), n_bytes, where, offset)
        self._files["documents.bin"].write(np.array([row], RECORD).tobytes())
        self._start += len(stored)
        self.documents, self._bytes = self.documents + 1, self._bytes + n_bytes
        self._targets += len(stored) - 1

    def _path(self, path: str) -> int:
        if path not in self._paths:
            self._paths[path] = len(self._paths)
            self._files["paths.jsonl"].write(json.dumps(path).encode() + b"\n")
        return self._paths[path]

    def close(self) -> TokenStore:
        """Flush, write the manifest, and make the store visible."""
        files = {name: file.close() for name, file in sorted(self._files.items())}
        hashes = json.dumps([files, self._manifest], sort_keys=True).encode()
        self._manifest |= {
            "documents": self.documents,
            "targets": self._targets,
            "bytes": self._bytes,
            "shards": self._shard + 1,
            "files": files,
            "fingerprint": hashlib.blake2b(hashes, digest_size=16).hexdigest(),
        }
        write_json(self._temporary / "store.json", self._manifest)
        flush(self._temporary)
        self._temporary.rename(self.directory)
        flush(self.directory.parent)
        return TokenStore(self.directory)

    def abandon(self) -> None:
        """Drop what was written."""
        for file in self._files.values():
            file.file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()
        elif not self.directory.exists():
            self.close()


class _HashedFile:
    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("wb", buffering=2**20)
        self._digest, self._bytes = hashlib.blake2b(digest_size=16), 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def close(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"bytes": self._bytes, "blake2b": self._digest.hexdigest()}


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def _shard_name(index: int) -> str:
    return f"tokens-{index:05d}.bin"


def _map(path: Path, dtype: np.dtype[Any]) -> Array:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))  # a plain view: memmap slices at a tenth of the speed


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / "store.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no token store at {directory}: store.json is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    problem = _manifest_problem(found)
    if problem:
        raise DataError(f"{path} is damaged: {problem}")
    manifest: dict[str, Any] = found
    return manifest


_FIELDS: dict[str, type] = {
    "dtype": str,
    "vocab_size": int,
    "eos_id": int,
    "pad_id": int,
    "tokenizer": str,
    "sources": list,
    "documents": int,
    "targets": int,
    "bytes": int,
    "shards": int,
    "files": dict,
    "fingerprint": str,
}


def _manifest_problem(found: Any) -> str | None:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return f"it is no {FORMAT}"
    if found.get("version") != VERSION:
        return f"version {found.get('version')} is not the {VERSION} that this release reads"
    for name, kind in _FIELDS.items():
        if not isinstance(found.get(name), kind):
            return f"'{name}' is {found.get(name)!r}, not {kind.__name__}"
    if found["dtype"] not in ("<u2", "<u4") or not 0 <= found["shards"] < 10**5:
        return f"dtype {found['dtype']}, {found['shards']} shards"
    wanted = {"documents.bin", "paths.jsonl", *(_shard_name(i) for i in range(found["shards"]))}
    files = found["files"]
    if set(files) != wanted:
        return f"it lists the files {sorted(files)[:5]}, not {sorted(wanted)[:5]}"
    if not all(
        isinstance(e, dict) and isinstance(e.get("bytes"), int) and "blake2b" in e for e in files.values()
    ):
        return "a file has no size or hash"
    if files["documents.bin"]["bytes"] != found["documents"] * RECORD.itemsize:
        size = files["documents.bin"]["bytes"]
        return f"{found['documents']} documents do not fit documents.bin of {size} bytes"
    return None
