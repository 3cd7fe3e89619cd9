"""The GGUF file (versions 2 and 3): metadata and tensors of one model, read one tensor at a time.

    "GGUF"  version  tensors  keys    4 + 4 + 8 + 8 bytes, little-endian
    keys × (name, type, value)        strings are a length and UTF-8; arrays a type, a length and items
    tensors × (name, sizes, type, offset)
    padding to general.alignment, then the tensors' bytes

The file is mapped, not read, and nothing in it is believed: every count and length is compared with the bytes
that are left before anything of that size is made, so a damaged file ends in a ``WeightsError`` that tells
where. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from deepseek.errors import WeightsError, did_you_mean
from deepseek.weights.gguf_quants import Format, dequantise, format_of

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_HEADER = 256 << 20  #: bytes of metadata; the largest tokenizers need a twentieth
MOST_ITEMS = 1 << 24  #: in one array
MOST_TENSORS = 1 << 20
MOST_KEYS = 1 << 16
MOST_DIMENSIONS = 4
MOST_NESTED = 4  #: arrays of arrays
STRING, ARRAY, BOOL = 8, 9, 7

_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_LEAST = {
    **{number: int(code[2:]) for number, code in _NUMBERS.items()},
    STRING: 8,
    ARRAY: 12,
}  # bytes of an item


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: ``start`` and ``bytes`` in the file; ``shape`` as torch has it, slowest first."""

    name: str
    shape: tuple[int, ...]
    format: Format
    start: int
    bytes: int


