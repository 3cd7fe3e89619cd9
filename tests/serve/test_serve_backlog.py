"""The expected wait is that of a queue whose speed is known; an idle engine refuses nobody."""

from __future__ import annotations

import pytest

from deepseek.serve.backlog import Backlog


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_wait_is_what_is_ahead_over_the_speed() -> None:
    clock = Clock()
    backlog = Backlog(0.5, clock)
    assert backlog.wait(1000) == 0.0
    for _ in range(50):
        backlog.enter(100)
    assert backlog.wait(1000) == 0.0  # no speed yet
    for _ in range(30):
        clock.now += 0.1
        backlog.begin(100)
    assert backlog.speed == pytest.approx(1000, rel=0.01)
    assert backlog.wait(500) == pytest.approx((20 * 100 + 500) / 1000, rel=0.01)
    backlog.leave(1000)
    assert backlog.wait(500) == pytest.approx(1.5, rel=0.01)


def test_a_prompt_alone_says_nothing_about_the_speed_and_is_never_refused() -> None:
    clock = Clock()
    backlog = Backlog(0.5, clock)
    for _ in range(20):
        backlog.enter(5)
        clock.now += 2.0
        backlog.begin(5)
    assert backlog.speed == 0.0
    assert backlog.tokens == 0
    assert backlog.wait(10**6) == 0.0


def test_the_speed_follows_the_engine() -> None:
    clock = Clock()
    backlog = Backlog(0.5, clock)
    for step in (0.1, 0.4):
        for _ in range(100):
            backlog.enter(100)
            backlog.enter(100)
            clock.now += step
            backlog.begin(100)
            clock.now += step
            backlog.leave(100)
    assert backlog.tokens == 0
    for _ in range(40):
        backlog.enter(100)
    for _ in range(39):
        clock.now += 0.4
        backlog.begin(100)
    assert backlog.speed == pytest.approx(250, rel=0.05)
