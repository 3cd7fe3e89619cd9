"""The live stream over real sockets: rows that another process logs, slow and many readers, a run that goes back."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from monitor_web import client, make_run, values

from deepseek.monitor import stream
from deepseek.monitor.commands import Commands
from deepseek.monitor.dashboard import application, bind, server
from deepseek.monitor.follow import RowFollower
from deepseek.monitor.series import SeriesReader, SeriesWriter
from deepseek.monitor.store import RunStore
from deepseek.monitor.stream import row_messages

PATIENCE = 60.0  #: seconds; what is waited for takes a fraction of one on a machine with nothing else to do


@contextlib.contextmanager
def served(root: Path) -> Iterator[int]:
    """A dashboard in a thread; its port."""
    bound = bind("127.0.0.1", 0)
    runs = server(application(root))
    thread = threading.Thread(target=runs.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        yield bound.getsockname()[1]
    finally:
        runs.should_exit = True
        thread.join(PATIENCE)
        bound.close()


class Stream:
    """A client of server-sent events that reads only when asked."""

    def __init__(self, port: int, run: str, last_id: str = "", buffer: int = 0) -> None:
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(("127.0.0.1", port))
        last = f"Last-Event-ID: {last_id}\r\n" if last_id else ""
        self.socket.sendall(
            f"GET /api/runs/{run}/stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{last}\r\n".encode()
        )
        self.text, self.events = "", list[tuple[str, Any]]()
        self.last_id = ""

    def until(self, wanted: str, count: int = 1) -> list[Any]:
        """Read until ``count`` events called ``wanted`` have come; their contents."""
        end = time.monotonic() + PATIENCE
        while sum(name == wanted for name, _ in self.events) < count and time.monotonic() < end:
            self.read()
        return [content for name, content in self.events if name == wanted]

    def read(self) -> None:
        data = self.socket.recv(1 << 16)
        assert data, "the server closed the stream"
        self.text += data.decode()
        while "\n\n" in self.text:
            block, self.text = self.text.split("\n\n", 1)
            fields = [line.partition(": ") for line in block.replace("\r\n", "\n").split("\n")]
            found = {key: value for key, _, value in fields if key in ("event", "data", "id")}
            if "event" in found:
                self.last_id = found.get("id", self.last_id)
                self.events.append((found["event"], json.loads(found["data"])))

    def close(self) -> None:
        self.socket.close()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


WRITER = """
import sys, time, math
from deepseek.monitor.series import SeriesWriter
with SeriesWriter(sys.argv[1]) as writer:
    for step in range(int(sys.argv[2]), int(sys.argv[3])):
        writer.log(step, {"train/loss": step / 2, "bad": math.nan})
        time.sleep(0.02)
"""


def test_rows_of_another_process_arrive_in_order(tmp_path: Path) -> None:
    run = make_run(tmp_path / "live", steps=10, status="running")
    with served(tmp_path) as port:
        reader = Stream(port, "live")
        (status,) = reader.until("status")
        assert (status["status"], status["step"]) == ("running", 10)
        other = subprocess.Popen([sys.executable, "-c", WRITER, str(run / "monitor"), "11", "41"])
        while not any(name == "row" and row["step"] == 40 for name, row in reader.events):
            reader.read()
        assert other.wait(PATIENCE) == 0
        rows = [row for name, row in reader.events if name == "row"]
        reader.close()
    covered: list[int] = []
    for row in rows:
        covered += range(row.get("first", row["step"]), row["step"] + 1)
        assert row["values"]["train/loss"] == row["step"] / 2
        assert row["values"]["bad"] is None
        assert row["nonfinite"] == {"bad": "nan"}
    assert sorted(set(covered)) == list(range(11, 41))
    assert covered == sorted(covered)


def test_many_rows_at_once_keep_their_spike() -> None:
    rows = [(step, {"x": 8.0 if step == 13 else 2.0, "y": float(step)}) for step in range(1, 101)]
    ((name, row),) = row_messages(rows)
    assert name == "row"
    assert (row["first"], row["step"], row["values"]["y"]) == (1, 100, 100.0)
    assert (row["high"]["x"], row["low"]["x"], row["low"]["y"]) == (8.0, 2.0, 1.0)
    assert [r["step"] for _, r in row_messages(rows[:3])] == [1, 2, 3]


def test_a_run_that_goes_back_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "live", steps=100, status="running")
    with served(tmp_path) as port:
        reader = Stream(port, "live")
        reader.until("status")
        with SeriesWriter(run / "monitor") as writer:
            writer.rewind(50)
            for step in range(51, 55):  # all between two looks: none is lost
                writer.log(step, values(step))
            assert reader.until("gap")
            assert [row["step"] for row in reader.until("row", 4)] == [51, 52, 53, 54]
        reader.close()


def test_a_look_between_going_back_and_the_first_new_row_repeats_no_old_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path / "live", steps=100, status="running")
    rows_of = RowFollower(SeriesReader(run / "monitor"))
    assert rows_of.look() == ([], False)
    with SeriesWriter(run / "monitor") as writer:
        for back in (50, 20):
            writer.rewind(back)
            assert rows_of.look() == ([], True)
            for step in (back + 1, back + 2):
                writer.log(step, values(step))
                rows, rewound = rows_of.look()
                assert ([row.step for row in rows], rewound) == ([step], False)


def test_rare_events_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "live", steps=10, status="running")
    with served(tmp_path) as port:
        reader = Stream(port, "live")
        reader.until("status")
        with (run / "events.jsonl").open("a") as file:
            for name in ("checkpoint", "train", "action", "rollback"):
                file.write(json.dumps({"event": name, "step": 10, "time": time.time()}) + "\n")
        assert [event["event"] for event in reader.until("event", 2)] == ["checkpoint", "rollback"]
        assert reader.until("gap") == [{"reason": "rollback"}]
        reader.close()


def test_incidents_and_actions_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "live", steps=10, status="running")
    with RunStore(run) as store:
        store.put_incident({"id": "old", "step": 3})
    with served(tmp_path) as port:
        reader = Stream(port, "live")
        reader.until("status")
        with RunStore(run) as store, Commands(run) as commands:
            store.put_incident({"id": "new", "step": 9, "severity": "critical", "samples": [1]})
            (incident,) = reader.until("incident")
            assert (incident["id"], incident["step"]) == ("new", 9)
            assert "samples" not in incident
            number = commands.enqueue("pause", {}, "test")
            assert reader.until("action")[0]["status"] == "queued"
            commands.finish_command(number, "done", {"text": "paused"})
            assert reader.until("action", 2)[1]["result"] == {"text": "paused"}
            store.set_status("old", "resolved")
            assert reader.until("incident", 2)[1] | {} == {**store.incident("old")}
        reader.close()


def test_a_client_that_comes_back_misses_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "live", steps=10, status="running")
    with served(tmp_path) as port, SeriesWriter(run / "monitor") as writer:
        stays, leaves = Stream(port, "live"), Stream(port, "live")
        leaves.until("status")
        stays.until("status")
        writer.log(11, values(11))
        leaves.until("row")
        last = leaves.last_id
        leaves.close()
        writer.log(12, values(12))
        stays.until("row", 2)
        back = Stream(port, "live", last_id=last)
        assert back.until("row")[0]["step"] == 12
        back.close()
        stays.close()


def test_a_slow_reader_holds_nobody_up_and_is_told_of_its_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not read while far more than its ring and all buffers hold is sent."""
    monkeypatch.setattr(stream, "RING", 4)
    monkeypatch.setattr(stream, "INTERVAL", 0.02)
    run = make_run(tmp_path / "live", steps=10, status="running")
    wide = {f"user/{'x' * 480}/{i}": float(i) for i in range(600)}
    with served(tmp_path) as port, SeriesWriter(run / "monitor") as writer:
        slow, quick = Stream(port, "live", buffer=4096), Stream(port, "live")
        slow.until("status")
        quick.until("status")
        for step in range(11, 36):
            writer.log(step, {**wide, "train/loss": float(step)})
            quick.until("row", 1)
            while not any(n == "row" and r["step"] >= step for n, r in quick.events[-3:]):
                quick.read()
        assert quick.until("row")[-1]["step"] == 35
        assert not any(name == "gap" for name, _ in quick.events)
        assert slow.until("gap")
        writer.log(36, {"train/loss": 36.0})
        while not any(name == "row" and row["step"] == 36 for name, row in slow.events):
            slow.read()
        assert len(slow.until("row")) < 26
        slow.close()
        quick.close()


