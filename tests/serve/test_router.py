"""The router before small servers that a test can break: what a client sees, and what the replicas saw."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn
from fake_replica import FakeReplica, in_thread, replica

from deepseek.address import bind
from deepseek.errors import ConfigError
from deepseek.serve.router import Router, RouterConfig
from deepseek.serve.router.exchange import KEEPALIVE, Exchange, ExchangeError
from deepseek.serve.router.replica import FAILURES, Address, Replica
from deepseek.serve.router.retry import RetryBudget
from deepseek.serve.router.run import settings
from deepseek.serve.server.keys import Keyring


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        found: str = self.json["choices"][0]["text"]
        return found


class Routed:
    """A router on a port of its own, and a client for it."""

    def __init__(self, router: Router, port: int) -> None:
        self.router, self.port = router, port

    @contextlib.contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        made = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            yield made
        finally:
            made.close()

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        sent = json.dumps(body) if isinstance(body, dict) else body
        with self.connection() as connection:
            connection.request(method, path, sent, headers or {})
            got = connection.getresponse()
            return Answer(got.status, {k.lower(): v for k, v in got.getheaders()}, got.read())

    def complete(self, prompt: str = "p", **more: Any) -> Answer:
        return self.ask("POST", "/v1/completions", {"prompt": prompt, **more})

    def metric(self, line: str) -> float:
        for found in self.ask("GET", "/metrics").body.decode().splitlines():
            name, _, value = found.rpartition(" ")
            if name == f"deepseek_router_{line}":
                return float(value)
        return 0.0


def url_of(fake: FakeReplica | str) -> str:
    return fake if isinstance(fake, str) else fake.url


@contextlib.contextmanager
def routed(
    *replicas: FakeReplica | str, keys: Keyring | None = None, local: bool = True, **options: Any
) -> Iterator[Routed]:
    config = RouterConfig(**{"poll": 0.1, "poll_seconds": 10.0, "affinity": 0, **options})
    router = Router([url_of(r) for r in replicas], config, keys, local=local, say=lambda _: None)
    sockets = [bind("127.0.0.1", 0)]
    server = uvicorn.Server(settings(router))
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield Routed(router, sockets[0].getsockname()[1])
    finally:
        server.should_exit = server.force_exit = True
        thread.join(60)


def until(what: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


@contextlib.contextmanager
def nowhere() -> Iterator[str]:
    """An address where nobody listens, and nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[FakeReplica, FakeReplica]]:
    with replica("a") as a, replica("b") as b:
        yield a, b


@pytest.fixture
def two(pair: tuple[FakeReplica, FakeReplica]) -> tuple[FakeReplica, FakeReplica]:
    """Two replicas as new."""
    for fake in pair:
        fake.ready, fake.slow, fake.key, fake.refusal, fake.left, fake.allowed = True, 0.0, "", None, 0, None
        fake.asked.clear()
        fake.heads.clear()
    return pair


def test_turns_and_what_is_outstanding(two: tuple[FakeReplica, FakeReplica]) -> None:
    with routed(*two) as router, ThreadPoolExecutor(8) as pool:
        assert sorted(router.complete().text for _ in range(4)) == ["a a a", "a a a", "b b b", "b b b"]
        two[0].allowed = two[1].allowed = 0
        slow = pool.submit(router.complete, max_tokens=10)
        until(lambda: two[0].running + two[1].running == 1)
        busy, idle = sorted(two, key=lambda r: -r.running)
        idle.allowed = None
        assert {router.complete(max_tokens=1).text for _ in range(6)} == {idle.name}
        assert router.metric(f'outstanding{{replica="{busy.url}"}}') == 1
        busy.allowed = None
        assert slow.result().text == " ".join([busy.name] * 10)
        until(lambda: router.metric("inside") == 0)


def test_messages_pass_whole_and_hops_end_here(two: tuple[FakeReplica, FakeReplica]) -> None:
    with routed(two[0]) as router:
        sent = {"X-Mine": "1", "Authorization": "Bearer k", "Connection": "X-Hop", "X-Hop": "no", "TE": "trailers",
                "X-Forwarded-For": "10.1.1.1"}  # fmt: skip
        got = router.ask("PUT", "/echo/a%20b/c?x=%2F&y", "héllo".encode(), sent)
        told = got.json
        seen = dict(told["headers"])
        assert (got.status, told["method"], told["body"]) == (200, "PUT", "héllo")
        assert told["target"] == "/echo/a%20b/c?x=%2F&y"
        assert (seen["x-mine"], seen["authorization"]) == ("1", "Bearer k")
        assert seen["x-forwarded-for"] == "10.1.1.1, 127.0.0.1"
        assert len(seen["x-request-id"]) == 32
        assert not {"x-hop", "te"} & set(seen)
        assert got.headers["x-kept"] == "yes"
        assert not {"keep-alive", "x-once"} & set(got.headers)
        assert router.ask("HEAD", "/echo/x").status == 200
        assert router.ask("GET", "/nothing").status == 404


