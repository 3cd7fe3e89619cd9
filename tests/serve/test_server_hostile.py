"""Requests of people who mean no good, over bare sockets: each gets a 4xx or is cut off, and the server serves on."""

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_client import ADMIN, KEY, Served, keyring, serving

from deepseek.serve.server.launch import load_texts

JSON = "Content-Type: application/json\r\n"
AUTHORIZED = f"Authorization: Bearer {KEY}\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(keys=keyring(), max_body=100_000, body_seconds=60.0, max_sequences=64) as found:
        yield found


@pytest.fixture
def hurried() -> Iterator[Served]:
    """A server that gives a request a second to come in."""
    with serving(keys=keyring(), body_seconds=1.0) as found:
        yield found


def talk(server: Served, data: bytes, seconds: float = 120.0) -> bytes:
    """What the server says to ``data`` until it closes or falls silent."""
    answer = b""
    with server.connect() as link:
        link.settimeout(seconds)
        with contextlib.suppress(OSError):
            link.sendall(data)
        with contextlib.suppress(OSError):
            while piece := link.recv(65536):
                answer += piece
                head, gap, body = answer.partition(b"\r\n\r\n")
                size = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                if gap and size and len(body) >= int(size[0].split(b":")[1]):
                    break
    return answer


def post(server: Served, path: str, body: bytes, headers: str = "") -> tuple[int, Any]:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{headers}\r\n"
    )
    return read(talk(server, head.encode() + body))


def read(answer: bytes) -> tuple[int, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), json.loads(body) if body else None


def alive(server: Served) -> bool:
    status, told = post(server, "/v1/completions", b'{"prompt": "x", "max_tokens": 1}')
    return status == 200 and told["object"] == "text_completion"


DEEP = b"[" * 50_000
BODIES = {
    "empty": b"",
    "no object": b"[]",
    "no JSON": b"{",
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": Infinity}',
    "too large for a double": b'{"prompt": "x", "temperature": 1e999}',
    "1e308": b'{"prompt": "x", "temperature": 1e308}',
    "a million digits": b'{"prompt": "x", "seed": ' + b"9" * 90_000 + b"}",
    "deep": DEEP,
    "deep in a field": b'{"prompt": ' + DEEP + b"}",
    "as deep as is parsed": b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    "deep objects": b'{"prompt": "x", "stop": ' + b'{"a":' * 1000 + b"1" + b"}" * 1000 + b"}",
    "wide": b'{"prompt": ' + b"[" + b"{}," * 20_000 + b"{}]}",
    "deep schema": b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", '
    b'"json_schema": {"name": "x", "schema": ' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}}}",
    "bad UTF-8": b'{"prompt": "\xff\xfe"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "truncated escape": b'{"prompt": "\\u12"}',
    "byte order mark": b'\xef\xbb\xbf{"prompt": "x"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "bool for int": b'{"prompt": "x", "n": true}',
    "negative": b'{"prompt": "x", "max_tokens": -1}',
    "huge n": b'{"prompt": "x", "n": 1000000000}',
    "n times prompts": b'{"prompt": ["a", "b", "c"], "n": 64}',
    "too many prompts": json.dumps({"prompt": ["a"] * 5000}).encode(),
    "ids outside": b'{"prompt": [1, 2, 99999999]}',
    "ids too large": b'{"prompt": [1, 99999999999999999999999]}',
    "no tokens": b'{"prompt": [[]]}',
    "mixed": b'{"prompt": ["a", [1]]}',
    "null": b'{"prompt": null}',
    "long name": b'{"prompt": "x", "' + b"a" * 50_000 + b'": 1}',
    "long model": b'{"prompt": "x", "model": "' + b"a" * 50_000 + b'"}',
    "null byte in model": b'{"prompt": "x", "model": "\\u0000"}',
    "empty stop": b'{"prompt": "x", "stop": ""}',
    "long prompt": json.dumps({"prompt": "word " * 15_000}).encode(),
    "prototype": b'{"prompt": "x", "__proto__": {"a": 1}, "constructor": 1}',
    "two formats": b'{"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["b"]}}',
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_a_4xx(server: Served, name: str) -> None:
    path = "/v1/chat/completions" if b"messages" in BODIES[name] else "/v1/completions"
    status, told = post(server, path, BODIES[name])
    assert 400 <= status < 500
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert len(json.dumps(told)) < 2500
    assert alive(server)


