"""`deepseek serve --replicas N`: processes of one machine behind one address."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro
from test_router_process import ask

from deepseek.address import bind
from deepseek.cli.options import as_arguments
from deepseek.cli.serve import Serve
from deepseek.errors import ConfigError
from deepseek.serve.router import Router, RouterConfig
from deepseek.serve.router.machine import LocalReplicas, environments, visible_gpus

HERE = Path(__file__).parent
#: A router over two small servers that it starts itself, as a program.
PROGRAM = """
import sys
from deepseek.cli import main
from deepseek.serve.router import machine
machine.PROGRAM = (sys.executable, {fake!r}, {name!r})
sys.exit(main(["serve", {model!r}, "--replicas", "2", "--device", "cpu", "--port", "0", "--drain", "5", *sys.argv[1:]]))
"""


@dataclass
class Running:
    process: subprocess.Popen[str]
    port: int

    def ready(self) -> int:
        with contextlib.suppress(OSError):
            return int(json.loads(ask(self.port, "GET", "/ready")[1])["ready"])
        return 0

    def pids(self) -> list[int]:
        """Of the replicas: the children that have a socket in their command (Linux)."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(c) for c in children if b"--fd" in command_of(c)]


def command_of(pid: str) -> bytes:
    """Of a process; nothing of one that is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def until(what: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


@contextlib.contextmanager
def served(tmp_path: Path, name: str = "f", *arguments: str) -> Iterator[Running]:
    code = PROGRAM.format(fake=str(HERE / "fake_replica.py"), name=name, model=str(tmp_path))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DEEPSEEK_API_KEYS": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        yield Running(process, int(found[1]) if found else 0)
    finally:
        for _ in range(2):  # the second ends it and its replicas at once
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
        process.communicate(timeout=60)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_a_lost_replica_comes_back_and_all_end_together(tmp_path: Path) -> None:
    with served(tmp_path) as running:
        until(lambda: running.ready() == 2)
        before = running.pids()
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        assert {ask(running.port, prompt=str(i))[0] for i in range(6)} == {200}
        until(lambda: before[0] not in running.pids() and len(running.pids()) == 2 and running.ready() == 2)
        now = running.pids()
        assert len(set(before) & set(now)) == 1
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
        assert all(gone(pid) for pid in now)


@linux
def test_the_port_of_a_replica_that_is_down_is_nobody_elses_and_hangs_up(tmp_path: Path) -> None:
    """Between two lives of a replica its port is held, and who connects to it is not left to wait."""
    with served(tmp_path) as running:
        until(lambda: running.ready() == 2)
        before = running.pids()
        urls = re.findall(r'replica_ready\{replica="http://127.0.0.1:(\d+)"', metrics_of(running.port))
        assert len(urls) == 2
        sent = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
        with contextlib.ExitStack() as stack:
            os.kill(before[0], signal.SIGSTOP)  # what connects now is accepted by nobody
            made = [stack.enter_context(socket.create_connection(("127.0.0.1", int(p)), 60)) for p in urls]
            for one in made:
                one.sendall(sent)
            os.kill(before[0], signal.SIGKILL)
            until(lambda: before[0] not in running.pids())
            hung_up = 0
            for one, port in zip(made, urls):
                with pytest.raises(ConfigError, match="Address already in use"):
                    bind("127.0.0.1", int(port))
                one.settimeout(0.2)
                with contextlib.suppress(TimeoutError):  # the other one waits for the body
                    hung_up += ends(one)
            assert hung_up == 1
        until(lambda: len(running.pids()) == 2 and running.ready() == 2)
        assert metrics_of(running.port).count("replica_ready{") == 2, "and it has the same address again"


def ends(connection: socket.socket) -> bool:
    """Whether the other end has closed it. Raises ``TimeoutError`` where nothing comes."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def metrics_of(port: int) -> str:
    return ask(port, "GET", "/metrics")[1].decode()


@linux
def test_a_second_signal_ends_all_of_them_at_once(tmp_path: Path) -> None:
    with served(tmp_path, "f", "--drain", "600") as running:
        until(lambda: running.ready() == 2)
        now = running.pids()
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=120)
        endless = {"prompt": "x", "stream": True, "max_tokens": 100_000, "pause": 0.1}
        connection.request("POST", "/v1/completions", json.dumps(endless))
        answer = connection.getresponse()
        assert (answer.status, answer.readline()[:6]) == (200, b"data: ")
        running.process.send_signal(signal.SIGTERM)
        until(lambda: running.ready() == 0)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 143
        until(lambda: all(gone(pid) for pid in now))
        body = answer.read()
        connection.close()
        assert json.loads(body.strip().rpartition(b"data: ")[2])["error"]["code"] == "aborted"


@linux
def test_replicas_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    from deepseek.serve.router.machine import PROGRAM as REAL

    command = [*REAL, "route", "--port", "0", "http://127.0.0.1:9"]
    child = f"import subprocess; p = subprocess.Popen({command!r}); print(p.pid, flush=True); p.wait()"
    parent = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline().startswith("routing on")
    parent.kill()
    parent.communicate()
    until(lambda: gone(pid))