class GGUFFile:
    """One open file. A context manager; ``get`` works until it is closed.

    Attributes:
        metadata: every key; arrays are lists.
        places: every tensor by name.

    Raises:
        WeightsError: not a GGUF file, damaged, or with a tensor of a type that we do not read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise WeightsError(f"{path} is not there") from None
        except ValueError:
            raise WeightsError(f"{path} is empty") from None
        except OSError as error:
            raise WeightsError(f"cannot read {path}: {error.strerror or error}") from None
        try:
            header = _Header(self.path, self._map)
            self.metadata, self.places = header.metadata, header.places
        except BaseException:
            self._map.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()

    @property
    def names(self) -> list[str]:
        return list(self.places)

    def get(self, name: str) -> Tensor:
        """One tensor: fp32 where the file has blocks, else as it is stored. A copy of its own.

        The pages it came from are given back to the system, so a walk over a file needs the memory of its largest
        tensor.
        """
        if name not in self.places:
            raise WeightsError(f"{self.path} has no tensor {name!r}{did_you_mean(name, self.places)}")
        place = self.places[name]
        raw = np.frombuffer(self._map, np.uint8, place.bytes, place.start)
        tensor = dequantise(raw, place.format, place.shape)
        del raw
        if hasattr(self._map, "madvise"):
            first = place.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, place.start + place.bytes - first)
        return tensor


class _Header:
    """Reads everything before the tensors' bytes; ``self.at`` is the place in the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0
        self.end = min(len(data), MOST_HEADER)
        self.metadata: dict[str, Any] = {}
        self.places: dict[str, TensorPlace] = {}
        if len(data) < 24 or data[:4] != MAGIC:
            raise self._error(f"is not a GGUF file: it begins with {data[:4]!r} and has {len(data)} bytes")
        self.at = 4
        version = self._number("<u4")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            why = "big-endian" if swapped in VERSIONS else f"of version {version}"
            raise self._error(f"is {why}; we read little-endian files of versions 2 and 3")
        tensors = self._count("tensors", 24, MOST_TENSORS)
        keys = self._count("keys", 13, MOST_KEYS)
        for _ in range(keys):
            self._read_key()
        self._read_places(tensors)

    def _error(self, what: str) -> WeightsError:
        return WeightsError(f"{self.path} {what}")

    def _take(self, count: int, what: str) -> int:
        """Step over ``count`` bytes; returns where they begin."""
        start = self.at
        if count > self.end - start:
            limit = "bytes" if self.end == len(self.data) else "bytes of metadata that we read"
            raise self._error(
                f"is damaged: {what} at byte {start} needs {count} bytes, "
                f"but {self.end - start} are left of {self.end} {limit}"
            )
        self.at += count
        return start

    def _number(self, code: str) -> Any:
        kind = np.dtype(code)
        start = self._take(kind.itemsize, "a number")
        return np.frombuffer(self.data, kind, 1, start)[0].item()

    def _count(self, what: str, least: int, most: int) -> int:
        """A count of things of at least ``least`` bytes each."""
        start = self.at
        count: int = self._number("<u8")
        if count > most or count * least > self.end - self.at:
            raise self._error(
                f"is damaged: at byte {start} it says {count} {what}, "
                f"but {self.end - self.at} bytes are left and we read at most {most}"
            )
        return count

    def _text(self, what: str, exact: bool = False) -> str:
        size: int = self._number("<u8")
        start = self._take(size, what)
        raw = self.data[start : start + size]
        try:
            return raw.decode("utf-8", "strict" if exact else "replace")
        except UnicodeDecodeError as error:
            raise self._error(f"is damaged: {what} at byte {start} is not UTF-8: {error.reason}") from None

    def _read_key(self) -> None:
        start = self.at
        name = self._text("the name of a key", exact=True)
        if name in self.metadata:
            raise self._error(f"is damaged: the key {name!r} is there twice, again at byte {start}")
        self.metadata[name] = self._value(self._number("<u4"), name)

    def _value(self, kind: int, name: str, depth: int = 0) -> Any:
        if kind == STRING:
            return self._text(name)
        if kind == ARRAY:
            return self._array(name, depth)
        if kind not in _NUMBERS:
            raise self._error(
                f"is damaged: {name!r} has a value of unknown type {kind} before byte {self.at}"
            )
        value = self._number(_NUMBERS[kind])
        return bool(value) if kind == BOOL else value

    def _array(self, name: str, depth: int) -> list[Any]:
        if depth >= MOST_NESTED:
            raise self._error(f"is damaged: {name!r} nests arrays more than {MOST_NESTED} deep")
        kind: int = self._number("<u4")
        if kind not in _LEAST:
            raise self._error(
                f"is damaged: {name!r} has items of the unknown type {kind} before byte {self.at}"
            )
        count = self._count(f"items of {name!r}", _LEAST[kind], MOST_ITEMS)
        if kind in _NUMBERS:
            start = self._take(count * _LEAST[kind], name)
            items: list[Any] = np.frombuffer(self.data, _NUMBERS[kind], count, start).tolist()
            return [bool(item) for item in items] if kind == BOOL else items
        return [self._value(kind, name, depth + 1) for _ in range(count)]

    def _read_places(self, count: int) -> None:
        listed = [self._read_place() for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._error(
                f"has general.alignment {alignment!r}; it must be a power of two up to {1 << 20}"
            )
        base = -(-self.at // alignment) * alignment
        last = base
        for name, shape, form, offset in sorted(listed, key=lambda entry: entry[3]):
            size = form.bytes
            for n in shape:
                size *= n
            size //= form.size
            start = base + offset
            if start < last or offset % alignment or start + size > len(self.data):
                raise self._error(
                    f"is damaged: {name!r} ({form.name} {list(shape)}) is said to lie at bytes {start} to "
                    f"{start + size}; the file has {len(self.data)} bytes, the tensor before ends at {last}, "
                    f"and tensors begin at multiples of {alignment}"
                )
            if name in self.places:
                raise self._error(f"is damaged: the tensor {name!r} is there twice, again at byte {start}")
            self.places[name] = TensorPlace(name, shape, form, start, size)
            last = start + size

    def _read_place(self) -> tuple[str, tuple[int, ...], Format, int]:
        start = self.at
        name = self._text("the name of a tensor", exact=True)
        dimensions: int = self._number("<u4")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._error(f"is damaged: {name!r} at byte {start} has {dimensions} dimensions, not 1 to 4")
        begins = self._take(8 * dimensions, f"the shape of {name!r}")
        shape = tuple(reversed(struct.unpack_from(f"<{dimensions}Q", self.data, begins)))
        form = format_of(self._number("<u4"), f"{self.path}: {name!r}")
        offset: int = self._number("<u8")
        if 0 in shape or max(shape) > 1 << 40 or shape[-1] % form.size:
            raise self._error(
                f"is damaged: {name!r} is {form.name} {list(shape)}; rows of {form.name} are multiples of {form.size}"
            )
        return name, shape, form, offset
