"""What arrives at the router byte by byte: nothing that a replica would read in another way than the router did."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from fake_replica import FakeReplica, replica
from test_router import Routed, routed, until


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeReplica]:
    with replica("a") as made:
        yield made


@pytest.fixture(scope="module")
def router(fake: FakeReplica) -> Iterator[Routed]:
    with routed(fake, body_seconds=5.0) as made:
        yield made


def say(router: Routed, data: bytes, half: bool = True) -> bytes:
    """Everything that comes back for ``data``; ``half``: after which nothing more is sent."""
    got = b""
    with (
        socket.create_connection(("127.0.0.1", router.port), 120) as one,
        contextlib.suppress(ConnectionError),
    ):
        one.sendall(data)
        if half:
            try:
                one.shutdown(socket.SHUT_WR)
            except OSError as error:  # the answer has come, and the router has hung up already
                if error.errno != errno.ENOTCONN:
                    raise
        while piece := one.recv(65536):
            got += piece
    return got


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def echoed(answer: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return found


def whole(router: Routed, data: bytes) -> bytes:
    return say(router, data, half=False)


HOST = b"Host: localhost\r\n"
CLOSE = HOST + b"Connection: close\r\n"


def test_length_and_chunks_together_become_one_length(router: Routed) -> None:
    body = b"5\r\nhello\r\n0\r\n\r\n"
    for order in (
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
    ):
        answer = whole(router, b"POST /echo/x HTTP/1.1\r\n" + CLOSE + order + b"\r\n" + body)
        if status(answer) == 400:
            continue
        told = echoed(answer)
        lengths = [v for k, v in told["headers"] if k in ("content-length", "transfer-encoding")]
        assert (told["body"], lengths) == ("hello", ["5"])


@pytest.mark.parametrize(
    "head",
    [
        b"POST /echo/x HTTP/1.1\r\n" + CLOSE + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST /echo/x HTTP/1.1\r\n" + CLOSE + b"Content-Length: +3\r\n\r\nabc",
        b"POST /echo/x HTTP/1.1\r\n" + CLOSE + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"GET /echo/x HTTP/1.1\r\n" + CLOSE + b"X-A: b\r\n folded\x00\r\n\r\n",
        b"GET http://other.example/echo/x HTTP/1.1\r\n" + CLOSE + b"\r\n",
        b"OPTIONS * HTTP/1.1\r\n" + CLOSE + b"\r\n",
        b"GET /echo/x HTTP/1.1\r\n" + CLOSE + b"X-Long: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET /echo/x HTTP/1.1\r\nHost: a\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"nonsense\r\n\r\n",
    ],
    ids=[
        "two lengths",
        "signed length",
        "coding",
        "control",
        "absolute",
        "star",
        "long",
        "two hosts",
        "tls",
        "text",
    ],
)
def test_what_is_not_clear_is_refused(router: Routed, fake: FakeReplica, head: bytes) -> None:
    before = len(fake.asked)
    answer = say(router, head)
    assert answer == b"" or 400 <= status(answer) < 500
    assert len(fake.asked) == before
    assert router.ask("GET", "/ready").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/admin/reload",
        "/%61dmin/reload",
        "/admin%2freload",
        "//admin/reload",
        "/x/../admin/reload",
        "/Admin/reload",
    ],
)
def test_no_spelling_reaches_what_is_not_passed_on(router: Routed, path: str) -> None:
    assert router.ask("POST", path, {"path": "x"}).status == 404


def test_an_upgrade_is_not_passed_on(router: Routed) -> None:
    head = b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n"
    answer = whole(router, b"GET /echo/x HTTP/1.1\r\n" + HOST + head)
    assert status(answer) == 200
    assert not {"upgrade", "connection"} & {k for k, v in echoed(answer)["headers"] if v != "close"}


def test_two_requests_at_once_have_two_answers(router: Routed) -> None:
    got = whole(
        router, b"GET /echo/1 HTTP/1.1\r\n" + HOST + b"\r\nGET /echo/2 HTTP/1.1\r\n" + CLOSE + b"\r\n"
    )
    assert re.findall(rb'"target":"(/echo/\d)', got) == [b"/echo/1", b"/echo/2"]


def test_an_old_client_has_its_stream_too(router: Routed) -> None:
    body = b'{"prompt": "p", "stream": true}'
    got = whole(
        router, b"POST /v1/completions HTTP/1.0\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    assert status(got) == 200
    assert got.endswith(b"data: [DONE]\n\n")


def test_a_client_that_waits_for_continue_gets_it(router: Routed) -> None:
    body = b'{"prompt": "p"}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\n"
        + CLOSE
        + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    with socket.create_connection(("127.0.0.1", router.port), 120) as one:
        one.sendall(head)
        assert one.recv(100).startswith(b"HTTP/1.1 100 ")
        one.sendall(body)
        got = b""
        while piece := one.recv(65536):
            got += piece
    assert status(got) == 200


def test_half_a_request_is_nobodys(router: Routed, fake: FakeReplica) -> None:
    before = len(fake.asked)
    for data in (
        b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\n{",
        b"GET /echo",
        b"",
    ):
        say(router, data)
    assert len(fake.asked) == before
    assert router.complete().status == 200


def test_a_thousand_idle_connections_do_no_harm(fake: FakeReplica) -> None:
    """Silent ones, some in the middle of a head, some in the middle of a body: each has its time, and is closed."""
    beginnings = (
        b"",
        b"POST /v1/comp",
        b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Length: 9\r\n\r\n{",
    )
    with routed(fake, body_seconds=3.0, keep_alive=3.0) as router, contextlib.ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", router.port), 120))
            for _ in range(1000)
        ]
        for i, one in enumerate(idle):
            one.sendall(beginnings[i % 3])
        assert [router.complete().status for _ in range(5)] == [200] * 5
        for one in idle:
            with contextlib.suppress(ConnectionError):
                while one.recv(4096):
                    pass
        assert router.complete().status == 200


def test_large_bodies_at_once_are_bounded_together(fake: FakeReplica) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Length: 150000\r\n\r\n"
    with routed(fake, max_body=200_000, max_bodies=300_000) as router, contextlib.ExitStack() as stack:
        first, second, third = (
            stack.enter_context(socket.create_connection(("127.0.0.1", router.port), 120)) for _ in range(3)
        )
        for one in (first, second):
            one.sendall(head + b" " * 140_000)
        until(lambda: router.router.bodies.held == 280_000)
        third.sendall(head + b" " * 140_000)
        assert status(third.recv(1000)) == 429
        assert router.complete().status == 200
        first.close()
        second.close()
        until(lambda: router.router.bodies.held == 0)


def test_senders_of_slow_bodies_take_no_place_from_others(fake: FakeReplica) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Length: 20\r\n\r\n"
    with routed(fake, max_inside=1) as router, contextlib.ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", router.port), 120)) for _ in range(5)
        ]
        for one in slow:
            one.sendall(head + b'{"prompt"')
        until(lambda: router.router.arriving == 5)
        assert [router.complete().status for _ in range(3)] == [200] * 3
        slow[0].sendall(b': "hello"} ')
        assert status(slow[0].recv(1000)) == 200, "and it has one when its body is here"
    until(lambda: router.router.arriving == 0)


def test_a_body_that_is_too_large_is_answered_while_it_is_sent(router: Routed) -> None:
    got = router.ask("POST", "/v1/completions", b" " * 30_000_000)
    assert (got.status, got.json["error"]["code"]) == (413, "request_too_large")


def test_headers_that_a_client_calls_its_connections_own_do_not_pass(router: Routed) -> None:
    """``Connection: NAME`` must not take away what the router says itself."""
    told = echoed(
        whole(
            router,
            b"POST /echo/x HTTP/1.1\r\n"
            + HOST
            + b"Connection: close, content-length, host, x-forwarded-for, x-mine\r\n"
            b"X-Mine: 1\r\nX-Forwarded-For: 1.2.3.4\r\nContent-Length: 5\r\n\r\nhello",
        )
    )
    names = dict(told["headers"])
    assert told["body"] == "hello"
    assert names["content-length"] == "5"
    assert names["x-forwarded-for"].endswith("127.0.0.1")
    assert "x-mine" not in names


def test_a_stream_and_what_was_sent_behind_it_are_answered_in_order(router: Routed) -> None:
    def asked(body: bytes, close: bytes = b"") -> bytes:
        return (
            b"POST /v1/completions HTTP/1.1\r\n"
            + HOST
            + close
            + b"Content-Length: %d\r\n\r\n" % len(body)
            + body
        )

    stream, short = b'{"prompt": "p", "stream": true, "max_tokens": 5}', b'{"prompt": "p", "max_tokens": 2}'
    got = whole(router, asked(stream) + asked(short) * 4 + asked(stream, b"Connection: close\r\n"))
    assert got.count(b"HTTP/1.1 200") == 6
    assert got.count(b"data: [DONE]") == 2
    assert got.count(b'"a a"') == 4
    assert got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
