import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek import events
from deepseek.events import Event, JsonlSink, MemorySink, Sink, attached, emit, plain, read_jsonl


def test_emit_reaches_attached_sinks_only() -> None:
    a, b = MemorySink(), MemorySink()
    emit("lost", 0, x=1)
    with attached(a):
        emit("train", 1, loss=torch.tensor(2.5))
        with attached(b):
            emit("train", 2, loss=1.5)
    emit("lost", 3)
    assert a.series("train", "loss") == [2.5, 1.5]
    assert [e.step for e in b.events] == [2]
    assert events._sinks == []


def test_emit_does_not_read_tensors() -> None:
    sink = MemorySink()
    value = torch.empty(3, device="meta")  # reading it would raise
    with attached(sink):
        emit("train", 1, value=value)
    assert sink.events[0].values["value"] is value


def test_every_sink_is_detached_and_closed_although_one_fails() -> None:
    class Bad(Sink):
        def write(self, event: Event) -> None: ...

        def close(self) -> None:
            raise OSError("no")

    class Good(Bad):
        closed = False

        def close(self) -> None:
            self.closed = True

    first, last = Good(), Good()
    with pytest.raises(OSError, match="no"), attached(first, Bad(), last):
        pass
    assert first.closed
    assert last.closed
    assert events._sinks == []


def test_what_a_sink_tells_while_it_closes_is_heard_by_those_before_it() -> None:
    class Late(MemorySink):
        def close(self) -> None:
            thread = threading.Thread(target=emit, args=("late", 1))  # a lock that is held would stop it
            thread.start()
            thread.join(30)

    before, late, after = MemorySink(), Late(), MemorySink()
    with attached(before, late, after):
        pass
    assert [[e.name for e in sink.events] for sink in (before, late, after)] == [["late"], [], []]
    assert events._sinks == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (torch.tensor([1.5, 2.0], dtype=torch.bfloat16), [1.5, 2.0]),
        (torch.tensor([True]), [True]),
        (np.int64(3), 3),
        (np.array([1.0]), [1.0]),
        ({1: (torch.tensor(2), Path("a") / "b")}, {"1": [2, str(Path("a") / "b")]}),
    ],
)
def test_plain(value: Any, expected: Any) -> None:
    assert plain(value) == expected


def test_jsonl_round_trip_with_what_json_lacks(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "events.jsonl"
    with attached(JsonlSink(path)):
        emit("train", 1, loss=torch.tensor(float("nan")), worst=float("-inf"), device=torch.device("cpu"))
        emit("note", None, event="mine", n=np.float32(0.5))
    first, second = read_jsonl(path)
    assert (first["loss"], first["worst"], first["device"], first["step"]) == ("nan", "-inf", "cpu", 1)
    assert (second["event"], second["n"], second["step"]) == ("note", 0.5, None)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_jsonl_drains_every_n_and_at_once_for_rare_events(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "e.jsonl", every=3)
    with attached(sink):
        emit("train", 1)
        emit("train", 2)
        assert read_jsonl(tmp_path / "e.jsonl") == []
        emit("train", 3)
        assert len(read_jsonl(tmp_path / "e.jsonl")) == 3
        emit("checkpoint", 3)
        assert len(read_jsonl(tmp_path / "e.jsonl")) == 4


def test_a_torn_line_costs_no_event_of_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    with attached(JsonlSink(path)):
        emit("a", 1)
        emit("b", 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])  # killed while writing
    with attached(JsonlSink(path)):
        emit("c", 3)
    assert [e["event"] for e in read_jsonl(path)] == ["a", "c"]
    path.write_bytes(b"\xff\xfe\n" + whole)
    assert [e["event"] for e in read_jsonl(path)] == ["a", "b"]


def test_threads_may_emit_at_the_same_time(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "e.jsonl", every=2)
    with attached(sink):
        threads = [
            threading.Thread(target=lambda: [emit("train", i, x=i) for i in range(200)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    steps = sorted(e["step"] for e in read_jsonl(tmp_path / "e.jsonl"))
    assert steps == sorted(list(range(200)) * 4)


class Full:
    """A file on a disk that has room for ``room`` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(28, "No space left on device")
        data, self.room = data[: self.room], self.room - min(self.room, len(data))
        self.file.write(data)
        return len(data)

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_ends_no_run_and_loses_no_line_while_it_lasts(tmp_path) -> None:
    sink, memory = JsonlSink(tmp_path / "e.jsonl", every=1), MemorySink()
    sink._file = disk = Full(sink._file, 100)  # type: ignore[assignment]
    with attached(sink, memory):
        for step in range(10):
            emit("train", step, loss=1.0)
        assert len(read_jsonl(tmp_path / "e.jsonl")) < 3
        disk.room = 10**6
        emit("train", 10, loss=1.0)
    told = [e for e in memory.events if e.name == "warning"]
    assert len(told) == 1
    assert "No space left" in told[0].values["text"]
    lines = read_jsonl(tmp_path / "e.jsonl")
    assert [e["step"] for e in lines if e["event"] == "train"] == list(range(11))
    assert sink.dropped == 0


def test_a_disk_that_stays_full_costs_the_oldest_lines(tmp_path) -> None:
    sink = JsonlSink(tmp_path / "e.jsonl", every=1)
    sink.MOST = 2000  # type: ignore[misc]
    sink._file = disk = Full(sink._file, 30)  # type: ignore[assignment]
    for step in range(100):
        sink.write(Event("train", step, {"loss": 1.0}))
    assert sink.dropped > 50
    disk.room = 10**6
    sink.close()
    steps = [e["step"] for e in read_jsonl(tmp_path / "e.jsonl")]
    assert steps == [0, *range(100 - len(steps) + 1, 100)]
    assert len(steps) + sink.dropped == 100
