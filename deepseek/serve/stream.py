"""One request as the front end sees it: outputs come in from the step process, and are taken by one consumer.

A consumer that is slow costs nothing but its own text: what has not been taken is joined into one ``Output``, so that
a stream holds at most one answer, and no step ever waits for a reader.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from deepseek.serve.request import Output, Request

JOIN = 64  #: outputs held before they are joined into one
_numbers = itertools.count(1)


def join(outputs: Sequence[Output]) -> Output:
    """What ``outputs`` of one request, in order, say together."""
    if len(outputs) == 1:
        return outputs[0]
    first, last = outputs[0], outputs[-1]
    return replace(
        last,
        text="".join([o.text for o in outputs]),
        tokens=tuple(itertools.chain.from_iterable(o.tokens for o in outputs)),
        logprobs=tuple(itertools.chain.from_iterable(o.logprobs for o in outputs)),
        traces=tuple(itertools.chain.from_iterable(o.traces for o in outputs)),
        prompt_logprobs=next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None),
        embedding=next((o.embedding for o in outputs if o.embedding is not None), None),
        prompt_tokens=last.prompt_tokens or first.prompt_tokens,
        cached_tokens=last.cached_tokens or first.cached_tokens,
    )


class Stream:
    """The outputs of one request, from its arrival to its end.

    Attributes:
        wire_id: the engine's name for this attempt. Never used twice, so whatever arrives late for an aborted or
            lost attempt has no stream to go to.
        attempts: how many step processes have been given it.
        started: something of the answer has arrived, so it cannot be given to another step process any more.
        ended: its last output, or its error, has arrived.
        settled: called when it has started, and when it has ended.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.arrived = request, time.monotonic()
        self.wire_id, self.attempts = "", 0
        self.started = self.ended = False
        self.settled: Callable[[], None] = lambda: None
        self._held: list[Output] = []
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    def attempt(self) -> Request:
        """The request as the next step process gets it: a new name, and what is left of its time."""
        self.attempts += 1
        self.wire_id = f"{next(_numbers)}:{self.request.id}"
        left = self.time_left()
        return replace(self.request, id=self.wire_id, deadline=None if left is None else max(left, 0.0))

    def time_left(self) -> float | None:
        """Seconds until its deadline; ``None`` without one."""
        deadline = self.request.deadline
        return None if deadline is None else self.arrived + deadline - time.monotonic()

    def push(self, output: Output) -> None:
        if self.ended:
            return
        news = not self.started or output.finish is not None
        self.started, self.ended = True, output.finish is not None
        self._held.append(output)
        if len(self._held) >= JOIN:
            self._held = [join(self._held)]
        self._wake()
        if news:
            self.settled()

    def fail(self, error: BaseException) -> None:
        """Ends it: ``take`` raises ``error`` after what has already arrived."""
        if not self.ended:
            self.ended, self._error = True, error
            self._wake()
            self.settled()

    async def take(self) -> Output:
        """Everything that has arrived since the last call, joined; waits for it where there is nothing."""
        while not self._held:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        held, self._held = self._held, []
        return join(held)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
