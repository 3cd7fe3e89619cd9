"""The sentinel, on runs whose processes really live and are really killed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek.monitor.alerts import Receiver
from deepseek.monitor.library import Library
from deepseek.monitor.sentinel import Sentinel
from deepseek.monitor.series import SeriesWriter

TRAINER = "import time; print('up', flush=True); time.sleep(600)"


@pytest.fixture
def trainer() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def run_of(path: Path, pid: int) -> Path:
    with SeriesWriter(path / "monitor") as writer:
        writer.log(4120, {"train/loss": 2.0})
    event = {"event": "run", "step": 0, "pid": pid, "total_steps": 5000, "time": time.time()}
    (path / "events.jsonl").write_text(json.dumps(event) + "\n")
    return path


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


class Keeper(Receiver):
    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.told = threading.Event()

    def send(self, data: bytes) -> None:
        self.got.append(json.loads(data))
        self.told.set()


def test_a_run_that_is_killed_is_told_once(tmp_path: Path, trainer: subprocess.Popen[str]) -> None:
    run_of(tmp_path / "mine", trainer.pid)
    run_of(tmp_path / "old", 99999999)  # it had crashed before
    sentinel = Sentinel(Library(tmp_path), [])
    assert sentinel.look() == []
    trainer.kill()
    trainer.wait()
    time.sleep(0.15)
    (told,) = sentinel.look()
    assert (told["kind"], told["run"], told["step"], told["total_steps"]) == ("crashed", "mine", 4120, 5000)
    assert told["text"] == "[critical] mine, step 4,120: crashed, its process is gone"
    assert sentinel.look() == []


def test_a_run_that_ends_well_is_not_told(tmp_path: Path, trainer: subprocess.Popen[str]) -> None:
    run = run_of(tmp_path / "mine", trainer.pid)
    sentinel = Sentinel(Library(tmp_path), [])
    sentinel.look()
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "done", "step": 4120, "time": time.time()}) + "\n")
    trainer.kill()
    trainer.wait()
    time.sleep(0.15)
    assert sentinel.look() == []


def test_silence_and_then_death(tmp_path: Path, trainer: subprocess.Popen[str]) -> None:
    run_of(tmp_path / "mine", trainer.pid)
    sentinel = Sentinel(Library(tmp_path), [], silence=3600)
    sentinel.look()
    sentinel.silence = 0.05
    time.sleep(0.15)
    assert [told["kind"] for told in sentinel.look()] == ["silent"]
    assert sentinel.look() == []
    trainer.kill()
    trainer.wait()
    time.sleep(0.15)
    assert [told["kind"] for told in sentinel.look()] == ["crashed"]


def test_the_thread_delivers(tmp_path: Path, trainer: subprocess.Popen[str]) -> None:
    run_of(tmp_path / "mine", trainer.pid)
    keeper = Keeper()
    with Sentinel(Library(tmp_path), [keeper], interval=0.02) as sentinel:
        until(lambda: sentinel._known == {"mine": "running"})
        trainer.kill()
        trainer.wait()
        assert keeper.told.wait(60)
    assert [told["kind"] for told in keeper.got] == ["crashed"]
