"""The expected wait is that of a queue whose speed is known; an idle engine refuses nobody."""

from __future__ import annotations

import pytest

from deepseek.serve.backlog import Backlog


def test_the_wait_is_what_is_left_over_the_speed() -> None:
    backlog, at, rows = Backlog(0.5), 100.0, 0
    backlog.look(at, 5000, rows)
    assert backlog.wait(1000) == 0.0  # no speed yet
    for _ in range(30):
        at, rows = at + 0.1, rows + 110  # 100 rows of prompts and 10 of answers a step
        backlog.look(at, 5000 - rows * 10 // 11, rows)
    assert backlog.speed == pytest.approx(1100, rel=0.01)
    assert backlog.wait(500) == pytest.approx((2000 + 500) / 1100, rel=0.01)
    backlog.look(at, 3500, rows)  # others came, within the same step
    assert backlog.wait(500) == pytest.approx(4000 / 1100, rel=0.01)


def test_a_prompt_alone_says_nothing_about_the_speed_and_is_never_refused() -> None:
    backlog, at = Backlog(0.5), 100.0
    for number in range(20):
        backlog.look(at, 5, 5 * number)
        at += 2.0
        backlog.look(at, 0, 5 * number + 5)
    assert backlog.speed == 0.0
    assert backlog.wait(10**6) == 0.0


def test_the_speed_follows_the_engine() -> None:
    backlog, at, rows = Backlog(0.5), 0.0, 0
    for step in (0.1, 0.4):
        for _ in range(100):
            at, rows = at + step, rows + 100
            backlog.look(at, 1000, rows)
    assert backlog.speed == pytest.approx(250, rel=0.01)


def test_an_engine_that_begins_anew_is_measured_anew() -> None:
    backlog = Backlog(0.5)
    for at, rows in ((1.0, 0), (2.0, 100), (3.0, 200), (4.0, 10), (4.2, 30), (3.0, 40)):
        backlog.look(at, 50, rows)
    assert backlog.speed == 100.0