def test_chunked_request_bodies_arrive(two: tuple[FakeReplica, FakeReplica]) -> None:
    with routed(two[0]) as router, router.connection() as connection:
        body = json.dumps({"prompt": "x" * 200_000, "max_tokens": 1}).encode()
        pieces = (body[i : i + 7000] for i in range(0, len(body), 7000))
        connection.request("POST", "/v1/completions", pieces, encode_chunked=True)
        assert connection.getresponse().status == 200
        assert two[0].asked[0]["prompt"] == "x" * 200_000
        assert two[0].heads[0]["content-length"] == str(len(body))


def test_a_replica_that_is_not_there_costs_nobody_an_answer(two: tuple[FakeReplica, FakeReplica]) -> None:
    with nowhere() as away, routed(two[0], away, poll=3600.0) as router:
        router.router.fleet.replicas[1].told(True)  # it was there a moment ago
        assert [router.complete().status for _ in range(6)] == [200] * 6
        assert (
            router.metric(
                "errors_total{" + f'replica="{router.router.fleet.replicas[1].name}",kind="connect"}}'
            )
            == 1
        )


def test_429_goes_to_the_next_and_the_shortest_wait_comes_back(two: tuple[FakeReplica, FakeReplica]) -> None:
    a, b = two
    with routed(a, b) as router:
        a.refusal = (429, {"retry-after": "7"}, {"error": {"code": "queue_full", "who": "a"}})
        assert {router.complete().text for _ in range(4)} == {"b b b"}
        assert a.asked == [], "what is refused was not read"
        b.refusal = (429, {"retry-after": "3"}, {"error": {"code": "queue_full", "who": "b"}})
        for _ in range(2):
            got = router.complete()
            assert (got.status, got.headers["retry-after"], got.json["error"]["who"]) == (429, "3", "b")
        b.refusal = (429, {}, {"error": {"who": "b"}})
        assert router.complete().headers["retry-after"] == "7"
        b.refusal = (503, {"retry-after": "1"}, {"error": {"code": "draining"}})
        assert router.complete().status == 429, "come back is a better answer than nobody is here"


def test_503_goes_to_the_next_and_rests_until_it_is_ready(two: tuple[FakeReplica, FakeReplica]) -> None:
    a, b = two
    with routed(a, b, poll=3600.0) as router:
        a.refusal = (503, {"retry-after": "1"}, {"error": {"code": "draining"}})
        assert {router.complete().text for _ in range(6)} == {"b b b"}
        assert router.metric(f'refusals_total{{replica="{a.url}",why="503"}}') == 1, (
            "after that it is not asked"
        )
        b.refusal = a.refusal
        got = router.complete()
        assert (got.status, got.json["error"]["code"]) == (503, "draining")
        got = router.complete()
        assert (got.status, got.json["error"]["code"], got.headers["retry-after"]) == (503, "no_replica", "1")
        assert router.ask("GET", "/ready").status == 503
        assert router.ask("GET", "/health").status == 200


def test_readiness_is_followed(two: tuple[FakeReplica, FakeReplica]) -> None:
    a, b = two
    a.ready = b.ready = False
    with routed(a, b) as router:
        assert router.ask("GET", "/ready").json == {
            "status": "no replica is ready",
            "ready": 0,
            "replicas": 2,
        }
        b.ready = True
        until(lambda: router.ask("GET", "/ready").status == 200)
        assert {router.complete().text for _ in range(4)} == {"b b b"}
        assert router.metric(f'replica_ready{{replica="{a.url}"}}') == 0
        a.ready = True
        until(lambda: len({router.complete().text for _ in range(4)}) == 2)