ODD = {
    "null byte in the prompt": b'{"prompt": "a\\u0000b", "max_tokens": 1}',
    "twice the same name": b'{"prompt": "a", "prompt": "b", "max_tokens": 1}',
    "every plane": json.dumps({"prompt": "a\U0010ffff\u202e\ufeff", "max_tokens": 1}).encode(),
    "blanks": b' \n\t{"prompt":"a" , "max_tokens":1}\n ',
    "1.0": b'{"prompt": "a", "max_tokens": 1.0}',
    "-0": b'{"prompt": "a", "max_tokens": 1, "temperature": -0.0}',
    "special tokens": b'{"prompt": "<|endoftext|><|user|>", "max_tokens": 1}',
}


@pytest.mark.parametrize("name", ODD)
def test_odd_but_right_bodies_are_answered(server: Served, name: str) -> None:
    assert post(server, "/v1/completions", ODD[name])[0] == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [("/nothing", 404), ("/v1/models/", 404), ("/v1/models/%00", 404), ("/v1/models/..%2f..%2fetc", 404),
     ("/v1/completions/", 404), ("/%ff%fe", 404), ("/" + "a" * 20_000, 404), ("//", 404), ("/v1/models?x=%00", 200),
     ("/v1/completions", 405), ("/index.html/..", 404)],
)  # fmt: skip
def test_odd_paths(server: Served, path: str, status: int) -> None:
    answer = talk(server, f"GET {path} HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}\r\n".encode())
    assert read(answer)[0] == status
    if status >= 400:
        assert read(answer)[1]["error"]["message"]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "GET", "BREW", "post"])
def test_other_methods_are_405_and_say_which_is_right(server: Served, method: str) -> None:
    answer = talk(
        server, f"{method} /v1/completions HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}Content-Length: 0\r\n\r\n".encode()
    )  # fmt: skip
    assert read(answer)[0] == 405
    assert b"\r\nallow: POST\r\n" in answer


@pytest.mark.parametrize(
    ("headers", "status"),
    [("Content-Type: text/plain", 415), ("X: y", 415),
     ("Content-Type: application/json\r\nContent-Encoding: gzip", 415),
     ("Content-Type: application/json\r\nContent-Encoding: identity", 200),
     ("Content-Type: APPLICATION/JSON; charset=utf-8", 200)],
)  # fmt: skip
def test_only_plain_json_is_taken(server: Served, headers: str, status: int) -> None:
    body = b'{"prompt": "x", "max_tokens": 1}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}{headers}\r\nContent-Length: {len(body)}\r\n\r\n"
    assert read(talk(server, head.encode() + body))[0] == status


def test_chunked_bodies_are_read_and_bounded(server: Served) -> None:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}Content-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    ).encode()
    body = b'{"prompt": "x", "max_tokens": 1}'
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    assert read(talk(server, head + pieces))[0] == 200
    endless = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    assert read(talk(server, head + endless * 3))[0] == 413
    assert read(talk(server, head + b"zz\r\n"))[0] == 400


