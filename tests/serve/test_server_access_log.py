"""The access log when its file takes nothing, or only a part, and when several write to it."""

from __future__ import annotations

import json
import sys
import threading
from io import FileIO
from pathlib import Path

import pytest

from deepseek.errors import ConfigError
from deepseek.serve.server.access_log import AccessLog, Record


def written(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Disk(FileIO):
    """A file that has room for ``room`` bytes more."""

    room = 1 << 30

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.room <= 0:
            raise OSError(28, "No space left on device")
        taken = super().write(data[: self.room])
        self.room -= taken
        return taken


def until_written(log: AccessLog) -> None:
    gate = threading.Event()
    while not log._lines.empty():
        gate.wait(0.005)
    gate.wait(0.05)  # the last one is out of the queue and perhaps not yet in the file


def test_a_full_disk_loses_lines_and_says_how_many(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(str(path))
    assert log._file is not None
    log._file.close()
    disk = log._file = Disk(path, "ab")
    log.write(Record("a"))
    until_written(log)
    disk.room = 40  # a part of the next line
    for name in "bcd":
        log.write(Record(name))
    until_written(log)
    disk.room = 1 << 30
    log.write(Record("e"))
    log.close()
    lines = path.read_text().splitlines()
    assert [json.loads(x).get("request_id") for x in (lines[0], lines[-1])] == ["a", "e"]
    assert json.loads(lines[-2]) == {"lost_lines": 3}
    assert len(lines) == 4, "and what there is of the torn line ends"


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_disk_that_stays_full_ends_nothing() -> None:
    log = AccessLog("/dev/full")
    for i in range(2000):
        log.write(Record(str(i)))
    log.close()
    assert log.lost + log._unwritten == 2000, "and every line that is lost is counted"


def test_several_processes_may_share_a_file(tmp_path: Path) -> None:
    """As the replicas of one machine do. Each line is one write, so none is torn by another's."""
    path = tmp_path / "access.log"
    logs = [AccessLog(str(path)) for _ in range(3)]
    for i in range(900):
        logs[i % 3].write(Record(f"{i}-{'x' * (i % 50)}"))
    for log in logs:
        log.close()
    assert sorted(int(str(r["request_id"]).partition("-")[0]) for r in written(path)) == list(range(900))


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write the access log .*nowhere"):
        AccessLog(str(tmp_path / "nowhere" / "x"))