def test_a_client_that_takes_nothing_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "STALLED", 0.3)
    monkeypatch.setattr(stream, "INTERVAL", 0.02)
    monkeypatch.setattr(stream, "BATCH", 100)  # every row is sent, however many are found at once
    ended, pump = [], stream.EventStream._pump

    async def until_it_ends(self: Any, send: Any) -> None:
        try:
            await pump(self, send)
        finally:
            ended.append(self)

    monkeypatch.setattr(stream.EventStream, "_pump", until_it_ends)
    run = make_run(tmp_path / "live", steps=10, status="running")
    wide = {f"user/{'x' * 480}/{i}": float(i) for i in range(600)}
    with served(tmp_path) as port, SeriesWriter(run / "monitor") as writer:
        stuck = Stream(port, "live", buffer=4096)
        stuck.until("status")
        for step in range(11, 36):
            writer.log(step, wide)
        until(lambda: len(ended) == 1)
        quick = Stream(port, "live")
        assert quick.until("status")
        with pytest.raises((AssertionError, ConnectionError)):  # what lay in the buffers, and then the end
            stuck.until("nothing of that name")
        stuck.close()
        quick.close()


def test_a_run_that_vanishes_and_returns(tmp_path: Path) -> None:
    run = make_run(tmp_path / "live", steps=10, status="running")
    with served(tmp_path) as port:
        reader = Stream(port, "live")
        reader.until("status")
        shutil.rmtree(run)
        while reader.until("status")[-1]["status"] != "gone":
            reader.read()
        make_run(run, steps=20, status="running")
        while reader.until("status")[-1].get("step") != 20:
            reader.read()
        reader.close()


def test_the_follower_rests_when_nobody_listens(tmp_path: Path) -> None:
    make_run(tmp_path / "live", steps=10, status="running")
    before = threading.active_count()
    with served(tmp_path) as port:
        for _ in range(5):
            reader = Stream(port, "live")
            reader.until("status")
            reader.close()
        threads = [t for t in threading.enumerate() if "AnyIO" in t.name]
        assert len(threads) <= stream_threads()
    assert threading.active_count() <= before + 1


def stream_threads() -> int:
    from deepseek.monitor.api import FOLLOWER_THREADS

    return FOLLOWER_THREADS + 40


def test_many_idle_clients(tmp_path: Path) -> None:
    """Two hundred here; ``benchmarks/bench_dashboard.py`` has a thousand."""
    run = make_run(tmp_path / "live", steps=10, status="running")
    with served(tmp_path) as port, SeriesWriter(run / "monitor") as writer:
        readers = [Stream(port, "live") for _ in range(200)]
        for reader in readers:
            reader.until("status")
        writer.log(11, values(11))
        for reader in readers:
            assert reader.until("row")[0]["step"] == 11
            reader.close()


def test_a_stream_of_no_run(tmp_path: Path) -> None:
    with client(tmp_path) as web:
        assert web.get("/api/runs/none/stream").status_code == 404