def test_one_that_is_only_busy_is_not_dropped_at_once(
    two: tuple[FakeReplica, FakeReplica], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek.serve.router import watch

    limit = watch.UNANSWERED
    assert limit > 1
    with routed(two[0], poll=0.1, poll_seconds=0.5) as router:
        [known] = router.router.fleet.replicas
        until(lambda: known.ready)
        monkeypatch.setattr(watch, "UNANSWERED", 10**6)
        two[0].slow = 1.2
        until(lambda: known.unanswered >= limit)
        assert known.ready
        assert router.complete().status == 200
        monkeypatch.setattr(watch, "UNANSWERED", limit)
        until(lambda: not known.ready)
        assert "no answer to /ready within 0.5 s" in known.reason
        two[0].slow = 0.0
        until(lambda: known.ready)
        assert known.unanswered == 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_replica_that_hangs_has_not_answered_is_given_to_another(
    two: tuple[FakeReplica, FakeReplica], stream: bool
) -> None:
    """It is alive and its connections stand, but nothing comes: not the answer, and nothing about its readiness."""
    a, b = two
    with routed(a, b, poll=0.05, poll_seconds=0.3) as router, ThreadPoolExecutor(1) as pool:
        until(lambda: len(router.router.fleet.usable()) == 2)
        next(r for r in router.router.fleet.replicas if r.name == b.url).used = 100  # a is asked first
        a.allowed = 0
        answer = pool.submit(router.complete, max_tokens=3, stream=stream)
        until(lambda: a.running == 1)
        a.slow = 30.0
        got = answer.result()
        assert got.status == 200
        assert got.body.count(b'"b"' if stream else b"b b b") == (3 if stream else 1)
        assert router.metric(f'retries_total{{replica="{a.url}"}}') == 1
        a.allowed, a.slow = None, 0.0
        until(lambda: a.running == 0 and a.left == 1)


def test_work_that_broke_is_not_repeated(two: tuple[FakeReplica, FakeReplica]) -> None:
    """A request that breaks one replica must not visit the others."""
    with routed(*two) as router:
        router.router.suspects.left = 0
        got = router.complete(fail_after_reading="engine_crashed")
        assert (got.status, got.json["error"]["code"]) == (503, "engine_crashed")
        assert len(two[0].asked) + len(two[1].asked) == 1
        until(lambda: len(router.router.fleet.usable()) == 2)
        assert router.complete(fail_after_reading="internal_error", status=500).status == 500
        assert len(two[0].asked) + len(two[1].asked) == 2
        until(lambda: len(router.router.fleet.usable()) == 2)
        assert router.complete(fail_after_reading="draining").status == 503
        assert len(two[0].asked) + len(two[1].asked) == 4, "one that only closes sends on, to all"
        until(lambda: len(router.router.fleet.usable()) == 2)
        assert router.complete(fail_after_reading="engine_unavailable").status == 503
        assert len(two[0].asked) + len(two[1].asked) == 6, "and so does one whose engine is not there"


def test_few_requests_that_may_break_replicas_are_given_to_another(
    two: tuple[FakeReplica, FakeReplica],
) -> None:
    """A process may be killed twice by chance; a request that kills must not go around."""
    with routed(*two, retry_share=0.5) as router:
        visits = []
        for _ in range(4):
            before = len(two[0].asked) + len(two[1].asked)
            got = router.complete(fail_after_reading="engine_crashed")
            assert (got.status, got.json["error"]["code"]) == (503, "engine_crashed")
            visits.append(len(two[0].asked) + len(two[1].asked) - before)
            until(lambda: len(router.router.fleet.usable()) == 2)
        assert visits == [2, 2, 1, 1]
        assert sum(router.metric(f'retries_total{{replica="{r.url}"}}') for r in two) == 2
        assert router.router.budget.left == 254, "nothing is paid for what is not done"
        for _ in range(200):
            router.router.suspects.answered()
        router.complete(fail_after_reading="engine_crashed")
        assert len(two[0].asked) + len(two[1].asked) == 8


def test_failures_in_a_row_eject(
    two: tuple[FakeReplica, FakeReplica], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek.serve.router import replica

    monkeypatch.setattr(replica, "REST", 3600.0)
    monkeypatch.setattr(replica, "LONGEST_REST", 3600.0)
    a, b = two
    with routed(a, b) as router:
        a.refusal = (500, {}, {"error": {}})
        seen = [router.complete().status for _ in range(12)]
        assert seen.count(500) == FAILURES
        assert seen[-5:] == [200] * 5
        assert router.metric(f'ejections_total{{replica="{a.url}"}}') == 1
        a.refusal = None
        found = next(r for r in router.router.fleet.replicas if r.name == a.url)
        found.ejected_until = 0.0  # its rest is over
        assert len({router.complete().text for _ in range(4)}) == 2


def test_streams_come_as_they_are_made(two: tuple[FakeReplica, FakeReplica]) -> None:
    """An event does not wait for the next one, which is made only after it has arrived."""
    with routed(*two) as router, router.connection() as connection:
        two[0].allowed = two[1].allowed = 1
        asked = {"prompt": "p", "stream": True, "max_tokens": 6}
        connection.request("POST", "/v1/completions", json.dumps(asked))
        got, came = connection.getresponse(), 0
        assert (got.getheader("content-type") or "").startswith("text/event-stream")
        while came < 6:
            if got.readline().startswith(b"data: {"):
                came += 1
                two[0].allowed = two[1].allowed = came + 1
        assert got.read().strip() == b"data: [DONE]"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_not_worked_for(two: tuple[FakeReplica, FakeReplica], stream: bool) -> None:
    with routed(two[0]) as router:
        two[0].allowed = 3
        asked = {"prompt": "p", "stream": stream, "max_tokens": 400}
        with router.connection() as connection:
            connection.request("POST", "/v1/completions", json.dumps(asked))
            if stream:
                with connection.getresponse() as got:
                    assert got.readline().startswith(b"data")
            until(lambda: two[0].running == 1)
        until(lambda: two[0].running == 0)
        assert two[0].left == 1
        until(lambda: router.metric("clients_gone_total") == 1)
        until(lambda: router.metric("inside") == 0)
        assert router.metric(f'outstanding{{replica="{two[0].url}"}}') == 0


def begin(
    router: Routed, stack: contextlib.ExitStack, **asked: Any
) -> tuple[bytes, http.client.HTTPResponse]:
    """A stream whose first event has come: that, and where the rest comes from."""
    connection = stack.enter_context(router.connection())
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "p", "stream": True, **asked}))
    got = connection.getresponse()
    return got.readline(), got


