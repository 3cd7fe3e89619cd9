"""Alerts: what arrives at a real HTTP server and a real program, what is tried again, and that nobody waits."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.errors import ConfigError
from deepseek.events import Event, MemorySink, attached, emit
from deepseek.monitor.alerts import (
    AlertSink,
    Command,
    Courier,
    DeliveryError,
    Limit,
    Receiver,
    Webhook,
    headline,
    receivers_of,
)

INCIDENT = {
    "id": "a1", "kind": "loss_spike", "severity": "critical", "verdict": "DATA", "confidence": 0.92,
    "title": "Loss spike", "step": 4120, "samples": [{"text": "a secret"}],
    "gradient_map": {"values": [[1]]}, "value": torch.tensor(2.5),
}  # fmt: skip


class Hook:
    """A web server that answers as told and keeps what it got."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.delay = 0.0
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                time.sleep(hook.delay)
                hook.got.append(
                    {"path": self.path, "type": self.headers["content-type"], "json": json.loads(data)}
                )
                status, headers = hook.answers.pop(0) if hook.answers else (200, {})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?key=secret"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing waits for what is on its way, however slow this machine is."""
    monkeypatch.setattr(Courier.close, "__defaults__", (60.0,))


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    yield hook
    hook.close()


def incident(**changes: Any) -> Event:
    values = {**INCIDENT, **changes}
    return Event("incident", values["step"], values, 1.7e9)


def test_an_incident_reaches_the_webhook(hook: Hook, tmp_path: Path) -> None:
    sink = AlertSink(tmp_path / "mine", receivers_of(webhook=hook.url))
    with attached(sink):
        emit("train", 1, loss=2.0)
        emit("incident", 4120, **INCIDENT)
    (found,) = hook.got
    payload = found["json"]
    assert (found["path"], found["type"]) == ("/hook?key=secret", "application/json")
    assert (payload["run"], payload["step"], payload["kind"], payload["value"]) == (
        "mine",
        4120,
        "loss_spike",
        2.5,
    )
    assert payload["text"] == "[critical] mine, step 4,120: Loss spike (DATA, 92%)"
    assert "a secret" not in json.dumps(payload)
    assert "gradient_map" not in payload


def test_samples_leave_only_when_asked_to(hook: Hook, tmp_path: Path) -> None:
    with attached(AlertSink(tmp_path, receivers_of(webhook=hook.url), samples=True)):
        emit("incident", 4120, **INCIDENT)
    assert hook.got[0]["json"]["samples"] == [{"text": "a secret"}]


def test_a_command_gets_json_on_its_input(tmp_path: Path) -> None:
    script = tmp_path / "page me.py"
    script.write_text("import sys, pathlib\npathlib.Path(sys.argv[1]).write_text(sys.stdin.read())")
    command = f"'{sys.executable}' '{script}' '{tmp_path / 'out $(touch x).json'}'"  # no shell looks at this
    with attached(AlertSink(tmp_path / "mine", receivers_of(command=command))):
        emit("incident", 4120, **INCIDENT)
    assert json.loads((tmp_path / "out $(touch x).json").read_text())["kind"] == "loss_spike"
    assert not (tmp_path / "x").exists()


def test_only_what_is_severe_enough(tmp_path: Path) -> None:
    kept = Keeper()
    sink = AlertSink(tmp_path, [kept], severity="warning")
    for severity in ("info", "warning", "critical", None):
        sink.write(incident(kind=str(severity), severity=severity))
    sink.close()
    assert [p["kind"] for p in kept.got] == ["warning", "critical", "None"]
    with pytest.raises(ConfigError, match="info, warning, critical"):
        AlertSink(tmp_path, [], severity="loud")


class Keeper(Receiver):
    """Keeps what it is sent; fails as often as told."""

    def __init__(self, failures: int = 0, *, again: bool = True, wait: float = 0.0) -> None:
        self.got: list[dict[str, Any]] = []
        self.tries, self.failures, self.again, self.wait = 0, failures, again, wait

    def send(self, data: bytes) -> None:
        self.tries += 1
        if self.tries <= self.failures:
            raise DeliveryError("not now", again=self.again, wait=self.wait)
        self.got.append(json.loads(data))


def test_failures_are_tried_again_and_given_up_in_the_end() -> None:
    said: list[str] = []
    for failures, again, tries, arrives in ((3, True, 4, True), (9, True, 5, False), (9, False, 1, False)):
        keeper = Keeper(failures, again=again)
        courier = Courier([keeper], first_wait=0.001, failed=said.append)
        courier.offer({"n": 1})
        courier.close()
        assert (keeper.tries, len(keeper.got)) == (tries, int(arrives))
    assert len(said) == 2
    assert "not now" in said[0]


def test_every_receiver_is_told_even_if_another_fails() -> None:
    bad, good = Keeper(9, again=False), Keeper()
    courier = Courier([bad, good])
    courier.offer({"n": 1})
    courier.close()
    assert good.got == [{"n": 1}]


