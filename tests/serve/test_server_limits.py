"""Overload, clients that go, readers that stall, deadlines, and the end of a server: nobody waits for ever."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
from fake_client import INFO, KEY, TEXT, FakeClient, Served, keyring, serving

from deepseek.address import bind, is_loopback
from deepseek.errors import ConfigError
from deepseek.serve.server.config import ServerConfig
from deepseek.serve.server.connection import allow_connections
from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.guard import hostname
from deepseek.serve.server.room import Room

JSON = {"content-type": "application/json"}


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def ask(server: Served, path: str = "/v1/completions", key: str = "", **body: Any) -> httpx2.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx2.post(f"{server.url}{path}", json={"prompt": "x", **body}, headers=headers, timeout=120)


def still(count: Callable[[], int]) -> bool:
    """Whether nothing is added for a while: a writer whose reader takes nothing."""
    before = count()
    time.sleep(0.2)
    return count() == before


@contextmanager
def asking(server: Served, count: int, **body: Any) -> Iterator[list[httpx2.Response]]:
    """``count`` requests on their way; their answers are there at the end."""
    answers: list[httpx2.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(server, **body))) for _ in range(count)]
    for thread in threads:
        thread.start()
    yield answers
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()


def raw(server: Served, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    data = json.dumps(body).encode()
    link = server.connect()
    link.sendall(
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return link


def tokenised(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the server gives the tokenizer from now on."""
    told: list[str] = []
    plain = client.tokenizer.prompt
    monkeypatch.setattr(client.tokenizer, "prompt", lambda text: told.append(text) or plain(text))
    return told