def test_a_replica_killed_in_the_middle(two: tuple[FakeReplica, FakeReplica]) -> None:
    """A stream that has begun ends with an error that can be seen; everything else is answered by the other one."""
    with (
        replica("c") as c, routed(c, two[0]) as router, ThreadPoolExecutor(16) as pool,
        contextlib.ExitStack() as stack,
    ):  # fmt: skip
        c.allowed = two[0].allowed = 1
        streams = [pool.submit(begin, router, stack, max_tokens=40) for _ in range(4)]
        firsts = [s.result() for s in streams]  # each stream has sent an event
        whole = [pool.submit(router.complete, max_tokens=40) for _ in range(4)]
        until(lambda: c.running == 4 and two[0].running == 4)
        address = c.url
        c.kill()
        two[0].allowed = None
        after = [router.complete() for _ in range(10)]
        assert {a.status for a in after} == {200}
        assert {a.text for a in after} == {"a a a"}
        ends = [first + got.read() for first, got in firsts]
        good = [e for e in ends if e.endswith(b"data: [DONE]\n\n")]
        broken = [e for e in ends if e not in good]
        assert len(good) + len(broken) == 4
        assert broken
        for end in broken:
            told = json.loads(end.rstrip().rpartition(b"data: ")[2])
            assert told["error"]["code"] == "replica_lost"
            assert b'"text": "a"' not in end, "a second answer must not follow what was sent"
        answers = [w.result() for w in whole]
        assert [a.status for a in answers] == [200] * 4
        assert {a.text for a in answers} == {" ".join(["a"] * 40)}
        assert router.metric(f'retries_total{{replica="{address}"}}') == 4 - len(broken)


def test_a_deadly_request_stops_at_a_few(two: tuple[FakeReplica, FakeReplica]) -> None:
    with replica("c") as c, replica("d") as d, routed(c, d, *two, retries=1) as router:
        for r in router.router.fleet.replicas[2:]:
            r.used = 1  # the others are asked first
        got = router.complete(die=True)
        assert (got.status, got.json["error"]["code"]) == (503, "replica_lost")
        assert got.headers["retry-after"] == "1"
        assert (len(c.asked), len(d.asked), len(two[0].asked) + len(two[1].asked)) == (1, 1, 0)
        assert router.complete().status == 200


