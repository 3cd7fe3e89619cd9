"""A budget of rows that holds an objective for the time between tokens, by feedback from the steps themselves.

Every row of a prompt that shares a step with answers delays their next tokens. ``StaticBudget`` bounds the rows and
leaves the time to the machine; this one bounds the time. How it fared against static numbers and forecasts of arrivals:
``docs/scheduling-study.md``, ``benchmarks/study_scheduling.py``.
"""

from __future__ import annotations

from deepseek.errors import ConfigError


class FeedbackBudget:
    """More rows after steps that were quicker than the goal, fewer after slower ones: additive increase, multiplicative
    decrease, as TCP shares a link (Chiu and Jain, 1989), on a moving average of the last few steps.

    The objective is a mean over an answer, so single steps may take longer; steps without answers count for nothing.

    Attributes:
        goal: seconds that a step may take in the mean while answers wait for their next token.
        low, high: bounds of the rows per step; start: rows of the first.
    """

    up, down = 16, 0.9
    weight = 0.2  #: of the newest step in the mean

    def __init__(self, goal: float, start: int = 256, low: int = 16, high: int = 4096) -> None:
        if not goal > 0 or not 1 <= low <= start <= high:
            raise ConfigError(
                f"goal={goal} must be above 0 seconds, and low={low}, start={start}, high={high} must rise from 1"
            )
        self.goal, self.low, self.high = goal, low, high
        self._most = float(start)
        self._mean = 0.0

    def rows(self, decoding: int, waiting_rows: int) -> int:
        """The seam of ``scheduler.Budget``."""
        return round(self._most)

    def observe(self, seconds: float, decoding: int, prompt_rows: int) -> None:
        """A step of ``decoding`` rows of answers and ``prompt_rows`` rows of prompts took ``seconds``."""
        self._mean = self._mean + self.weight * (seconds - self._mean) if self._mean else seconds
        if not decoding:
            return
        if self._mean > self.goal:
            self._most = max(self.low, self._most * self.down)
        elif prompt_rows + decoding >= 0.9 * self._most:  # it was the budget that bound it
            self._most = min(self.high, self._most + self.up)
