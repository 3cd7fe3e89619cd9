"""The budget finds the rows that the goal allows, follows a machine that changes, and keeps its bounds."""

from __future__ import annotations

import pytest

from deepseek.errors import ConfigError
from deepseek.serve.budget import FeedbackBudget


def drive(budget: FeedbackBudget, steps: int, fixed: float, per_row: float, decoding: int = 8) -> list[float]:
    """Seconds of ``steps`` steps of a machine with prompts without end."""
    seconds = []
    for _ in range(steps):
        prompt = max(0, budget.rows(decoding, 10_000) - decoding)
        seconds.append(fixed + per_row * (decoding + prompt))
        budget.observe(seconds[-1], decoding, prompt)
    return seconds


@pytest.mark.parametrize("start", [16, 256, 4096])
def test_the_mean_step_settles_at_the_goal(start: int) -> None:
    budget = FeedbackBudget(0.1, start=start)
    drive(budget, 300, 0.02, 2e-4)
    seconds = drive(budget, 500, 0.02, 2e-4)
    assert sum(seconds) / len(seconds) == pytest.approx(0.1, rel=0.1)
    assert max(seconds) < 0.13
    slower = drive(budget, 600, 0.02, 8e-4)[100:]
    assert sum(slower) / len(slower) == pytest.approx(0.1, rel=0.15)


def test_a_goal_that_cannot_be_met_gives_the_least_and_one_that_is_easy_the_most() -> None:
    hard, easy = FeedbackBudget(0.01), FeedbackBudget(10.0, high=1000)
    drive(hard, 200, 0.02, 2e-4)
    drive(easy, 200, 0.02, 2e-4)
    assert (hard.rows(8, 0), easy.rows(8, 0)) == (16, 1000)


def test_steps_that_nobody_waits_for_and_small_steps_change_nothing() -> None:
    budget = FeedbackBudget(0.1)
    for _ in range(100):
        budget.observe(5.0, 0, 256)
    assert budget.rows(0, 0) == 256
    budget = FeedbackBudget(0.1)
    for _ in range(100):
        budget.observe(0.02, 8, 0)
    assert budget.rows(0, 0) == 256


@pytest.mark.parametrize(
    "bad", [{"goal": 0.0}, {"goal": float("nan")}, {"goal": 1.0, "low": 0}, {"goal": 1, "start": 9}]
)
def test_what_cannot_be_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be above 0 seconds"):
        FeedbackBudget(**bad)  # type: ignore[arg-type]
