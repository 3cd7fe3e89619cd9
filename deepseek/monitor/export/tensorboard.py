"""TensorBoard event files, written without TensorBoard.

An event file is a sequence of records, each a protocol-buffer message between its length and checksums:

    length u64 | masked CRC-32C of the length | Event | masked CRC-32C of the Event
    Event = wall_time (1: double) | step (2: varint) | summary (5) = value (1) = tag (1: text), simple_value (2: float)

after TensorFlow's ``record_writer``, ``event.proto`` and ``summary.proto``; CRC-32C after RFC 3720, appendix B.4. The
records of one series have the same form, so thousands are encoded at once: the checksum runs over all of them, byte by
byte, and a million points take under a second.
"""

from __future__ import annotations

import functools
import itertools
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = b"brain.Event:2"
POLYNOMIAL = 0x82F63B78  #: Castagnoli's, reversed
MASK = 0xA282EAD8
CHUNK = 1 << 16  #: records encoded at once
_serial = itertools.count()

Bytes = NDArray[np.uint8]


def _table() -> NDArray[np.uint32]:
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = np.where(crc & 1, (crc >> 1) ^ np.uint32(POLYNOMIAL), crc >> 1)
    return crc


TABLE = _table()
INTEGERS: list[int] = TABLE.tolist()


def crc32c(rows_NL: Bytes) -> NDArray[np.uint32]:
    """The CRC-32C of each row of bytes ``[N, L]``."""
    crc = np.full(len(rows_NL), 0xFFFFFFFF, np.uint32)
    for column in np.ascontiguousarray(rows_NL.T):
        crc = TABLE[(crc ^ column) & 0xFF] ^ (crc >> np.uint32(8))
    return crc ^ np.uint32(0xFFFFFFFF)


def _advanced(crc: int, data: bytes) -> int:
    """The register of the checksum, ``crc``, after ``data``: for one record, where arrays would be slow."""
    for byte in data:
        crc = INTEGERS[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc


def masked(crc: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A checksum as it is stored, so that a checksum over data with checksums stays a good one."""
    return ((crc >> np.uint32(15)) | (crc << np.uint32(17))) + np.uint32(MASK)


def framed(events_NL: Bytes) -> bytes:
    """Messages of one length ``[N, L]`` as records, one after another."""
    count, length = events_NL.shape
    records = np.empty((count, 8 + 4 + length + 4), np.uint8)
    records[:, :12] = np.frombuffer(_head(length), np.uint8)
    records[:, 12:-4] = events_NL
    records[:, -4:] = _columns(masked(crc32c(events_NL)))
    return records.tobytes()


def scalars(
    tag: str, steps: NDArray[np.int64], values: NDArray[np.float32], times: NDArray[np.float64]
) -> bytes:
    """The points of one series as records, in the order given. Steps below 0 count as 0."""
    steps = np.maximum(steps, 0)
    sizes = _varint_sizes(steps)
    parts = []
    edges = [
        0,
        *(np.flatnonzero(np.diff(sizes)) + 1).tolist(),
        len(steps),
    ]  # runs whose steps are of one length
    for run_start, run_stop in itertools.pairwise(edges):
        for start in range(run_start, run_stop, CHUNK):
            part = slice(start, min(start + CHUNK, run_stop))
            parts.append(framed(_events(tag, steps[part], values[part], times[part], int(sizes[start]))))
    return b"".join(parts)


def _events(tag: str, steps: Any, values: Any, times: Any, size: int) -> Bytes:
    middle = _middle(tag)
    rows = np.empty((len(steps), 1 + 8 + 1 + size + len(middle) + 4), np.uint8)
    rows[:, 0], rows[:, 9] = 0x09, 0x10
    rows[:, 1:9] = _columns(times.astype("<f8"))
    rest = steps.astype(np.uint64)
    for i in range(size):
        rows[:, 10 + i] = (rest & np.uint64(0x7F)) | np.uint64(0x80 if i + 1 < size else 0)
        rest = rest >> np.uint64(7)
    rows[:, 10 + size : -4] = np.frombuffer(middle, np.uint8)
    rows[:, -4:] = _columns(values.astype("<f4"))
    return rows


def _middle(tag: str) -> bytes:
    """What stands in an event between its step and its value."""
    name = tag.encode()
    value = b"\x0a" + _varint(len(name)) + name + b"\x15"
    summary = b"\x0a" + _varint(len(value) + 4) + value
    return b"\x2a" + _varint(len(summary) + 4) + summary


def row_records(step: int, values: Mapping[str, float], when: float, middles: dict[str, bytes]) -> bytes:
    """One step of many series as records. ``middles`` remembers what the series' records have in common."""
    start = b"\x09" + struct.pack("<d", when) + b"\x10" + _varint(max(step, 0))
    begun = _advanced(0xFFFFFFFF, start)
    parts = []
    for tag, value in values.items():
        middle = middles.get(tag) or middles.setdefault(tag, _middle(tag))
        rest = middle + np.float32(value).tobytes()
        checksum = _masked(_advanced(begun, rest) ^ 0xFFFFFFFF)
        parts += [_head(len(start) + len(rest)), start, rest, struct.pack("<I", checksum)]
    return b"".join(parts)


def _masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF


@functools.lru_cache(4096)
def _head(length: int) -> bytes:
    head = struct.pack("<Q", length)
    return head + struct.pack("<I", _masked(_advanced(0xFFFFFFFF, head) ^ 0xFFFFFFFF))


class TensorBoardWriter:
    """Appends to one new event file in ``directory``.

    >>> with TensorBoardWriter(Path("tb/mine")) as board:
    ...     board.row(step=1, values={"train/loss": 2.5})
    """

    def __init__(self, directory: Path | str, *, now: float | None = None) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        now = time.time() if now is None else now
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{next(_serial)}"
        self.path = self.directory / name
        self._file, self._middles = self.path.open("wb"), dict[str, bytes]()
        event = b"\x09" + struct.pack("<d", now) + b"\x1a" + _varint(len(VERSION)) + VERSION
        self._file.write(framed(np.frombuffer(event, np.uint8)[None]))

    def series(self, tag: str, steps: Any, values: Any, times: Any) -> None:
        """Add the points of a series: ``steps`` int64 [N], ``values`` float [N], ``times`` Unix seconds [N]."""
        points = (np.asarray(steps, np.int64), np.asarray(values, np.float32), np.asarray(times, np.float64))
        self._file.write(scalars(tag, *points))

    def row(self, step: int, values: Mapping[str, float], when: float | None = None) -> None:
        """Add one value of each series."""
        when = time.time() if when is None else when
        self._file.write(row_records(step, values, when, self._middles))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _columns(values: Any) -> Bytes:
    """Numbers ``[N]`` as their bytes ``[N, size]``."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


def _varint_sizes(values: Any) -> NDArray[np.int64]:
    limits = np.array([1 << (7 * i) for i in range(1, 9)], np.int64)
    return np.searchsorted(limits, values, side="right") + 1


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