@pytest.mark.parametrize("options", [{"retries": 0}, {"retry_burst": 0}])
def test_retries_can_be_spent(two: tuple[FakeReplica, FakeReplica], options: dict[str, int]) -> None:
    with replica("c") as c, routed(c, two[0], **options) as router:
        router.router.fleet.replicas[1].used = 1
        got = router.complete(die=True)
        assert (got.status, got.headers["retry-after"]) == (503, "1")
        assert two[0].asked == []


def test_what_may_change_something_is_not_repeated(two: tuple[FakeReplica, FakeReplica]) -> None:
    with replica("c") as c, routed(c, two[0]) as router:
        router.router.fleet.replicas[1].used = 1
        got = router.ask("POST", "/echo/files", b"x", {"X-Die": "1"})
        assert (got.status, got.json["error"]["code"]) == (502, "replica_lost")


def test_when_all_are_gone_clients_are_told_to_come_back() -> None:
    with replica("c") as c, replica("d") as d, routed(c, d, poll=3600.0) as router:
        assert router.complete(die=True).status == 503, "the second dies of it too"
        got = router.complete()
        assert (got.status, got.json["error"]["code"], got.headers["retry-after"]) == (503, "no_replica", "1")


def test_a_fault_of_the_router_is_told_and_logged(
    two: tuple[FakeReplica, FakeReplica], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from deepseek.serve.router import application

    def broken(*_: Any) -> bytes:
        raise ZeroDivisionError("nobody thought of this")

    with routed(*two) as router:
        monkeypatch.setattr(application, "prefix_key", broken)
        got = router.complete()
        assert (got.status, got.json["error"]["code"]) == (500, "internal_error")
        assert "nobody thought of this" in caplog.text
        assert b"nobody" not in got.body
        monkeypatch.undo()
        assert router.complete().status == 200
        until(lambda: router.metric("inside") == 0)


def test_a_silent_replica_is_given_up(two: tuple[FakeReplica, FakeReplica]) -> None:
    with routed(two[0], silence=1.0) as router:
        two[0].allowed = 0
        got = router.complete(max_tokens=1)
        assert (got.status, got.json["error"]["code"]) == (504, "replica_lost")
        two[0].allowed = None
    with routed(two[0], silence=2.0) as router:
        got = router.complete(stream=True, max_tokens=8, pause=0.3)
        assert got.body.endswith(b"data: [DONE]\n\n")
        until(lambda: two[0].running == 0)


def test_equal_beginnings_meet_the_same_replica(two: tuple[FakeReplica, FakeReplica]) -> None:
    with routed(*two, affinity=64) as router:
        texts = {p: {router.complete(p * 64 + str(i)).text for i in range(4)} for p in "abcdefgh"}
        assert all(len(found) == 1 for found in texts.values())
        assert len(set.union(*texts.values())) == 2


def test_limits(two: tuple[FakeReplica, FakeReplica]) -> None:
    with routed(two[0], body_seconds=1.0) as router, router.connection() as slow:
        slow.putrequest("POST", "/v1/completions")
        slow.putheader("Content-Length", "10")
        slow.endheaders(b"123")
        assert slow.getresponse().status == 408
    with routed(two[0], max_body=1000, max_inside=1) as router, ThreadPoolExecutor(2) as pool:
        got = router.complete("x" * 1000)
        assert (got.status, got.json["error"]["code"]) == (413, "request_too_large")
        with router.connection() as large:
            large.request("POST", "/v1/completions", (b"y" * 400 for _ in range(9)), encode_chunked=True)
            assert large.getresponse().status == 413
        two[0].allowed = 0
        busy = pool.submit(router.complete, max_tokens=5)
        until(lambda: two[0].running == 1)
        got = router.complete()
        assert (got.status, got.json["error"]["code"], got.headers["retry-after"]) == (429, "queue_full", "1")
        two[0].allowed = None
        assert busy.result().status == 200
        assert two[0].asked[0]["prompt"] == "p"


def test_own_routes_and_what_is_not_passed_on(two: tuple[FakeReplica, FakeReplica]) -> None:
    with routed(*two) as router:
        assert router.ask("POST", "/ready", {}).status == 405
        assert router.ask("POST", "/admin/reload", {"path": "x"}).status == 404
        assert router.ask("GET", "/v1/models", headers={"Host": "evil.example"}).status == 403
        assert router.ask("GET", "/v1/models", headers={"Host": "localhost:1"}).status == 200
        assert router.ask("GET", "/metrics").headers["content-type"].startswith("text/plain")


def test_metrics_can_be_read_by_prometheus(two: tuple[FakeReplica, FakeReplica]) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    with routed(*two) as router:
        for _ in range(4):
            router.complete()
        found = {
            f.name: f
            for f in parser.text_string_to_metric_families(router.ask("GET", "/metrics").body.decode())
        }
    answers = {
        (s.labels["replica"], s.labels["status"]): s.value for s in found["deepseek_router_answers"].samples
    }
    assert answers == {(two[0].url, "200"): 2, (two[1].url, "200"): 2}
    assert {s.value for s in found["deepseek_router_replica_ready"].samples} == {1}
    assert found["deepseek_router_head_seconds"].type == "histogram"


def test_where_others_reach_it_replicas_and_metrics_need_keys(two: tuple[FakeReplica, FakeReplica]) -> None:
    a, b = two
    a.key = "the key of replica a"
    keys = Keyring.load(None, {"DEEPSEEK_API_KEYS": "prometheus=0123456789abcdef"})
    with routed(a, b, local=False, keys=keys) as router:
        assert router.ask("GET", "/ready").json["ready"] == 1, "b asks for no key, so it gets nothing"
        assert {router.complete().text for _ in range(4)} == {"a a a"}
        assert router.ask("GET", "/v1/models").status == 401
        assert router.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {a.key}"}).status == 200
        assert router.ask("GET", "/metrics").status == 401
        assert (
            router.ask("GET", "/metrics", headers={"Authorization": "Bearer 0123456789abcdef"}).status == 200
        )
    with routed(b, local=False, open=True) as router:
        assert router.complete().status == 200
        assert router.ask("GET", "/metrics").status == 401, "no key opens it"


def test_a_client_that_takes_nothing_is_cut(two: tuple[FakeReplica, FakeReplica]) -> None:
    with routed(two[0], stalled=0.5) as router:
        with socket.create_connection(("127.0.0.1", router.port)) as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = json.dumps({"prompt": "p", "stream": True, "max_tokens": 200_000}).encode()
            stuck.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
                + body
            )
            until(lambda: router.metric("clients_stalled_total") == 1)
            until(lambda: two[0].running == 0)
        until(lambda: router.metric("inside") == 0)