def test_one_that_never_gets_ready_ends_all(tmp_path: Path) -> None:
    with served(tmp_path, "broken") as running:
        assert running.process.wait(120) == 1
        assert running.process.stderr is not None
        said = running.process.stderr.read()
        assert "error: a replica ended with status 3 before it was ready" in said
        assert "Traceback" not in said


def test_a_gpu_each_or_a_share_of_the_cores() -> None:
    four = environments(2, ["0", "1", "2", "3"], {"A": "b"})
    assert four == [{"A": "b", "CUDA_VISIBLE_DEVICES": "0"}, {"A": "b", "CUDA_VISIBLE_DEVICES": "1"}]
    with pytest.raises(ConfigError, match="--replicas 3: this machine shows 2 GPUs"):
        environments(3, ["0", "1"], {})
    assert environments(2, [], {"OMP_NUM_THREADS": "7"}) == [{"OMP_NUM_THREADS": "7"}] * 2
    assert int(environments(10_000, [], {})[0]["OMP_NUM_THREADS"]) == 1
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-ab"}) == ["3", "GPU-ab"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []


def test_a_replica_gets_the_options_of_the_whole() -> None:
    given = ["model", "--precision", "bf16", "--max-running", "8", "--no-prefix-cache", "--deterministic", "--adapter",
             "a=x", "b=y", "--name=-odd", "--log=", "--host", "::1", "--port", "9", "--replicas", "4"]  # fmt: skip
    flags = (tyro.conf.FlagCreatePairsOff,)
    command = tyro.cli(Serve, args=given, config=flags)
    again = [command.model, *as_arguments(command, ("model", "host", "port", "replicas"))]
    found = tyro.cli(Serve, args=again, config=flags)
    assert (found.host, found.port, found.replicas) == ("127.0.0.1", 8000, 1)
    names = (
        "model",
        "precision",
        "max_running",
        "prefix_cache",
        "deterministic",
        "adapter",
        "name",
        "log",
        "drain",
    )
    assert [getattr(found, n) for n in names] == [getattr(command, n) for n in names]
    assert found.adapter == ("a=x", "b=y")
    assert not found.prefix_cache


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--replicas", "0"), "--replicas 0 must be at least 1"),
        (("--replicas", "2", "--fd", "3"), "--fd 3 is for one process"),
        (("--fd", "99"), "--fd 99 is no socket"),
        (("--fd", "1"), "--fd 1 is no socket"),
        (("--replicas", "2", "--host", "0.0.0.0"), "--keys-file"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from deepseek.cli import main

    monkeypatch.delenv("DEEPSEEK_API_KEYS", raising=False)
    assert main(["serve", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "nowhere"), "--replicas", "2"]) == 2
    assert "there is no model at" in capsys.readouterr().err


def test_ports_are_held_from_the_start() -> None:
    """Nobody can take one between its choice and its use, even by a socket that would share it."""
    with contextlib.closing(LocalReplicas(["x"], [{}] * 20, 1.0, lambda _: None)) as made:
        ports = [int(u.rpartition(":")[2]) for u in made.urls]
        assert len(set(ports)) == 20
        for port in ports:
            with pytest.raises(ConfigError, match="Address already in use"):
                bind("127.0.0.1", port)
        router = Router(made.urls, RouterConfig(), beside=made)
        assert made.fleet is router.fleet
    bind("127.0.0.1", ports[0]).close()


@pytest.mark.slow
@linux
def test_two_real_engines_behind_one_address(tmp_path: Path) -> None:
    """The real thing: two processes with a model each; greedy answers are equal, whoever gives them."""
    from engine_models import save_tiny

    model = save_tiny(tmp_path / "tiny")
    command = [sys.executable, "-m", "deepseek", "serve", str(model), "--replicas", "2", "--port", "0",
               "--device", "cpu", "--precision", "fp32", "--log="]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DEEPSEEK_API_KEYS": ""}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
            assert found is not None
            running = Running(process, int(found[1]))
            until(lambda: running.ready() == 2 or process.poll() is not None, 240)
            assert process.poll() is None, process.stderr and process.stderr.read()
            asked = {"model": "tiny", "prompt": "the quick", "max_tokens": 8, "temperature": 0}
            answers = [post(running.port, {**asked, "prompt": f"the quick {i % 2}"}) for i in range(8)]
            assert {status for status, _ in answers} == {200}, answers
            texts = [json.loads(body)["choices"][0]["text"] for _, body in answers]
            assert texts == texts[:2] * 4
            status, body = post(running.port, {**asked, "stream": True})
            assert (status, body.endswith(b"data: [DONE]\n\n")) == (200, True)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            if process.poll() is None:
                process.kill()


def post(port: int, body: dict[str, Any]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        got = connection.getresponse()
        return got.status, got.read()
    finally:
        connection.close()
