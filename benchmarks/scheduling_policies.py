"""The policies of the scheduling study: how many rows a step may have, and which requests are let in.

A budget sits in the seam of ``serve.scheduler.Budget``; the study also tells it what happened (``observe``) and lets it
ask what is coming (``coming``: prompt tokens expected in the next ``seconds``; nothing for those that do not forecast).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


class Feedback:
    """Holds the mean step time at the TPOT goal: more rows after quick steps, fewer after slow ones (AIMD)."""

    def __init__(
        self, slo: Slo, start: int = 256, low: int = 16, high: int = 4096, goal: float = 0.9
    ) -> None:
        self.goal, self.low, self.high = slo.tpot * goal, low, high
        self.most = float(start)
        self.mean: float | None = None
        self.speed = 0.0  # prompt tokens and decoding rows per second while prompts wait; the study tells it

    def rows(self, decoding: int, waiting_rows: int) -> int:
        return round(self.most)

    def observe(self, seconds: float, decoding: int, prompt_rows: int) -> None:
        self.mean = seconds if self.mean is None else 0.8 * self.mean + 0.2 * seconds
        if not decoding:
            return  # nobody waits for a next token: prompts may take all they want
        if self.mean > self.goal:
            self.most = max(self.low, self.most * 0.9)
        elif prompt_rows + decoding >= 0.9 * self.most:
            self.most = min(self.high, self.most + 16)


class Forecasting(Feedback):
    """Feedback, bent by what is coming: before a rush prompts get more than the TPOT goal allows, so that the queue is
    short when it comes; when little is coming they get only what empties the queue in time, and answers run faster."""

    def __init__(self, slo: Slo, coming: Coming, floor: float = 0.25, most: float = 4.0) -> None:
        super().__init__(slo)
        self.coming, self.horizon, self.floor, self.limit = coming, slo.ttft / 2, floor, most

    def rows(self, decoding: int, waiting_rows: int) -> int:
        if not self.speed:
            return round(self.most)
        wanted = waiting_rows + decoding + self.coming(self.horizon)
        pressure = wanted / (self.speed * self.horizon)
        return round(min(self.high, max(self.low, self.most * min(self.limit, max(self.floor, pressure)))))


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
    """Refuses who would wait too long, by the backlog of prompt rows and the measured speed of computing them."""

    def __init__(self, slo: Slo, share: float = 0.8) -> None:
        self.limit = slo.ttft * share

    def admits(self, prompt: int, waiting: int, backlog_rows: int, speed: float) -> bool:
        return not speed or (backlog_rows + prompt) / speed <= self.limit


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
