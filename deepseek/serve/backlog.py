"""How long a new prompt would wait for its first token: the rows of prompts before it, over the speed of the engine.

A queue that is bounded by a number of requests is too short when prompts are short, or too long when they are long; one
that is bounded by the wait is right for both. The scheduling study says how much that is worth
(``docs/scheduling-study.md``). The engine tells after every step how many rows are left and how many it has computed
(``EngineStats.prompt_rows``, ``rows``); what it has not taken yet, whoever keeps this account knows.
"""

from __future__ import annotations


class Backlog:
    """Rows of prompts that are left, and the speed at which rows are computed.

    Speed is measured only while prompts are left over, in windows of at least ``window`` seconds: a prompt alone does
    not show what the engine can do. What the prefix cache held counts as done.

    Attributes:
        left: rows of prompts that wait to be computed, of all who were let in.
        speed: rows per second, of prompts and answers; 0: not known yet.
    """

    weight = 0.3  #: of the newest window

    def __init__(self, window: float) -> None:
        self.left, self.speed = 0, 0.0
        self._window = window
        self._since, self._rows = 0.0, 0

    def look(self, at: float, left: int, rows: int) -> None:
        """``left`` rows of prompts are left now; ``rows`` rows had been computed in all at ``at``, the end of a step.

        Called at least as often as prompts come and begin to be answered. ``at`` is in seconds, of any clock.
        """
        span = at - self._since
        if not (self.left and left) or rows < self._rows or span < 0:
            self._since, self._rows = at, rows
        elif span >= self._window:
            speed = (rows - self._rows) / span
            self.speed += (self.weight if self.speed else 1.0) * (speed - self.speed)
            self._since, self._rows = at, rows
        self.left = left

    def wait(self, tokens: int) -> float:
        """Seconds until a prompt of ``tokens`` that came now had its first output; 0 where nobody waits."""
        return (self.left + tokens) / self.speed if self.left and self.speed else 0.0