def test_openai_python_streams_through(two: tuple[FakeReplica, FakeReplica]) -> None:
    openai = pytest.importorskip("openai")
    with (
        routed(*two) as router,
        openai.OpenAI(base_url=f"http://127.0.0.1:{router.port}/v1", api_key="k") as client,
    ):
        assert [m.id for m in client.models.list()] == ["fake"]
        words = [c.choices[0].text for c in client.completions.create(model="fake", prompt="p", stream=True)]
        assert words in (["a"] * 3, ["b"] * 3)
        for fake in two:
            fake.refusal = (429, {"retry-after": "0"}, {"error": {"message": "full", "code": "queue_full"}})
        with pytest.raises(openai.RateLimitError, match="full"):
            client.with_options(max_retries=0).completions.create(model="fake", prompt="p")


def test_a_name_is_all_its_addresses(
    two: tuple[FakeReplica, FakeReplica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a headless Kubernetes service: replicas come and go while the router runs."""
    from deepseek.serve.router import watch

    there = ["127.0.0.1"]

    async def addresses(address: Any) -> list[str]:
        return list(there)

    monkeypatch.setattr(watch, "_addresses", addresses)
    with routed(f"http://replicas:{two[0].port}", resolve=0.1) as router:
        assert router.complete().status == 200
        there.append("127.0.0.2")  # nobody listens there
        until(lambda: len(router.router.fleet.replicas) == 2)
        assert [router.complete().status for _ in range(4)] == [200] * 4
        there.clear()  # the name server does not answer
        time.sleep(0.3)
        assert len(router.router.fleet.replicas) == 2
        there.append("127.0.0.1")
        until(lambda: len(router.router.fleet.replicas) == 1)
        assert two[0].heads[-1]["host"] == f"replicas:{two[0].port}"


def test_localhost_is_one_replica() -> None:
    from deepseek.serve.router.replica import Address
    from deepseek.serve.router.watch import _addresses

    assert len(asyncio.run(_addresses(Address.parse("http://localhost:1")))) == 1
    assert asyncio.run(_addresses(Address.parse("http://no-such-name.invalid:1"))) == []


def test_replicas_behind_tls_are_known_by_their_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek.serve.router import exchange

    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    fake = FakeReplica("a")
    with in_thread(fake.app(), ssl_keyfile=key, ssl_certfile=certificate) as fake.server:
        exchange._trust.cache_clear()
        with routed(f"https://localhost:{fake.port}") as router:
            assert router.complete().json["error"]["code"] == "no_replica", (
                "nobody vouches for the certificate"
            )
            assert "CERTIFICATE_VERIFY_FAILED" in router.router.fleet.replicas[0].reason
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        exchange._trust.cache_clear()
        with routed(f"https://localhost:{fake.port}") as router:
            assert router.complete().text == "a a a"
            assert router.complete(stream=True).body.endswith(b"data: [DONE]\n\n")
            assert fake.heads[0]["host"] == f"localhost:{fake.port}"
        with routed(f"https://127.0.0.1:{fake.port}") as router:
            assert router.complete().status == 503, "the certificate is of another name"
    exchange._trust.cache_clear()


class Bare:
    """A server of one socket that says what it is told, and keeps what it heard."""

    def __init__(self, answer: bytes, continues: bool = False) -> None:
        self.answer, self.continues, self.heard = answer, continues, b""
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with self.socket.accept()[0] as one, contextlib.suppress(ConnectionError, TimeoutError):
                    one.settimeout(60)
                    self._serve(one)

    def _serve(self, one: socket.socket) -> None:
        head = self._head(one)
        if not head:
            return
        self.heard += head
        while head.startswith(b"POST") and b"expect:" not in head.lower() and b"}" not in self.heard:
            self.heard += more(one)
        one.sendall(self.answer)

    def _head(self, one: socket.socket) -> bytes:
        """Of a request; nothing when that was for the readiness, which is answered."""
        head = b""
        while b"\r\n\r\n" not in head:
            head += more(one)
        if head.startswith(b"GET /ready"):
            one.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return b""
        return head

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        """Not before its thread has ended: it might accept from the next socket that has the same number."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join(120)
        self.socket.close()
        assert not self.thread.is_alive()


def more(one: socket.socket) -> bytes:
    data = one.recv(65536)
    if not data:
        raise ConnectionResetError("the router has gone")
    return data


class Torn(Bare):
    """Takes the whole request, says what it is told, and is gone."""

    def _serve(self, one: socket.socket) -> None:
        if self._head(one):
            one.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            while b"}" not in self.heard:
                self.heard += more(one)
            one.sendall(self.answer)


EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"half": ',
        EVENTS,
        EVENTS + b"9\r\ndata: {}\n",
    ],
)
def test_whatever_is_lost_before_the_client_has_a_byte_is_asked_of_another(
    two: tuple[FakeReplica, FakeReplica], answer: bytes
) -> None:
    with Torn(answer) as torn, routed(torn.url, two[0]) as router:
        router.router.fleet.replicas[1].used = 1
        got = router.complete()
        assert b"prompt" in torn.heard
        assert (got.status, got.text) == (200, "a a a")