def test_a_full_queue_is_429_at_once_and_the_others_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused costs no tokenising; how long it takes is for benchmarks/robust_serve.py."""
    client = FakeClient(hold_at=0)
    with serving(client, max_running=2, max_waiting=3) as server:
        with asking(server, 5, max_tokens=1) as answers:
            until(lambda: len(client.running) == 5)
            read = tokenised(client, monkeypatch)
            for _ in range(30):
                refused = ask(server, prompt="word " * 10_000)
                assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.json()["error"]["code"] == "queue_full"
            assert len(client.seen) == 5
            assert read == []
            client.hold_at = None
        assert [a.status_code for a in answers] == [200] * 5
        assert ask(server, max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place_at_once(stream: bool) -> None:
    client = FakeClient(delay=0.05)
    with serving(client) as server:
        link = raw(server, {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": stream, "n": 2})
        until(lambda: len(client.running) == 2)
        link.close()
        until(lambda: not client.running)
        assert len(client.aborted) == 2
        until(lambda: server.front.admission.inside == 0)


def test_a_client_that_goes_while_its_prompt_waits_is_forgotten() -> None:
    client = FakeClient(prefill=60, slots=1)
    with serving(client) as server:
        links = [raw(server, {"prompt": "x", "stream": True}) for _ in range(3)]
        until(lambda: server.front.admission.inside == 3)
        for link in links:
            link.close()
        until(lambda: server.front.admission.inside == 0)
        assert not client.running


def test_a_silent_stream_gets_comments_and_then_its_answer() -> None:
    client = FakeClient(hold_at=0)
    with serving(client, beat=0.5) as server:
        lines, beats = [], 0
        with httpx2.stream(
            "POST", f"{server.url}/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 2}, timeout=60
        ) as answer:  # fmt: skip
            for line in answer.iter_lines():
                lines.append(line)
                beats += line.startswith(":")
                if beats == 2:
                    client.hold_at = None
        assert beats >= 2
        assert lines[-2] == "data: [DONE]"


def test_a_deadline_ends_a_request_with_504() -> None:
    with serving(FakeClient(hold_at=2)) as server:
        answer = ask(server, timeout=1, max_tokens=500, ignore_eos=True)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        streamed = ask(server, timeout=1, max_tokens=500, ignore_eos=True, stream=True)
        assert streamed.status_code == 200
        events = [line for line in streamed.text.splitlines() if line.startswith("data: ")]
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert events[-1] == "data: [DONE]"
        until(lambda: server.front.admission.inside == 0)


def test_a_hung_engine_does_not_hold_a_request_beyond_its_time() -> None:
    with serving(FakeClient(prefill=3600)) as server:
        assert ask(server, timeout=1).status_code == 504


def test_a_reader_that_stalls_is_cut_and_others_are_not_slowed() -> None:
    info = INFO.__class__("fake", "/m", 100_000_000, 320, 8, 1)
    endless = {"prompt": "x", "stream": True, "max_tokens": 1_000_000, "ignore_eos": True}
    client = FakeClient(text="x" * 2000, info=info)
    with serving(client, stalled=3600.0) as server:
        link = raw(server, endless)
        until(lambda: client.generated > 100 and still(lambda: client.generated))
        assert ask(server, max_tokens=3).status_code == 200
        assert len(client.running) == 1
        link.close()
        until(lambda: not client.running)
    client = FakeClient(text="x" * 2000, info=info)
    with serving(client, stalled=1.0) as server:
        link = raw(server, endless)
        until(lambda: len(client.running) == 1)
        until(lambda: not client.running)
        link.settimeout(60)
        tail = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := link.recv(1 << 16):
                tail = (tail + piece)[-100:]
        assert b"[DONE]" not in tail
        link.close()
        until(lambda: server.front.admission.inside == 0)


def test_idle_connections_survive_and_cost_nothing() -> None:
    with serving() as server:
        links = [server.connect() for _ in range(200)]
        question = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for _ in range(2):
            for link in links:
                link.sendall(question)
            for link in links:
                answer = b""
                while not answer.endswith(b"}"):
                    answer += link.recv(4096)
                assert answer.startswith(b"HTTP/1.1 200")
            assert ask(server, max_tokens=1).status_code == 200
        for link in links:
            link.close()


def test_limits_of_a_key_are_its_own() -> None:
    with serving(keys=keyring(requests_per_minute=2, tokens_per_minute=10_000)) as server:
        first = ask(server, key=KEY, max_tokens=3)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert int(first.headers["x-ratelimit-remaining-tokens"]) < 10_000
        assert ask(server, key=KEY).status_code == 200
        refused = ask(server, key=KEY)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 31
        assert (
            httpx2.get(
                f"{server.url}/v1/models", headers={"authorization": f"Bearer {KEY}"}, timeout=60
            ).status_code
            == 200
        )


def test_tokens_are_paid_when_they_are_known() -> None:
    with serving(keys=keyring(tokens_per_minute=20)) as server:
        assert ask(server, key=KEY, max_tokens=40, ignore_eos=True).status_code == 200
        assert ask(server, key=KEY).status_code == 429


def test_concurrent_requests_of_a_key() -> None:
    with serving(FakeClient(hold_at=0), keys=keyring(concurrent=1)) as server:
        with asking(server, 1, key=KEY, max_tokens=1) as answers:
            until(lambda: len(server.client.running) == 1)
            assert ask(server, key=KEY).status_code == 429
            server.client.hold_at = None
        assert answers[0].status_code == 200


def test_a_drain_finishes_what_runs_and_refuses_what_comes() -> None:
    client = FakeClient(hold_at=20)
    with serving(client, drain=600) as server:
        with asking(server, 6, max_tokens=40, ignore_eos=True, stream=True) as answers:
            until(lambda: len(client.running) == 6)
            server.stop()
            until(lambda: server.front.admission.draining)
            late = ask(server)
            assert late.status_code == 503
            assert late.headers["retry-after"] == "1"
            assert late.headers["connection"] == "close"
            ready = httpx2.get(f"{server.url}/ready", timeout=60)
            assert ready.status_code == 503
            assert "draining" in ready.json()["reason"]
            assert httpx2.get(f"{server.url}/health", timeout=60).status_code == 200
            client.hold_at = None
        server.thread.join(60)
        assert not server.thread.is_alive()
    for answer in answers:
        assert answer.status_code == 200
        assert answer.text.rstrip().endswith("data: [DONE]")
        assert "error" not in answer.text
    with pytest.raises(httpx2.ConnectError):
        ask(server)


def test_a_drain_has_an_end_and_a_second_signal_ends_it_at_once() -> None:
    for seconds, again in ((0.5, False), (3600.0, True)):
        client = FakeClient(hold_at=3)
        with serving(client, drain=seconds) as server:
            link = raw(server, {"prompt": "x", "max_tokens": 5000, "ignore_eos": True, "stream": True})
            until(lambda: len(client.running) == 1)  # noqa: B023
            server.stop()
            if again:
                until(lambda: server.front.admission.draining)
                server.stop()
            server.thread.join(60)
            assert not server.thread.is_alive()
            link.close()


def test_readiness_is_the_clients_word() -> None:
    with serving() as server:
        assert httpx2.get(f"{server.url}/ready", timeout=60).json() == {"status": "ready"}
        server.client.ready = (False, "the step process ended (SIGKILL)")
        told = httpx2.get(f"{server.url}/ready", timeout=60)
        assert (told.status_code, told.json()["reason"]) == (503, "the step process ended (SIGKILL)")
        assert httpx2.get(f"{server.url}/health", timeout=60).status_code == 200


def test_a_long_prompt_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer is made to need as long as the test wants; meanwhile the server answers others."""
    client = FakeClient()
    client.info = client.info.__class__("fake", "/m", 10_000_000, 320, 8, 1)
    text = " ".join(f"{i}é{i * i}" for i in range(20_000))
    begun, go_on, plain = threading.Event(), threading.Event(), client.tokenizer.prompt

    def prompt(given: str) -> list[int]:
        if given == text:
            begun.set()
            assert go_on.wait(60)
        return plain(given)

    monkeypatch.setattr(client.tokenizer, "prompt", prompt)
    with serving(client) as server, asking(server, 1, prompt=text, max_tokens=1) as answers:
        assert begun.wait(60)
        assert httpx2.get(f"{server.url}/health", timeout=60).status_code == 200
        assert httpx2.get(f"{server.url}/v1/models", timeout=60).status_code == 200
        for size in (1, 3000):  # in the event loop, and in a thread
            short = {"prompt": "a " * size, "max_tokens": 1}
            assert httpx2.post(f"{server.url}/v1/completions", json=short, timeout=60).status_code == 200
        assert answers == []
        go_on.set()
    assert answers[0].status_code == 200


