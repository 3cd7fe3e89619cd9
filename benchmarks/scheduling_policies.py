"""The policies of the scheduling study: how many rows a step may have, and which requests are let in.

A budget sits in the seam of ``serve.scheduler.Budget``; the study also tells it what happened (``observe``) and lets it
ask what is coming (``coming``: prompt tokens expected in the next ``seconds``; nothing for those that do not forecast).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deepseek.serve.backlog import Backlog
from deepseek.serve.budget import FeedbackBudget

Coming = Callable[[float], float]  #: prompt tokens expected within so many seconds from now


@dataclass(frozen=True)
class Slo:
    """Seconds to the first token, and mean seconds between tokens, that a request must keep to count."""

    ttft: float
    tpot: float


class Static:
    """Always ``most`` rows."""

    def __init__(self, most: int) -> None:
        self.most, self.speed = most, 0.0

    def rows(self, decoding: int, waiting_rows: int) -> int:
        return self.most

    def observe(self, seconds: float, decoding: int, prompt_rows: int) -> None:
        pass


class Feedback(FeedbackBudget):
    """What ships (``serve.budget``), with nine tenths of the objective as its goal."""

    def __init__(self, slo: Slo) -> None:
        super().__init__(0.9 * slo.tpot)
        self.speed = 0.0  # prompt tokens and decoding rows per second while prompts wait; the study tells it


class Forecasting(Feedback):
    """Feedback, bent by what is coming: before a rush prompts get more than the TPOT goal allows, so that the queue is
    short when it comes; when little is coming they get only what empties the queue in time, and answers run faster."""

    def __init__(self, slo: Slo, coming: Coming, floor: float = 0.25, most: float = 4.0) -> None:
        super().__init__(slo)
        self.coming, self.horizon, self.floor, self.limit = coming, slo.ttft / 2, floor, most

    def rows(self, decoding: int, waiting_rows: int) -> int:
        most = super().rows(decoding, waiting_rows)
        if not self.speed:
            return most
        wanted = waiting_rows + decoding + self.coming(self.horizon)
        pressure = wanted / (self.speed * self.horizon)
        return round(min(self.high, max(self.low, most * min(self.limit, max(self.floor, pressure)))))


class Everybody:
    """No request is refused."""

    def admits(self, prompt: int, waiting: int, backlog_rows: int, speed: float) -> bool:
        return True


class Cap:
    """Refuses when ``most`` requests wait already: the bounded queue."""

    def __init__(self, most: int) -> None:
        self.most = most

    def admits(self, prompt: int, waiting: int, backlog_rows: int, speed: float) -> bool:
        return waiting < self.most


class Wait:
    """Refuses who would wait too long, by the backlog of prompt rows and the measured speed of computing them.

    Args:
        lenient: an engine without a backlog takes every prompt, also one that takes longer than allowed by itself.
    """

    def __init__(self, slo: Slo, share: float = 0.8, *, lenient: bool = False) -> None:
        self.limit, self.lenient = slo.ttft * share, lenient

    def admits(self, prompt: int, waiting: int, backlog_rows: int, speed: float) -> bool:
        if not speed or (self.lenient and not backlog_rows):
            return True
        return (backlog_rows + prompt) / speed <= self.limit


class Account(Wait):
    """``Wait`` as a front end can do it, which sees no step, only what the engine tells of it (``serve.backlog``).
    What ships is the lenient one.

    Args:
        look: brings ``backlog`` up to date.
    """

    def __init__(self, slo: Slo, backlog: Backlog, look: Callable[[], None], *, lenient: bool) -> None:
        super().__init__(slo, lenient=lenient)
        self.backlog, self.look = backlog, look

    def admits(self, prompt: int, waiting: int, backlog_rows: int, speed: float) -> bool:
        self.look()
        return super().admits(prompt, waiting, self.backlog.left, self.backlog.speed)


class Whole(Wait):
    """The account of a front end that is told nothing: whole prompts that have had no answer yet, and how fast prompts
    began to be answered. What shipped before ``Account``."""

    weight = 0.3

    def __init__(self, slo: Slo, clock: Callable[[], float]) -> None:
        super().__init__(slo)
        self.tokens, self.speed = 0, 0.0
        self._window, self._clock = slo.ttft / 4, clock
        self._since, self._done = 0.0, 0

    def enter(self, tokens: int) -> None:
        if not self.tokens:
            self._since, self._done = self._clock(), 0
        self.tokens += tokens

    def begin(self, tokens: int) -> None:
        self.tokens -= tokens
        self._done += tokens
        span = self._clock() - self._since
        if self.tokens and span >= self._window:
            speed = self._done / span
            self.speed += (self.weight if self.speed else 1.0) * (speed - self.speed)
            self._since, self._done = self._clock(), 0

    def admits(self, prompt: int, waiting: int, backlog_rows: int, speed: float) -> bool:
        return not (self.tokens and self.speed) or (self.tokens + prompt) / self.speed <= self.limit


class ForecastWait(Wait):
    """``Wait``, and before a rush long prompts are refused to keep room for several short ones."""

    def __init__(self, slo: Slo, coming: Coming) -> None:
        super().__init__(slo)
        self.coming, self.horizon = coming, slo.ttft

    def admits(self, prompt: int, waiting: int, backlog_rows: int, speed: float) -> bool:
        if not speed:
            return True
        load = max(1.0, (backlog_rows + self.coming(self.horizon)) / (speed * self.horizon))
        return (backlog_rows + prompt * load) / speed <= self.limit
