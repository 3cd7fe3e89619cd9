"""The bounded queue: who is let in, who is told to come back, and when.

The engine runs ``max_running`` sequences and ``max_waiting`` more may stand behind them. A request that does not fit is
refused at once, before anything is parsed or tokenised: an unbounded queue only turns overload into time-outs. One that
alone is larger than the whole queue is let in when nothing else is there.

``Retry-After`` is how long the sequences ahead take at the rate of the last half minute.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

from deepseek.serve.server.errors import ApiError

MEMORY = 30.0  #: seconds over which the rate of finished sequences is taken
LONGEST_WAIT = 60  #: seconds; a client is never told to stay away longer


class Admission:
    """Counts the sequences inside. ``enter`` and ``leave`` belong together.

    Attributes:
        inside: sequences let in and not finished.
        draining: nobody is let in any more.
    """

    def __init__(
        self, max_running: int, max_waiting: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.capacity = max_running + max_waiting
        self.inside, self.draining = 0, False
        self._clock = clock
        self._finished: deque[tuple[float, int]] = deque()  #: of the last ``MEMORY`` seconds
        self._lately = 0  #: sequences in it
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self, sequences: int = 1) -> None:
        """Let ``sequences`` in. Raises as ``check``."""
        self.check(sequences)
        self.inside += sequences
        self._empty.clear()

    def check(self, sequences: int = 1) -> None:
        """Raises ``ApiError``: 429 when ``sequences`` more find the queue full, 503 while draining."""
        if self.draining:
            raise ApiError(
                "this server is shutting down; another one, or this one after its restart, will answer",
                503,
                code="draining",
                headers={"retry-after": "1", "connection": "close"},
            )
        if self.inside and self.inside + sequences > self.capacity:
            wait = self.retry_after()
            raise ApiError(
                f"{self.inside:,} sequences are running or waiting, and the queue holds {self.capacity:,}; "
                f"try again in {wait} s",
                429,
                code="queue_full",
                headers={"retry-after": str(wait)},
            )

    def more(self, sequences: int) -> None:
        """As ``enter``, for a request that is inside with one and turns out to have more."""
        if sequences > 1:
            self.inside -= 1
            try:
                if not self.draining:  # it was let in before
                    self.check(sequences)
            finally:
                self.inside += 1
            self.inside += sequences - 1

    def leave(self, sequences: int, done: bool = True) -> None:
        """``sequences`` are over; ``done``: by themselves, so that they tell how fast the engine is."""
        self.inside -= sequences
        if done:
            self._finished.append((self._clock(), sequences))
            self._lately += sequences
            self._forget()
        if self.inside == 0:
            self._empty.set()

    def retry_after(self) -> int:
        """Whole seconds until one that is refused now may find room."""
        now = self._forget()
        if not self._lately:
            return 5
        span = max(1.0, now - self._finished[0][0])
        ahead = max(1, self.inside - self.capacity // 2)
        return max(1, min(LONGEST_WAIT, math.ceil(ahead * span / self._lately)))

    def _forget(self) -> float:
        """Drop what is too long ago; the time now."""
        now = self._clock()
        while self._finished and self._finished[0][0] < now - MEMORY:
            self._lately -= self._finished.popleft()[1]
        return now

    async def emptied(self) -> None:
        """Until nobody is inside."""
        await self._empty.wait()
