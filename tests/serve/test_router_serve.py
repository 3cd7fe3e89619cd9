"""The router before the real front end of `deepseek serve` (with an engine that pretends): the two fit each other."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_client import KEY, FakeClient, Served, keyring, serving, tokenizer
from test_router import Answer, Routed, routed, until

BODY = {"model": "fake", "prompt": "the quick", "ignore_eos": True}
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer()


@contextlib.contextmanager
def both(words: Any, **options: Any) -> Iterator[tuple[Served, Served]]:
    with (
        serving(FakeClient(words, delay=0.01), keyring(), **options) as a,
        serving(FakeClient(words, delay=0.01), keyring(), **options) as b,
    ):
        yield a, b


def ask(router: Routed, max_tokens: int = 8, stream: bool = False) -> Answer:
    return router.ask(
        "POST", "/v1/completions", {**BODY, "max_tokens": max_tokens, "stream": stream}, HEADERS
    )


def urls(*served: Served) -> list[str]:
    return [s.url for s in served]


def test_answers_streams_and_keys_pass(words: Any) -> None:
    with both(words) as (a, b), routed(*urls(a, b), local=False) as router:
        assert router.ask("GET", "/v1/models").status == 401
        assert ask(router).status == 200
        got = ask(router, stream=True)
        assert got.body.endswith(b"data: [DONE]\n\n")
        assert len(a.client.seen) + len(b.client.seen) == 2
        assert got.headers["x-content-type-options"] == "nosniff"


def test_an_overloaded_replica_refuses_before_it_reads_and_the_other_answers(words: Any) -> None:
    with (
        both(words, max_running=1, max_waiting=1) as (a, b),
        routed(*urls(a, b)) as router,
        ThreadPoolExecutor(12) as pool,
    ):
        many = [pool.submit(ask, router, 50) for _ in range(12)]
        answers = [m.result() for m in many]
        good, full = [a for a in answers if a.status == 200], [a for a in answers if a.status == 429]
        assert len(good) + len(full) == 12
        assert len(good) >= 4, "two run and two wait, whoever is asked first"
        assert all(
            int(f.headers["retry-after"]) >= 1 and f.json["error"]["code"] == "queue_full" for f in full
        )
        assert len(a.client.seen) >= 2
        assert len(b.client.seen) >= 2


@pytest.mark.parametrize("stream", [False, True])
def test_what_an_engine_never_began_is_given_to_another_replica(words: Any, stream: bool) -> None:
    """A step process that is not there costs the client nothing, unless no replica has one."""
    with both(words) as (a, b), routed(*urls(a, b)) as router:
        a.client.fail_after = 0
        router.router.fleet.replicas[1].used = 100  # a is asked first
        assert ask(router, stream=stream).status == 200
        assert (len(a.client.seen), len(b.client.seen)) == (1, 1)
        assert router.metric(f'refusals_total{{replica="{a.url}",why="503"}}') == 1
        assert router.router.budget.left == router.router.budget.most, "what was not begun is free"
        until(lambda: len(router.router.fleet.usable()) == 2)
        b.client.fail_after = 0
        got = ask(router, stream=stream)
        assert (got.status, got.json["error"]["code"]) == (503, "engine_unavailable")
        assert got.headers["retry-after"] == "2"
        assert len(a.client.seen) + len(b.client.seen) == 4


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_that_has_only_begun_to_wait_is_given_to_another_replica(words: Any, chat: bool) -> None:
    """Its status is sent after half a second, and comments later: neither is a part of an answer."""
    path = "/v1/chat/completions" if chat else "/v1/completions"
    asked: Any = {"stream": True, "ignore_eos": True, "max_tokens": 8, "timeout": 500}
    asked |= {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "the quick"}
    with both(words, beat=0.1) as (a, b), routed(*urls(a, b)) as router:
        a.client.prefill, a.client.fail_after, a.client.lost = 1000.0, 0, True
        router.router.fleet.replicas[1].used = 100  # a is asked first
        with router.connection() as connection:
            connection.request("POST", path, json.dumps(asked), HEADERS)
            got = connection.getresponse()
            assert (got.status, got.readline()) == (200, b": the model is working\n")
            a.client.prefill = 0.0  # its step process dies now
            body = got.read()
        assert body.endswith(b"data: [DONE]\n\n")
        assert body.count(b'"finish_reason":"length"') == 1
        assert b"error" not in body
        assert router.metric(f'retries_total{{replica="{a.url}"}}') == 1
        deadlines = [client.seen[0].deadline for client in (a.client, b.client)]
        assert 498 < deadlines[0] <= 500  # type: ignore[operator]
        assert deadlines[1] < deadlines[0] - 0.5, "the second try has what the first left of the time"  # type: ignore[operator]
        until(lambda: len(router.router.fleet.usable()) == 2)
        a.client.prefill = b.client.prefill = 1000.0
        b.client.fail_after, b.client.lost = 0, True
        with router.connection() as connection:
            connection.request("POST", path, json.dumps(asked), HEADERS)
            got = connection.getresponse()
            assert (got.status, got.readline()) == (200, b": the model is working\n")
            a.client.prefill = b.client.prefill = 0.0
            last = got.read().strip().rpartition(b"data: ")[2]
        assert json.loads(last)["error"]["code"] == "engine_lost", "an error when nobody is left, as an event"


def test_the_time_a_request_has_had_counts(words: Any) -> None:
    with serving(FakeClient(words), keyring()) as a:
        for header, left in (
            ("12.5", 87.5),
            ("x", 100),
            ("-3", 100),
            ("nan", 100),
            ("1e3", 100),
            ("9" * 400, 100),
        ):
            with contextlib.closing(
                http.client.HTTPConnection("127.0.0.1", a.port, timeout=60)
            ) as connection:
                body = json.dumps({**BODY, "max_tokens": 1, "timeout": 100})
                connection.request("POST", "/v1/completions", body, {**HEADERS, "x-request-waited": header})
                assert connection.getresponse().status == 200
            given = a.client.seen[-1].deadline
            assert given is not None
            assert left - 30 < given <= left
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", a.port, timeout=60)) as connection:
            a.client.hold_at = 0
            connection.request("POST", "/v1/completions", body, {**HEADERS, "x-request-waited": "100"})
            assert connection.getresponse().status == 504


def test_an_answer_that_its_step_process_broke_off_is_made_anew_by_another_replica(words: Any) -> None:
    """Unless the client has had a part of it; and a few times only."""
    with both(words) as (a, b), routed(*urls(a, b)) as router:
        a.client.lost = b.client.lost = True
        a.client.fail_after = 3
        router.router.fleet.replicas[1].used = 100  # a is asked first
        got = ask(router, 8)
        assert (got.status, len(a.client.seen), len(b.client.seen)) == (200, 1, 1)
        assert router.metric(f'retries_total{{replica="{a.url}"}}') == 1
        until(lambda: len(router.router.fleet.usable()) == 2)
        router.router.fleet.replicas[1].used = 200
        streamed = ask(router, 8, stream=True)
        assert b'"code":"engine_lost"' in streamed.body
        assert len(b.client.seen) == 1, "a second answer must not follow the first"
        b.client.fail_after = 3
        got = ask(router, 8)
        assert (got.status, got.json["error"]["code"], got.headers["retry-after"]) == (
            503,
            "engine_lost",
            "2",
        )


def test_a_client_that_leaves_aborts_the_engine(words: Any) -> None:
    with both(words) as (a, _), routed(a.url) as router:
        a.client.hold_at = 3
        with router.connection() as connection:
            connection.request(
                "POST", "/v1/completions", json.dumps({**BODY, "max_tokens": 400, "stream": True}), HEADERS
            )
            with connection.getresponse() as got:
                assert got.status == 200
                got.readline()
        until(lambda: len(a.client.aborted) == 1)


def test_a_rolling_restart_drops_nothing(words: Any) -> None:
    """One replica after the other drains and ends while others come, under a flow of requests."""
    seen: list[tuple[int, bool]] = []
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(serving(FakeClient(words, delay=0.005), keyring())) for _ in range(4)]
        made[2].client.ready = made[3].client.ready = (False, "loading")
        router = stack.enter_context(routed(*urls(*made)))
        stop = threading.Event()

        def flow(index: int) -> None:
            while not stop.is_set():
                got = ask(router, 12, stream=index % 2 == 0)
                seen.append((got.status, got.body.endswith(b"data: [DONE]\n\n") or index % 2 == 1))

        def more(count: int) -> None:
            goal = len(seen) + count
            until(lambda: len(seen) > goal, 120)

        with ThreadPoolExecutor(8) as pool:
            flows = [pool.submit(flow, i) for i in range(8)]
            try:
                for old, new in zip(made[:2], made[2:]):
                    more(20)
                    old.stop()
                    old.thread.join(60)
                    assert not old.thread.is_alive()
                    more(20)
                    new.client.ready = (True, "ready")
                    until(lambda: len(router.router.fleet.usable()) == 2)
            finally:
                stop.set()
            for f in flows:
                f.result()
    assert len(seen) > 80
    assert set(seen) == {(200, True)}
    assert all(len(m.client.seen) > 5 for m in made[:3])