def test_half_an_event_is_not_passed_on(two: tuple[FakeReplica, FakeReplica]) -> None:
    torn_event = b'13\r\ndata: {"a": 1}\n\ndat\r\n7\r\na: {"b"\r\n'
    with Torn(EVENTS + torn_event) as torn, routed(torn.url, two[0]) as router:
        router.router.fleet.replicas[1].used = 1
        got = router.complete(stream=True)
        first, second = got.body.decode().strip().split("\n\n")
        assert (got.status, first) == (200, 'data: {"a": 1}')
        assert json.loads(second.removeprefix("data: "))["error"]["code"] == "replica_lost"
        assert two[0].asked == []


def test_openai_python_raises_what_broke_off() -> None:
    openai = pytest.importorskip("openai")
    chunk = b'data: {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": []}\n\n'
    with (
        Torn(EVENTS + b"%x\r\n%b\r\n" % (len(chunk), chunk)) as torn,
        routed(torn.url) as router,
        openai.OpenAI(base_url=f"http://127.0.0.1:{router.port}/v1", api_key="k", max_retries=0) as client,
    ):
        stream = client.completions.create(model="m", prompt="p", stream=True)
        assert next(stream).id == "1"
        with pytest.raises(openai.APIError, match="broke off"):
            next(stream)


def test_the_budget_of_retries_is_filled_by_answers() -> None:
    budget = RetryBudget(2, 0.5)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    budget.answered()
    assert not budget.take()
    budget.answered()
    assert budget.take()
    for _ in range(100):
        budget.answered()
    assert budget.left == 2


