"""Whom the router asks: load, turns, prefixes, ejection; with a clock that the test turns."""

from __future__ import annotations

import collections

import pytest

from deepseek.errors import ConfigError
from deepseek.serve.router.affinity import prefix_key
from deepseek.serve.router.replica import FAILURES, Address, Fleet, Replica


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def fleet(count: int, clock: Clock | None = None, load: float = 1.25) -> Fleet:
    made = Fleet(load)
    address = Address.parse("http://10.0.0.1:8000")
    made.replicas = [
        Replica(address, f"10.0.0.{i}", ready=True, clock=clock or Clock()) for i in range(count)
    ]
    return made


def test_the_least_busy_is_asked_and_equals_take_turns() -> None:
    four = fleet(4)
    for r, n in zip(four.replicas, (2, 0, 0, 1)):
        r.outstanding = n
    assert [four.replicas.index(four.choose()) for _ in range(4)] == [1, 2, 1, 2]  # type: ignore[arg-type]


def test_what_was_tried_or_is_not_ready_is_left_out() -> None:
    three = fleet(3)
    a, b, c = three.replicas
    b.told(False, "draining")
    assert three.choose(tried=[a]) is c
    assert three.choose(tried=[a, c]) is None


def test_three_failures_eject_for_longer_each_time_and_a_success_forgives() -> None:
    clock = Clock()
    two = fleet(2, clock)
    a, b = two.replicas
    for rest in (5, 10, 20, 40, 60, 60):
        assert [a.failed() for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
        assert {two.choose() for _ in range(4)} == {b}
        clock.now += rest - 0.1
        assert a.ejected
        clock.now += 0.2
        assert not a.ejected
    a.succeeded()
    assert not a.failed()
    assert not a.failed()
    a.succeeded()
    assert not a.failed(), "only failures in a row count"


def test_when_all_are_ejected_they_are_better_than_nobody() -> None:
    two = fleet(2)
    for r in two.replicas:
        for _ in range(FAILURES):
            r.failed()
    assert {two.choose(), two.choose()} == set(two.replicas)
    assert two.choose(tried=two.replicas[:1]) is two.replicas[1]
    two.replicas[1].told(False, "no")
    assert {two.choose(), two.choose()} == {two.replicas[0]}, "one that says no itself is never asked"


def test_a_prefix_stays_and_a_lost_replica_moves_only_its_own() -> None:
    eight = fleet(8)
    keys = [bytes([i // 256, i % 256]) * 8 for i in range(2000)]
    home = {key: eight.choose(key) for key in keys}
    assert home == {key: eight.choose(key) for key in keys}
    counts = collections.Counter(r.name for r in home.values() if r)
    assert max(counts.values()) < 1.3 * 250
    assert min(counts.values()) > 0.7 * 250
    lost = eight.replicas.pop(3)
    moved = [key for key in keys if eight.choose(key) is not home[key]]
    assert {home[key] for key in moved} == {lost}
    assert len(moved) == counts[lost.name]


def test_a_hot_prefix_spreads_before_its_replica_is_much_busier_than_the_mean() -> None:
    four = fleet(4)
    taken: list[Replica] = []
    for _ in range(400):
        chosen = four.choose(b"the same prefix!")
        assert chosen is not None
        chosen.outstanding += 1
        taken.append(chosen)
    loads = sorted(r.outstanding for r in four.replicas)
    assert loads[-1] <= 1.25 * 100 + 1
    assert taken[0].outstanding == loads[-1], "the preferred one is as full as it may be"
    first = fleet(4)
    quiet = [first.choose(b"the same prefix!") for _ in range(10)]
    assert len({r.name for r in quiet if r}) == 1, "without load it never moves"


@pytest.mark.parametrize(
    ("url", "name", "authority"),
    [
        ("http://gpu1:8000", "http://gpu1:8000", "gpu1:8000"),
        ("gpu1:8000", "http://gpu1:8000", "gpu1:8000"),
        ("https://models.example", "https://models.example:443", "models.example"),
        ("http://[::1]:9/", "http://[::1]:9", "[::1]:9"),
    ],
)
def test_addresses(url: str, name: str, authority: str) -> None:
    found = Address.parse(url)
    assert (str(found), found.authority) == (name, authority)


@pytest.mark.parametrize(
    "url", ["ftp://a:1", "http://", "http://a:99999", "http://a:1/v1", "http://u:p@a:1", "http://a:x", ""]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        Address.parse(url)


def key(body: str, characters: int = 64) -> bytes | None:
    return prefix_key(body.encode(), characters)


def test_equal_beginnings_have_equal_keys() -> None:
    long = "x" * 64
    assert key(f'{{"prompt": "{long} one"}}') == key(f'{{"temperature": 0, "prompt":"{long} two"}}')
    assert key('{"prompt": "one"}') != key('{"prompt": "two"}')
    assert key('{"prompt": ["one", "z"]}') == key('{"prompt": "one"}')
    assert key('{"model": "a", "prompt": "one"}') != key('{"model": "b", "prompt": "one"}'), (
        "an adapter's cache is its own"
    )
    ids = list(range(100))
    assert key(f'{{"prompt": {ids}}}') == key(f'{{"prompt": {[*ids, 7]}}}')
    assert key(f'{{"prompt": [{ids}]}}') == key(f'{{"prompt": {ids}}}')


def test_a_conversation_keeps_its_key() -> None:
    first = '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]}'
    later = first[:-2] + ', {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "more"}]}'
    other = first.replace('"hi"', '"ho"')
    assert key(first, 1024) == key(later, 1024)
    assert key(first, 1024) != key(other, 1024)


@pytest.mark.parametrize("body", ["", "{", "[]", "3", "{}", '{"input": "x"}', "\xff"])
def test_without_a_prompt_there_is_no_key(body: str) -> None:
    assert prefix_key(body.encode("latin-1"), 64) is None


def test_odd_prompts_do_no_harm() -> None:
    for body in (
        '{"prompt": {}}',
        '{"prompt": []}',
        '{"prompt": [null]}',
        '{"messages": []}',
        '{"messages": [3, null]}',
        f'{{"prompt": {"[" * 1000}{"]" * 1000}}}',  # as deep as is read, and deeper than is written
        f'{{"messages": {"[" * 1000}{"]" * 1000}}}',
    ):
        prefix_key(body.encode(), 64)
    assert key('{"prompt": "x"}', 0) is None
    huge = b'{"prompt": "' + b"y" * (1 << 20)
    assert prefix_key(huge + b'1"}', 64) == prefix_key(huge + b'2"}', 64)
