"""Sources of records: JSON lines (plain, gzip, zstandard), Parquet, and directories of the ``datasets``
library.
"""

from __future__ import annotations

import gzip
import importlib
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from deepseek.data.source import (
    BadRecords,
    Document,
    Source,
    SourceConfig,
    StdlibSource,
    TextSource,
    usable,
)
from deepseek.errors import DataError, MissingExtraError

MAX_LINE = 64 * 2**20  #: bytes of a JSON line; longer ones are skipped as bad records, not read into memory


class JsonlSource(Source):
    """One JSON object a line; its field ``config.field`` is the document. Offsets are bytes of uncompressed
    text.
    """

    patterns = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.ndjson", "*.json")

    def read(self, path: Path, relative: str, offset: int) -> Iterator[tuple[Document, int]]:
        with open_compressed(path) as file:
            try:
                if offset:
                    file.seek(offset)
                while line := file.readline(MAX_LINE):
                    start, offset = offset, offset + len(line)
                    if len(line) == MAX_LINE and not line.endswith(b"\n"):
                        offset += skip_line(file)
                        self.bad.add("too_long", relative, start, f"a line of more than {MAX_LINE} bytes")
                    elif line.strip() and (text := self._text(line, relative, start)) is not None:
                        yield Document(text, self.name, relative, start), offset
            except Exception as error:
                if not isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error, *_zstandard_errors())):
                    raise
                self.bad.add("truncated", relative, offset, str(error))

    def _text(self, line: bytes, relative: str, offset: int) -> str | None:
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            self.bad.add("undecodable", relative, offset, str(error))
            return None
        except (ValueError, RecursionError) as error:
            self.bad.add("bad_json", relative, offset, str(error))
            return None
        value = record.get(self.config.field) if isinstance(record, dict) else None
        return field_text(self, value, record, relative, offset)


def field_text(source: Source, value: Any, record: Any, relative: str, offset: int) -> str | None:
    """``value`` as usable text, or ``None`` and a bad record that says what was there instead."""
    if isinstance(value, str):
        return usable(value, source.bad, relative, offset)
    found = f"fields: {', '.join(list(record)[:10])}" if isinstance(record, dict) else type(record).__name__
    kind = "missing_field" if value is None else "not_text"
    source.bad.add(kind, relative, offset, f"no text in '{source.config.field}' ({found})")
    return None


def skip_line(file: IO[bytes]) -> int:
    """Read on to the end of the line; the number of bytes passed over."""
    passed = 0
    while part := file.readline(MAX_LINE):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def open_compressed(path: Path) -> IO[bytes]:
    """A file open for reading bytes, decompressed by its suffix (``.gz``, ``.zst``)."""
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return _open_zstandard(path)
    return path.open("rb")


def _zstandard_errors() -> tuple[type[Exception], ...]:
    """What a damaged ``.zst`` file raises, once its package has been imported."""
    module: Any = sys.modules.get("zstandard")
    return (module.ZstdError,) if module is not None else ()


def _open_zstandard(path: Path) -> IO[bytes]:
    try:
        zstandard: Any = importlib.import_module("zstandard")
    except ImportError:
        raise MissingExtraError("zstandard", "data", f"reading {path.name}") from None
    return cast("IO[bytes]", _io_buffered(zstandard.open(path, "rb")))


def _io_buffered(raw: Any) -> Any:
    import io

    return io.BufferedReader(raw)


class ParquetSource(Source):
    """Rows of Parquet files; column ``config.field`` is the document and its row number the offset."""

    patterns = ("*.parquet",)

    def read(self, path: Path, relative: str, offset: int) -> Iterator[tuple[Document, int]]:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise MissingExtraError("pyarrow", "data", f"reading {path.name}") from None
        row = 0
        try:
            with parquet.ParquetFile(path) as file:
                if self.config.field not in file.schema_arrow.names:
                    names = ", ".join(file.schema_arrow.names[:10])
                    self.bad.add(
                        "missing_field", relative, 0, f"no column '{self.config.field}'; it has: {names}"
                    )
                    return
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if row + rows > offset:
                        column = file.read_row_group(group, columns=[self.config.field]).column(0)
                        yield from self._rows(column, relative, row, offset)
                    row += rows
        except pyarrow.ArrowException as error:
            self.bad.add("truncated", relative, row, str(error))

    def _rows(self, column: Any, relative: str, row: int, offset: int) -> Iterator[tuple[Document, int]]:
        for index in range(max(0, offset - row), len(column)):
            try:
                value = column[index].as_py()
            except UnicodeDecodeError as error:
                self.bad.add("undecodable", relative, row + index, str(error))
                continue
            text = field_text(self, value, None, relative, row + index)
            if text is not None:
                yield Document(text, self.name, relative, row + index), row + index + 1


class DatasetsSource(Source):
    """A directory written by ``datasets.Dataset.save_to_disk`` (or one split of a ``DatasetDict``)."""

    def find(self) -> tuple[Path, list[Path]]:
        root = Path(self.config.path).expanduser()
        if not root.is_dir():
            raise DataError(f"no folder {root}")
        if (root / "dataset_info.json").is_file():
            return root, [root / "dataset_info.json"]
        found = sorted(p / "dataset_info.json" for p in root.iterdir() if (p / "dataset_info.json").is_file())
        if not found:
            raise DataError(f"{root} is no directory of datasets.save_to_disk: it holds no dataset_info.json")
        return root, found

    def read(self, path: Path, relative: str, offset: int) -> Iterator[tuple[Document, int]]:
        try:
            import datasets
        except ImportError:
            raise MissingExtraError("datasets", "data", f"reading {path.parent}") from None
        try:
            table = datasets.load_from_disk(str(path.parent))
        except (
            Exception
        ) as error:  # the library raises anything from KeyError to ArrowInvalid on damaged folders
            self.bad.add("unreadable", relative, 0, f"{type(error).__name__}: {error}")
            return
        if self.config.field not in table.column_names:
            names = ", ".join(table.column_names[:10])
            self.bad.add("missing_field", relative, 0, f"no column '{self.config.field}'; it has: {names}")
            return
        column = table.select_columns([self.config.field])
        for index in range(offset, len(column)):
            text = field_text(self, column[index][self.config.field], None, relative, index)
            if text is not None:
                yield Document(text, self.name, relative, index), index + 1


def open_source(config: SourceConfig, bad: BadRecords | None = None) -> Source:
    """The source that ``config`` names. Raises ``DataError`` when it is missing or empty."""
    kinds: dict[str, type[Source]] = {
        "stdlib": StdlibSource,
        "text": TextSource,
        "jsonl": JsonlSource,
        "parquet": ParquetSource,
        "datasets": DatasetsSource,
    }
    return kinds[config.kind](config, bad)