def test_events_of_any_size_pass() -> None:
    from deepseek.serve.router.exchange import gathered, whole_events

    async def pieces(*given: bytes) -> Any:
        for piece in given:
            yield piece

    async def cut(how: Any, most: int, *given: bytes) -> list[bytes]:
        return [piece async for piece in how(pieces(*given), most)]

    assert asyncio.run(cut(whole_events, 9, b"a\n", b"\nb", b"\r\n\r\nc\n\nd", b"\n\n", b"e")) == [
        b"a\n\n", b"b\r\n\r\nc\n\n", b"d\n\n", b"e",
    ]  # fmt: skip
    assert asyncio.run(cut(whole_events, 4, b"123", b"456", b"7\n\n")) == [b"123456", b"7\n\n"]
    assert asyncio.run(cut(gathered, 4, b"12", b"34")) == [b"1234"]
    assert asyncio.run(cut(gathered, 4, b"12", b"345", b"6", b"7")) == [b"12345", b"6", b"7"]
    assert asyncio.run(cut(gathered, 4)) == []


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 banana\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nContent-Length: 11\r\n\r\n",
        b"\x16\x03\x01",
    ],
)
def test_nonsense_before_the_body_is_asked_for_goes_to_the_next(
    two: tuple[FakeReplica, FakeReplica], answer: bytes
) -> None:
    with Bare(answer) as bare, routed(bare.url, two[0]) as router:  # type: ignore[arg-type]
        assert [router.complete().status for _ in range(4)] == [200] * 4
        assert b"prompt" not in bare.heard, "the body was never sent"


@pytest.mark.parametrize(
    "head", [b"Content-Length: 100\r\n\r\n0123", b"Transfer-Encoding: chunked\r\n\r\n4\r\n0123\r\n9"]
)
def test_a_short_body_is_seen_to_be_short(monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    from deepseek.serve.router import application

    with Bare(b"HTTP/1.1 200 OK\r\n" + head) as bare, routed(bare.url) as router:
        assert router.ask("GET", "/x").json["error"]["code"] == "no_replica", "nothing of it was passed on"
        monkeypatch.setattr(application, "HELD", 2)
        with pytest.raises(http.client.IncompleteRead):
            router.ask("GET", "/x")


def test_one_that_never_says_continue_is_asked_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepseek.serve.router import exchange

    monkeypatch.setattr(exchange, "PATIENCE", 0.2)
    good = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

    class Deaf(Bare):
        def _serve(self, one: socket.socket) -> None:
            data = b""
            while not data.endswith((b"}", b"\r\n\r\n")) or (b"POST" in data and b"}" not in data):
                data += more(one)
            self.heard += data
            one.sendall(good)

    with Deaf(good) as deaf, routed(deaf.url) as router:
        assert router.complete().body == b"ok"
        assert router.complete().body == b"ok"
        assert deaf.heard.lower().count(b"expect: 100-continue") == 1


@pytest.mark.parametrize(
    "wrong", [{"urls": []}, {"urls": ["http://a:1", "a:1"]}, {"affinity": -1}, {"affinity_load": 0.5}, {"max_body": 0},
              {"poll": 0.0}, {"ready_path": "ready"}, {"retries": -1}, {"retry_burst": -1}, {"retry_share": 1.5},
              {"max_bodies": 1}]
)  # fmt: skip
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Router(wrong.pop("urls", ["http://a:1"]), RouterConfig(**wrong))


def test_a_machine_that_is_gone_without_a_word_is_lost_and_not_only_silent(
    two: tuple[FakeReplica, FakeReplica],
) -> None:
    """The kernel's own time-out is a connection that broke: what had no answer yet is asked of another replica."""

    async def ask() -> None:
        known = Replica(Address.parse(two[0].url), "127.0.0.1")
        two[0].allowed = 0
        with contextlib.closing(Exchange(known, 600.0)) as exchange:
            body = b'{"prompt": "p"}'
            asking = asyncio.ensure_future(exchange.ask("POST", b"/v1/completions", [], body))
            while not exchange.begun:
                await asyncio.sleep(0.01)
            assert exchange._writer is not None
            assert exchange._reader is not None
            connection = exchange._writer.get_extra_info("socket")
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                assert told == KEEPALIVE["TCP_USER_TIMEOUT"]
            exchange._reader.set_exception(OSError(errno.ETIMEDOUT, "Connection timed out"))
            with pytest.raises(ExchangeError) as caught:
                await asking
            assert (caught.value.kind, caught.value.begun) == ("broken", True)

    asyncio.run(ask())