@pytest.mark.parametrize(
    ("status", "again"), [(500, True), (503, True), (429, True), (408, True), (400, False), (404, False)]
)
def test_which_answers_are_worth_another_try(hook: Hook, status: int, again: bool) -> None:
    hook.answers = [(status, {"Retry-After": "7"})]
    with pytest.raises(DeliveryError, match=str(status)) as found:
        Webhook(hook.url).send(b"{}")
    assert found.value.again is again
    assert found.value.wait == 7
    assert "secret" not in str(found.value)


def test_a_redirect_is_not_followed(hook: Hook) -> None:
    hook.answers = [(307, {"Location": hook.url}), (302, {"Location": "http://127.0.0.1:1/"})]
    for _ in range(2):
        with pytest.raises(DeliveryError):
            Webhook(hook.url).send(b"{}")
    assert len(hook.got) == 2


def test_nobody_is_there() -> None:
    with pytest.raises(DeliveryError, match="refused"):
        Webhook("http://127.0.0.1:1/x").send(b"{}")
    with pytest.raises(DeliveryError, match="No such file"):
        Command("/no/such/program").send(b"{}")
    with pytest.raises(DeliveryError, match="ended with 3: sorry"):
        Command([sys.executable, "-c", "import sys; sys.stderr.write('sorry'); sys.exit(3)"]).send(b"{}")


def test_a_slow_receiver_times_out(hook: Hook) -> None:
    hook.delay = 2.0
    with pytest.raises(DeliveryError, match="timed out"):
        Webhook(hook.url, timeout=0.1).send(b"{}")
    with pytest.raises(DeliveryError, match=r"more than 0\.2 s"):
        Command([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2).send(b"{}")


def test_training_never_waits_for_a_receiver(tmp_path: Path) -> None:
    """The receiver blocks until the test lets it go; a thousand incidents are taken all the same, the newest kept."""
    gate = threading.Event()

    class Blocked(Keeper):
        def send(self, data: bytes) -> None:
            gate.wait(120)
            super().send(data)

    keeper = Blocked()
    sink = AlertSink(tmp_path, [keeper], limit=Limit(quiet=0, burst=10_000))
    for step in range(1000):
        sink.write(incident(step=step, kind=f"kind {step}"))
    assert keeper.got == []
    gate.set()
    sink.close()
    assert len(keeper.got) in (100, 101)  # and the one that was on its way
    assert keeper.got[-1]["step"] == 999
    assert sink.courier.lost == 1000 - len(keeper.got)


def test_closing_does_not_wait_for_ever() -> None:
    gate = threading.Event()

    class Blocked(Keeper):
        def send(self, data: bytes) -> None:
            gate.wait()

    courier = Courier([Blocked()])
    courier.offer({})
    courier.close(patience=0.1)  # or the test's own time runs out
    assert not gate.is_set()
    gate.set()


def test_what_a_person_can_read() -> None:
    now = [0.0]
    limit = Limit(quiet=300, burst=3, per_hour=60, clock=lambda: now[0])
    assert limit.passes("spike", 1)
    assert not limit.passes("spike", 1)  # the same again
    assert limit.passes("spike", 2)  # worse
    assert not limit.passes("spike", 1)  # better
    assert limit.passes("slow", 1)
    assert not limit.passes("nan", 2)  # three at once are enough
    assert limit.suppressed == 3
    now[0] = 60.0
    assert limit.passes("nan", 2)  # one a minute in the long run
    now[0] = 400.0
    assert limit.passes("spike", 1)


def test_what_was_held_back_is_counted_in_the_next(tmp_path: Path) -> None:
    now = [0.0]
    keeper = Keeper()
    sink = AlertSink(tmp_path, [keeper], limit=Limit(clock=lambda: now[0]))
    for moment in (0.0, 1.0, 2.0, 400.0, 900.0):
        now[0] = moment
        sink.write(incident())
    sink.close()
    assert [p["suppressed"] for p in keeper.got] == [0, 2, 0]


def test_a_lost_alert_is_said_as_a_warning(tmp_path: Path) -> None:
    memory, sink = MemorySink(), AlertSink(tmp_path, [Keeper(9, again=False)])
    with attached(memory, sink):
        emit("incident", 1, **INCIDENT)
        while not sink.courier.lost:
            time.sleep(0.01)
        emit("train", 2, loss=1.0)
        told = ["an alert was not delivered: not now"]
        assert [e.values["text"] for e in memory.events if e.name == "warning"] == told
        emit("incident", 3, **{**INCIDENT, "kind": "nan"})  # the last thing that happens
    assert [e.values["text"] for e in memory.events if e.name == "warning"] == told * 2


@pytest.mark.parametrize(
    "url", ["", "ftp://x/y", "file:///etc/passwd", "http://", "example.org/hook", "javascript:1"]
)
def test_what_is_no_webhook(url: str) -> None:
    with pytest.raises(ConfigError, match="http"):
        Webhook(url)


@pytest.mark.parametrize("command", ["", "   ", "echo 'unclosed"])
def test_what_is_no_command(command: str) -> None:
    with pytest.raises(ConfigError):
        Command(command)


def test_headlines_of_sparse_incidents() -> None:
    assert headline({}, "mine") == "[warning] mine: incident"
    assert headline({"kind": "nan", "step": 3, "confidence": float("nan"), "verdict": "PRECISION"}, "m") == (
        "[warning] m, step 3: nan (PRECISION)"
    )
