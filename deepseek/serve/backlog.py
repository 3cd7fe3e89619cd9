"""How long a new prompt would wait for its first token, from how fast the prompts ahead of it began to be answered.

A queue that is bounded by a number of requests is too short when prompts are short, or too long when they are long; one
that is bounded by the wait is right for both. The scheduling study says how much that is worth
(``docs/scheduling-study.md``). The front end can keep this account alone: what it submitted, and when answers began.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Backlog:
    """Prompt tokens that wait for their first output, and the speed at which they get it.

    Speed is measured only while prompts are left over, in windows of at least ``window`` seconds: a prompt alone does
    not show what the engine can do. What the prefix cache held counts as done.
    """

    weight = 0.3  #: of the newest window

    def __init__(self, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.tokens = 0
        self.speed = 0.0  #: tokens per second; 0: not known yet
        self._window, self._clock = window, clock
        self._since, self._done = 0.0, 0

    def enter(self, tokens: int) -> None:
        """A prompt begins to wait."""
        if not self.tokens:
            self._since, self._done = self._clock(), 0
        self.tokens += tokens

    def begin(self, tokens: int) -> None:
        """Its answer has begun."""
        self.tokens -= tokens
        self._done += tokens
        span = self._clock() - self._since
        if self.tokens and span >= self._window:
            speed = self._done / span
            self.speed += (self.weight if self.speed else 1.0) * (speed - self.speed)
            self._since, self._done = self._clock(), 0

    def leave(self, tokens: int) -> None:
        """It went without an answer."""
        self.tokens -= tokens

    def wait(self, tokens: int) -> float:
        """Seconds until a prompt of ``tokens`` that came now had its first output; 0 where nobody waits."""
        return (self.tokens + tokens) / self.speed if self.tokens and self.speed else 0.0
