"""`deepseek route` in a process of its own: how it starts, drains and ends."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_replica import FakeReplica, free_port, replica

HERE = Path(__file__).parent


@contextlib.contextmanager
def program(*command: str) -> Iterator[subprocess.Popen[str]]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("DEEPSEEK_API_KEYS", None)
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=60)


@contextlib.contextmanager
def router(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    with program("-m", "deepseek", "route", *arguments, "--port", "0") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("routing on http://127.0.0.1:"), line
        yield process, int(line.rpartition(":")[2])


def ask(port: int, method: str = "POST", path: str = "/v1/completions", **body: Any) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, json.dumps(body) if body else None)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[FakeReplica, FakeReplica]]:
    with replica("a") as a, replica("b") as b:
        yield a, b


@pytest.fixture
def pair(both: tuple[FakeReplica, FakeReplica]) -> Iterator[tuple[FakeReplica, FakeReplica]]:
    """Two replicas as new."""
    allow(both, None)
    yield both
    allow(both, None)


def allow(pair: tuple[FakeReplica, FakeReplica], tokens: int | None) -> None:
    """No answer gets more than ``tokens`` until more are allowed."""
    pair[0].allowed = pair[1].allowed = tokens


def until(true: Callable[[], bool], why: str = "it did not come true") -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, why
        time.sleep(0.01)


def wait_for_work(pair: tuple[FakeReplica, FakeReplica], count: int) -> None:
    until(lambda: pair[0].running + pair[1].running >= count)


def readiness(port: int) -> int:
    """The status of ``/ready``; 0 when nobody listens any more, or stops to as it is asked."""
    try:
        return ask(port, "GET", "/ready")[0]
    except ConnectionError:
        return 0


def test_sigterm_drops_nobody(pair: tuple[FakeReplica, FakeReplica]) -> None:
    """Whoever was let in has a whole answer; whoever comes later is refused at the door, not in the middle."""
    refused: list[Exception] = []
    late: list[tuple[int, bytes]] = []
    with (
        router(pair[0].url, pair[1].url, "--linger", "3", "--drain", "600") as (process, port),
        ThreadPoolExecutor(32) as pool,
    ):
        allow(pair, 1)
        running = [pool.submit(ask, port, prompt=str(i), stream=i % 2 == 0, max_tokens=20) for i in range(24)]
        wait_for_work(pair, 24)
        process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        until(lambda: readiness(port) != 200)
        slow = time.monotonic() - signalled > 1
        ready, end = 503, time.monotonic() + 60
        while not refused and time.monotonic() < end:
            try:
                late.append(ask(port, prompt="late", max_tokens=1))
                ready = ask(port, "GET", "/ready")[0]
            except ConnectionError as error:  # reset: it stood at the door when that was closed
                refused.append(error)
            time.sleep(0.01)
        allow(pair, None)
        answers = [r.result() for r in running]
        assert process.wait(60) == 0
    assert {status for status, _ in answers} == {200}
    for i, (_, body) in enumerate(answers):
        if i % 2 == 0:
            assert body.endswith(b"data: [DONE]\n\n")
            assert body.count(b"data: {") == 20
        else:
            assert len(json.loads(body)["choices"][0]["text"].split()) == 20
    assert {status for status, _ in late} == {200} or (slow and not late), "while it lingers it still answers"
    assert ready == 503, "and says that it is about to go"
    assert len(refused) == 1


def events(body: bytes) -> list[Any]:
    return [json.loads(event.removeprefix(b"data: ")) for event in body.strip().split(b"\n\n")]


def test_the_drain_is_bounded(pair: tuple[FakeReplica, FakeReplica]) -> None:
    with router(pair[0].url, pair[1].url, "--drain", "1") as (process, port):
        allow(pair, 1)  # it would never end
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            body = {"prompt": "x", "stream": True, "max_tokens": 300}
            connection.request("POST", "/v1/completions", json.dumps(body))
            answer = connection.getresponse()
            assert (answer.status, answer.readline()[:6]) == (200, b"data: ")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert events(answer.read())[-1]["error"]["code"] == "aborted"


@pytest.mark.parametrize(("second", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once_and_says_so(
    pair: tuple[FakeReplica, FakeReplica], second: int, status: int
) -> None:
    with (
        router(pair[0].url, pair[1].url, "--drain", "3600") as (process, port),
        ThreadPoolExecutor(2) as pool,
    ):
        allow(pair, 3)  # they would never end
        stream = pool.submit(ask, port, prompt="x", stream=True, max_tokens=300)
        whole = pool.submit(ask, port, prompt="x", max_tokens=300)
        wait_for_work(pair, 2)
        process.send_signal(signal.SIGINT)
        until(lambda: readiness(port) != 200)
        process.send_signal(second)
        assert process.wait(60) == status
        assert events(stream.result()[1])[-1]["error"]["code"] == "aborted"
        got, body = whole.result()
        assert (got, json.loads(body)["error"]["code"]) == (503, "aborted")
        wait_until_idle(pair)


def wait_until_idle(pair: tuple[FakeReplica, FakeReplica]) -> None:
    until(lambda: pair[0].running + pair[1].running == 0, "a replica works for nobody")


class Mortal:
    """Replicas in processes of their own, which are killed and started again on the same ports."""

    def __init__(self, stack: contextlib.ExitStack, count: int) -> None:
        self.stack, self.ports = stack, [free_port() for _ in range(count)]
        self.processes = [self._start(i) for i in range(count)]

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def _start(self, index: int) -> subprocess.Popen[str]:
        command = (str(HERE / "fake_replica.py"), str(index), "--port", str(self.ports[index]))
        return self.stack.enter_context(program(*command))

    def kill(self, index: int, again: bool = True) -> None:
        self.processes[index].kill()
        self.processes[index].wait(60)
        if again:
            self.processes[index] = self._start(index)

    def wait_for_others(self, index: int) -> None:
        """Until all but this one answer: what the router believes may be a second old."""
        for port in self.ports[:index] + self.ports[index + 1 :]:
            until(lambda: readiness(port) == 200, "a replica did not start again")  # noqa: B023


def wait_until_ready(port: int, count: int) -> None:
    until(lambda: json.loads(ask(port, "GET", "/ready")[1])["ready"] >= count)


def fate(status: int, body: bytes, stream: bool) -> str:
    """How an answer ended: 'whole', 'told' that it broke off, or what no client may see."""
    if status != 200:
        return f"{status} {body[:200]!r}"
    if not stream:
        return "whole" if len(json.loads(body)["choices"][0]["text"].split()) == 4 else f"torn {body!r}"
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]
    if events[-1] == b"[DONE]":
        return "whole" if len(events) == 5 else f"{len(events)} events"
    return "told" if json.loads(events[-1])["error"]["code"] == "replica_lost" else f"torn {body!r}"


def test_kill_9_of_replicas_at_random_moments() -> None:
    """Every request is answered; a stream that had begun at a replica that died ends with an error that says so."""
    rng = random.Random(5)
    with contextlib.ExitStack() as stack:
        mortal = Mortal(stack, 3)
        process, port = stack.enter_context(router(*mortal.urls, "--affinity", "0"))
        wait_until_ready(port, 3)
        pool = stack.enter_context(ThreadPoolExecutor(12))
        flow, kills = [], 0
        while kills < 3 or not all(f.done() for f in flow):
            while len(flow) < 400 or (kills < 3 and sum(not f.done() for f in flow) < 24):
                i = len(flow)
                flow.append(
                    pool.submit(ask, port, prompt=str(i), max_tokens=4, pause=0.02, stream=i % 2 == 0)
                )
            time.sleep(rng.uniform(0.05, 0.4))
            index = rng.randrange(3)
            mortal.wait_for_others(index)  # one at a time: the brief death of all is another test
            wait_until_ready(port, 2)
            mortal.kill(index)
            kills += 1
        fates = collections.Counter(fate(*f.result(), stream=i % 2 == 0) for i, f in enumerate(flow))
        assert set(fates) <= {"whole", "told"}, fates
        assert fates["told"] <= 12 * kills
        assert fates["whole"] >= 300
        assert process.poll() is None
        for index in range(3):
            mortal.kill(index, again=False)
        for _ in range(4):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("POST", "/v1/completions", json.dumps({"prompt": "x"}))
            answer = connection.getresponse()
            assert (answer.status, answer.getheader("retry-after")) == (503, "1")
            answer.read()
            connection.close()


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_nobody_has_to_read_what_a_server_prints() -> None:
    """Its address, on a pipe whose reader has gone."""
    port = free_port()
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "deepseek", "route", "http://127.0.0.1:9", "--port", str(port)]
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True) as process:
        os.close(writer)
        try:
            until(lambda: process.poll() is not None or reachable(port))
            assert ask(port, "GET", "/health")[0] == 200
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[1]
            assert (process.returncode, "BrokenPipe" in said, "Traceback" in said) == (0, False, False)
        finally:
            if process.poll() is None:
                process.kill()


def reachable(port: int) -> bool:
    with contextlib.suppress(OSError), contextlib.closing(socket.create_connection(("127.0.0.1", port), 10)):
        return True
    return False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs the address of a replica"),
        (("http://a:1/v1",), "more than a host and a port"),
        (("http://a:1", "--affinity", "-1"), "affinity=-1"),
        (("http://a:1", "--keys-file", "nowhere.toml"), "nowhere.toml"),
        (("http://a:1", "--nonsense", "1"), "nonsense"),
    ],
)
def test_bad_options_are_one_clear_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepseek.cli import main

    assert main(["route", *arguments, "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_taken_port_is_told(
    pair: tuple[FakeReplica, FakeReplica], capsys: pytest.CaptureFixture[str]
) -> None:
    from deepseek.cli import main

    assert main(["route", pair[0].url, "--port", str(pair[0].port)]) == 2
    assert f"cannot listen on 127.0.0.1, port {pair[0].port}" in capsys.readouterr().err