def test_a_body_that_is_too_large_is_answered_while_it_is_sent(server: Served) -> None:
    """Most clients read nothing before they have sent everything: a connection that is reset tells them nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for more in ({}, {"Content-Type": "text/plain"}):
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", b" " * 30_000_000, {**headers, **more})
            answer = connection.getresponse()
            assert answer.status == (415 if more else 413)
            assert json.loads(answer.read())["error"]["message"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"b" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 50_000 + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    ],
    ids=lambda data: data[:24].decode("latin-1"),
)
def test_what_is_no_http_is_a_400_in_the_usual_shape(server: Served, data: bytes) -> None:
    answer = talk(server, data)
    if answer:  # what is sent after the refusal may tear the connection down before it is read
        assert read(answer)[0] in (400, 431)
        assert read(answer)[1]["error"]["type"] == "invalid_request_error"
    assert alive(server)


def test_a_body_that_comes_too_slowly_is_408(hurried: Served) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}{JSON}Content-Length: 99\r\n\r\n"
    assert read(talk(hurried, head.encode() + b"{"))[0] == 408


def test_a_sender_of_single_bytes_is_cut_off_all_the_same(hurried: Served) -> None:
    with hurried.connect() as link:
        link.sendall(b"GET / HTTP/1.1\r\nHost: ")
        with pytest.raises(OSError):  # noqa: PT012 - at whichever byte it is cut off
            for _ in range(10_000):
                link.sendall(b"x")
                time.sleep(0.05)


def test_a_connection_that_says_nothing_is_closed(hurried: Served) -> None:
    with hurried.connect() as link:
        link.settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            assert link.recv(1) == b""


def test_pipelined_requests_are_answered_in_order(server: Served) -> None:
    one = f"GET /v1/models/{{}} HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}\r\n"
    with server.connect() as link:
        link.sendall((one.format("fake") + one.format("polite") + one.format("none")).encode())
        link.settimeout(60)
        answer = b""
        with contextlib.suppress(TimeoutError):
            while answer.count(b"HTTP/1.1 ") < 3 or not answer.endswith(b"}"):
                answer += link.recv(65536)
    assert [line[:3] for line in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"404"]


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/metrics", "/version", "/openapi.json", "/nothing", "/tokenize", "/v1/completions"],
)
@pytest.mark.parametrize("key", ["", "Bearer", "Bearer wrong", "Basic " + KEY, KEY, "Bearer " + KEY[:-1]])
def test_without_a_key_nothing_is_told(server: Served, path: str, key: str) -> None:
    headers = f"Authorization: {key}\r\n" if key else ""
    answer = talk(server, f"GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
    status, told = read(answer)
    assert status == 401
    assert told["error"]["code"] == "invalid_api_key"
    assert b"www-authenticate: Bearer" in answer


def test_health_readiness_and_the_page_are_open_and_closed_to_other_sites(server: Served) -> None:
    for path in ("/health", "/ready", "/"):
        answer = talk(server, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"content-security-policy: default-src 'self'" in answer
        assert b"x-request-id: " in answer
    cross = f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}Sec-Fetch-Site: cross-site\r\n\r\n"
    assert read(talk(server, cross.encode()))[0] == 403


def test_without_keys_only_loopback_names_are_answered() -> None:
    with serving() as server:
        for host, status in [
            ("127.0.0.1:80", 200),
            ("localhost", 200),
            ("[::1]:1", 200),
            ("evil.example", 403),
            ("", 403),
        ]:
            answer = talk(server, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert read(answer)[0] == status, host
        body = b'{"path": "/tmp"}'
        head = f"POST /admin/reload HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: {len(body)}\r\n\r\n"
        assert read(talk(server, head.encode() + body))[0] == 403


def test_hostile_paths_to_reload(server: Served) -> None:
    for path in ("", "\x00", "/proc/self/mem\x00", "a" * 4000, "\ud83d\ude00"):
        body = json.dumps({"path": path}).encode()
        head = (f"POST /admin/reload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")  # fmt: skip
        assert read(talk(server, head.encode() + body))[0] == 400


def test_a_port_scan_does_no_harm(server: Served) -> None:
    for _ in range(50):
        socket.create_connection(("127.0.0.1", server.port)).close()
    assert alive(server)
    end = time.monotonic() + 60
    while server.front.admission.inside or server.client.running:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_model_without_a_tokenizer_is_the_callers_mistake(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no 503, after which clients and routers ask again."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(server.front, "load", load_texts)
    body = json.dumps({"path": str(tmp_path)})
    head = f"POST /admin/reload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\n{JSON}"
    status, told = read(talk(server, f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()))
    assert (status, told["error"]["param"]) == (400, "path")
    assert "has no tokenizer: put its tokenizer.json there" in told["error"]["message"]
