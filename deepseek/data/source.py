"""Where text comes from. A source walks files in a fixed order and yields one ``Document`` after another.

Every source is an iterator with a cursor: ``state_dict()`` after the n-th document, loaded into a fresh
source, makes it go on with document n + 1. Records that cannot be read (bad JSON, undecodable bytes, a
truncated archive) are
counted, reported with file and offset, and skipped: one bad line never ends a run. A *missing* or *empty*
    corpus does.

A document's identity is the file's path relative to the source's root plus an offset (byte, line or row), so
that the held-out split by ``is_held_out`` is the same on every machine and in every order.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from deepseek.config import configclass
from deepseek.errors import ConfigError, DataError
from deepseek.events import emit

Kind = Literal["stdlib", "text", "jsonl", "parquet", "datasets"]


@configclass
class SourceConfig:
    """One source of text.

    Attributes:
        kind: ``stdlib`` (the Python standard library of this machine), ``text``, ``jsonl`` (also ``.gz``,
            ``.zst``), ``parquet``, or ``datasets`` (a directory written by ``datasets.save_to_disk``).
        path: a file, a folder (searched recursively) or a glob; unused for ``stdlib``.
        field: name of the text field or column of ``jsonl``, ``parquet`` and ``datasets`` records.
        weight: this source's share of the training tokens, relative to the other sources; 0 leaves it out.
        name: how reports call it; empty derives one from kind and path.
        pattern: which file names of a folder are read, e.g. ``*.txt``; empty takes those usual for the kind.
        split: how ``text`` files become documents: ``file`` (one each), ``paragraph`` (cut at blank lines),
            or ``auto``: one each, but a source of a single file is cut at blank lines into pieces of at least
            4 KiB.
    """

    kind: Kind = "stdlib"
    path: str = ""
    field: str = "text"
    weight: float = 1.0
    name: str = ""
    pattern: str = ""
    split: Literal["auto", "file", "paragraph"] = "auto"

    def check(self) -> None:
        if self.kind != "stdlib" and not self.path:
            raise ConfigError(f"a source of kind '{self.kind}' needs a path")
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"a source's weight must be a finite number >= 0, not {self.weight}")


@dataclass(frozen=True)
class Document:
    """A piece of text and where it came from.

    Attributes:
        text: the text, valid Unicode without lone surrogates.
        source: name of the source.
        path: POSIX path of the file relative to the source's root.
        offset: where in the file: a byte offset (text, uncompressed JSONL) or a row (Parquet, datasets).
    """

    text: str
    source: str
    path: str
    offset: int = 0

    @property
    def id(self) -> str:
        return f"{self.source}:{self.path}:{self.offset}"


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a stable hash of path and offset, below
    ``fraction``.
    """
    digest = hashlib.blake2b(f"{document.path}\0{document.offset}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read."""

    kind: str
    path: str
    offset: int
    detail: str


@dataclass
class BadRecords:
    """Counts per kind, the first ``keep`` examples of each kind; only those are also emitted as events."""

    keep: int = 100
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[BadRecord] = field(default_factory=list)
    quiet: bool = False

    def add(self, kind: str, path: str, offset: int, detail: str = "") -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= self.keep:
            self.examples.append(BadRecord(kind, path, offset, detail[:200]))
            if not self.quiet and kind != "empty":  # an empty __init__.py is counted, and no news
                emit("bad_record", kind=kind, path=path, offset=offset, detail=detail[:200])

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def summary(self) -> dict[str, Any]:
        """Plain values for reports: total, counts per kind and the examples."""
        return {
            "total": self.total,
            "counts": dict(self.counts),
            "examples": [vars(e) for e in self.examples],
        }


class Source(ABC):
    """An iterator of ``Document`` with a cursor. Subclasses say which files and how one file is read."""

    patterns: tuple[str, ...] = ("*",)

    def __init__(self, config: SourceConfig, bad: BadRecords | None = None) -> None:
        self.config, self.name = config, config.name or default_name(config)
        self.bad = bad if bad is not None else BadRecords()
        self.root, self.files = self.find()
        if not self.files:
            raise DataError(f"source '{self.name}' is empty: no file in {self.root} matches {self._wanted()}")
        self._file, self._offset = 0, 0

    @abstractmethod
    def read(self, path: Path, relative: str, offset: int) -> Iterator[tuple[Document, int]]:
        """Documents of one file from ``offset`` on, each with the offset after it."""

    def find(self) -> tuple[Path, list[Path]]:
        """The root and the sorted files below it."""
        return find_files(Path(self.config.path), self._wanted(), self.bad)

    def _wanted(self) -> tuple[str, ...]:
        return (self.config.pattern,) if self.config.pattern else self.patterns

    def relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def __iter__(self) -> Iterator[Document]:
        while self._file < len(self.files):
            path = self.files[self._file]
            try:
                for document, after in self.read(path, self.relative(path), self._offset):
                    self._offset = after
                    yield document
            except OSError as error:
                self.bad.add("unreadable", self.relative(path), self._offset, str(error))
            self._file, self._offset = self._file + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the document delivered last; plain JSON values."""
        path = self.relative(self.files[self._file]) if self._file < len(self.files) else ""
        return {"file": self._file, "path": path, "offset": self._offset, "files": len(self.files)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a cursor. Raises ``DataError`` when it belongs to another list of files."""
        index, offset = state.get("file"), state.get("offset")
        if not isinstance(index, int) or not isinstance(offset, int) or not 0 <= index <= len(self.files):
            raise DataError(f"source '{self.name}': not a cursor: {state!r}")
        path = self.relative(self.files[index]) if index < len(self.files) else ""
        if state.get("files") != len(self.files) or state.get("path") != path:
            raise DataError(
                f"source '{self.name}' has {len(self.files)} files and file {index} is '{path}', but the "
                f"cursor was "
                f"taken over {state.get('files')} files with '{state.get('path')}' there; restore the files "
                f"or restart"
            )
        self._file, self._offset = index, offset

    def signature(self) -> str:
        """Hash of the names, sizes and times of the files: changes when the corpus does. Reads no content."""
        digest = hashlib.blake2b(self.name.encode(), digest_size=16)
        for path in self.files:
            stat = path.stat()
            line = f"{self.relative(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def sample(self, budget: int) -> Iterator[Document]:
        """About ``budget`` bytes of documents spread over the files in an order set by their names' hash."""

        def rank(path: Path) -> bytes:
            return hashlib.blake2b(self.relative(path).encode(), digest_size=8).digest()

        each, total = max(65536, budget // len(self.files)), 0
        for path in sorted(self.files, key=rank):
            taken = 0
            try:
                for document, _ in self.read(path, self.relative(path), 0):
                    size = len(document.text.encode())
                    taken, total = taken + size, total + size
                    yield document
                    if taken >= each or total >= budget:
                        break
            except OSError:
                continue  # the reading pass counts and reports it
            if total >= budget:
                return


class StdlibSource(Source):
    """The ``*.py`` files of this machine's Python standard library, without its tests: the embedded
    default.
    """

    patterns = ("*.py",)
    skipped = frozenset(
        {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    )

    def find(self) -> tuple[Path, list[Path]]:
        root = Path(sysconfig.get_path("stdlib"))
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in self.skipped)
            found += [Path(folder, n) for n in names if n.endswith(".py")]
        return root, sorted(found, key=lambda p: p.relative_to(root).as_posix())

    def read(self, path: Path, relative: str, offset: int) -> Iterator[tuple[Document, int]]:
        yield from read_whole(self, path, relative, offset)


class TextSource(Source):
    """Text files: one document a file, or cut at blank lines. The documents of a file join to exactly that
    file.
    """

    minimum = 4096  #: bytes of a piece of a single file under ``split="auto"``

    def read(self, path: Path, relative: str, offset: int) -> Iterator[tuple[Document, int]]:
        split = self.config.split
        if split == "file" or (split == "auto" and len(self.files) > 1):
            return read_whole(self, path, relative, offset)
        return self._read_blocks(path, relative, offset, 0 if split == "paragraph" else self.minimum)

    def _read_blocks(
        self, path: Path, relative: str, offset: int, minimum: int
    ) -> Iterator[tuple[Document, int]]:
        with path.open("rb") as file:
            file.seek(offset)
            block, blank = bytearray(), False
            for line in file:
                if blank and line.strip() and len(block) >= minimum and block.strip():
                    yield from self._block(bytes(block), relative, offset)
                    offset, block = offset + len(block), bytearray()
                block += line
                blank = not line.strip()
            yield from self._block(bytes(block), relative, offset)

    def _block(self, block: bytes, relative: str, offset: int) -> Iterator[tuple[Document, int]]:
        text = decode(block, self.bad, relative, offset)
        if text is not None:
            yield Document(text, self.name, relative, offset), offset + len(block)


def read_whole(source: Source, path: Path, relative: str, offset: int) -> Iterator[tuple[Document, int]]:
    """The file as one document, unless the cursor is already past it."""
    if offset == 0:
        data = path.read_bytes()
        text = decode(data, source.bad, relative, 0)
        if text is not None:
            yield Document(text, source.name, relative, 0), max(1, len(data))


def decode(data: bytes, bad: BadRecords, path: str, offset: int) -> str | None:
    """``data`` as UTF-8 text; ``None``, and a bad record, when it is undecodable, blank or nothing but
    NULs.
    """
    try:
        text = data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        bad.add("undecodable", path, offset + error.start, f"byte 0x{data[error.start]:02x} is not UTF-8")
        return None
    return usable(text, bad, path, offset)


def usable(text: str, bad: BadRecords, path: str, offset: int) -> str | None:
    """``text`` if it holds anything but blanks and NULs and can be encoded; else ``None`` and a bad
    record.
    """
    if not text.strip("\0 \t\r\n"):
        bad.add("nul_only" if "\0" in text else "empty", path, offset)
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad.add("undecodable", path, offset, f"lone surrogate at character {error.start}")
        return None
    return text


def find_files(path: Path, patterns: tuple[str, ...], bad: BadRecords) -> tuple[Path, list[Path]]:
    """Root and sorted regular files of a file, folder or glob; hidden files and links that leave the root are
    left out.

    Raises:
        DataError: nothing exists at ``path``.
    """
    path = path.expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        candidates = [p for p in path.rglob("*") if any(fnmatch(p.name, w) for w in patterns)]
        root = path
    elif any(c in str(path) for c in "*?["):
        fixed = path.parts
        depth = next(i for i, part in enumerate(fixed) if any(c in part for c in "*?["))
        root = Path(*fixed[:depth]) if depth else Path()
        try:
            candidates = list(root.glob(str(Path(*fixed[depth:]))))
        except (ValueError, NotImplementedError) as error:
            raise DataError(f"{path} is not a usable pattern: {error}") from None
    else:
        raise DataError(f"no file or folder {path}")
    if not root.is_dir():
        raise DataError(f"no folder {root}")
    found = [p for p in candidates if _encodable_name(p, bad) and _inside(p, root, bad)]
    return root, sorted(found, key=lambda p: p.as_posix())


def _encodable_name(path: Path, bad: BadRecords) -> bool:
    """Whether the name is Unicode: provenance is written down as text."""
    try:
        path.name.encode()
    except UnicodeEncodeError:
        bad.add("undecodable", ascii(path.name), 0, "a file name that is not UTF-8")
        return False
    return True


def _inside(path: Path, root: Path, bad: BadRecords) -> bool:
    relative = path.relative_to(root)
    if not path.is_file() or any(part.startswith(".") for part in relative.parts):
        return False
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        bad.add("outside_root", relative.as_posix(), 0, "a link that leaves the source's folder")
        return False
    return True


def default_name(config: SourceConfig) -> str:
    """``stdlib``, or the stem of the path."""
    return "stdlib" if config.kind == "stdlib" else Path(config.path).name.split(".")[0] or config.kind