def test_a_reload_while_requests_run_drops_none(tmp_path: Any) -> None:
    client = FakeClient(hold_at=10)
    with serving(client, keys=keyring()) as server:
        from fake_client import ADMIN

        with asking(server, 8, key=KEY, max_tokens=30, ignore_eos=True) as answers:
            until(lambda: len(client.running) == 8)
            for _ in range(3):
                told = httpx2.post(
                    f"{server.url}/admin/reload",
                    json={"path": str(tmp_path)},
                    headers={"authorization": f"Bearer {ADMIN}"},
                    timeout=60,
                )
                assert told.status_code == 200
            client.hold_at = None
        assert [a.status_code for a in answers] == [200] * 8


def test_the_page_is_served_with_a_strict_policy() -> None:
    with serving(keys=keyring()) as server:
        page = httpx2.get(server.url + "/", timeout=60)
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "unsafe" not in page.headers["content-security-policy"]
        again = httpx2.get(server.url + "/", headers={"if-none-match": page.headers["etag"]}, timeout=60)
        assert again.status_code == 304
        assert httpx2.get(server.url + "/../pyproject.toml", timeout=60).status_code in (401, 404)


def test_streams_of_many_are_told_apart() -> None:
    client = FakeClient(text=lambda request: f"{request.prompt[0]} " + TEXT)
    with serving(client) as server:

        async def one(http: httpx2.AsyncClient, number: int) -> bool:
            body = {"prompt": [number], "stream": True, "max_tokens": 300}
            answer = await http.post(f"{server.url}/v1/completions", json=body)
            chunks = [json.loads(line[6:]) for line in answer.text.splitlines()
                      if line.startswith("data: {")]  # fmt: skip
            text = "".join(c["choices"][0]["text"] for c in chunks)
            return text == f"{number} {TEXT}"

        async def work() -> list[bool]:
            async with httpx2.AsyncClient(timeout=60) as http:
                return await asyncio.gather(*(one(http, 10 + i) for i in range(40)))

        assert all(asyncio.run(work()))


def test_room_is_shared_and_given_back() -> None:
    room = Room(100, "bytes")
    with room.hold() as one, room.hold() as other:
        one(60)
        other(40)
        with pytest.raises(ApiError, match="100 bytes are held, and there is room for 100") as caught:
            one(1)
        assert (caught.value.status, caught.value.headers["retry-after"]) == (429, "1")
        with pytest.raises(ApiError, match="needs more than 100 bytes") as caught:
            other(61)
        assert caught.value.status == 400
        assert room.held == 100
    assert room.held == 0


def test_large_bodies_at_once_are_bounded_together() -> None:
    with serving(max_body=200_000, max_bodies=300_000) as server:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 150000\r\n\r\n"
        )
        with server.connect() as first, server.connect() as second, server.connect() as third:
            for link in (first, second):
                link.sendall(head + b" " * 140_000)
            until(lambda: server.front.bodies.held == 280_000)
            third.sendall(head + b" " * 140_000)
            assert third.recv(1000).startswith(b"HTTP/1.1 429")
            assert ask(server, max_tokens=1).status_code == 200, "a small one has room"
        until(lambda: server.front.bodies.held == 0)
        assert ask(server, max_tokens=1).status_code == 200


def test_many_answers_with_many_alternatives_do_not_fill_the_memory() -> None:
    with serving(max_logprobs=10_000) as server:
        few = ask(server, n=128, logprobs=20, max_tokens=3, ignore_eos=True)
        assert few.status_code == 200, few.text
        assert len(few.json()["choices"]) == 128
        many = ask(server, n=128, logprobs=20, max_tokens=50, ignore_eos=True)
        assert many.status_code == 400
        assert "needs more than 10,000 log-probabilities" in many.json()["error"]["message"]
        until(lambda: not server.client.running)
        until(lambda: server.front.logprobs.held == 0)
        streamed = ask(server, n=16, logprobs=20, max_tokens=50, ignore_eos=True, stream=True)
        assert streamed.text.endswith("data: [DONE]\n\n"), "a stream holds none"
        assert "error" not in streamed.text


def test_connections_are_not_bounded_by_a_small_limit_of_files() -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1000), hard))
        allow_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(hard, 65_536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_addresses() -> None:
    for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]", "a.localhost", "localhost."):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.example.com", ""):
        assert not is_loopback(host)
    assert hostname("127.0.0.1:80") == "127.0.0.1"
    assert hostname("[::1]:80") == "::1"
    with bind("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="give another --port"):
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="max_waiting=-1"):
        ServerConfig(max_waiting=-1)
