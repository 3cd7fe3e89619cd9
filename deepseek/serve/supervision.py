"""Keeping an engine served over the deaths, hangs and replacements of the step loops that compute it.

A client has one current step loop, which gets what is new, and perhaps older ones, which finish what they have. When a
step process dies, an answer that has begun ends with ``EngineLost``; a request that has not begun is given to the next
process, in the original order, one at a time until each has begun: so a request that kills every engine it meets does
so alone, and is given up at the second (``EngineCrashed``). Processes that keep dying are given up too, with the
reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, Literal

from deepseek.config import configclass
from deepseek.errors import ConfigError, DeepseekError, EngineError
from deepseek.serve.backlog import Backlog
from deepseek.serve.request import EngineStats, ModelInfo, Output, Request
from deepseek.serve.step_process import StepLoop
from deepseek.serve.stream import Stream

WARM = 16  #: steps after which nothing is compiled or captured any more
PROMISED = 0.8  #: share of ``first_token`` that the expected wait may take: it is only expected
GAUGES = ("running", "waiting", "pages_total", "pages_used", "prompt_rows")


class EngineDraining(EngineError):
    """New requests are refused: the server is about to stop."""


class EngineLost(EngineError):
    """The step process died with a request that it had begun, or was about to: nothing says that it was the cause."""


class EngineCrashed(EngineError):
    """Step processes died one after the other with this request, before it had begun: it may well be the cause."""


class EngineReloading(EngineError):
    """A reload is refused: another one is under way."""


class EngineBusy(EngineError):
    """The first token would come later than ``Supervision.first_token`` allows: about ``seconds`` from now."""

    def __init__(self, seconds: float, limit: float) -> None:
        super().__init__(
            f"the first token would come in about {seconds:.1f} s, and at most {limit:g} s are promised; try later"
        )
        self.seconds, self.limit = seconds, limit


@configclass
class Supervision:
    """When a step process counts as hung or lost, and what is done about it. All times in seconds.

    Attributes:
        beat_limit: a step longer than this makes the server not ready; first_limit: the same for the first steps,
            in which kernels are compiled and graphs captured.
        kill_after: a step longer than this is ended, and the process replaced; 0: never.
        load_limit: a model that takes longer to load is given up.
        max_crashes, window: so many deaths within so long, and the engine is given up.
        backoff: before the second restart; doubles with every further one. The first is at once.
        trial: how long requests wait for one that was there when a step process died to begin its answer.
        first_token: a request whose first token is expected later than this is refused at once (``EngineBusy``);
            0: all are taken.
        reload: 'beside' loads a new model next to the old one and needs memory for both; 'inplace' lets running
            requests finish, holds new ones back, and then loads.
    """

    beat_limit: float = 10.0
    first_limit: float = 120.0
    kill_after: float = 60.0
    load_limit: float = 900.0
    max_crashes: int = 5
    window: float = 300.0
    backoff: float = 1.0
    trial: float = 10.0
    first_token: float = 0.0
    reload: Literal["beside", "inplace"] = "beside"

    def check(self) -> None:
        if self.beat_limit <= 0 or self.first_limit < self.beat_limit or self.load_limit <= 0:
            raise ConfigError(
                f"beat_limit={self.beat_limit} must be above 0, first_limit={self.first_limit} at least as much, "
                f"load_limit={self.load_limit} above 0"
            )


class SupervisedClient(ABC):
    """Requests, and the step loops that work on them: the newest takes what is new, older ones finish."""

    retries = 1

    def __init__(self, path: str, supervision: Supervision) -> None:
        self._path, self._rules = path, supervision
        self._current: StepLoop | None = None
        self._loops: set[StepLoop] = set()  # alive
        self._spawned: set[StepLoop] = set()  # alive, or not yet seen to be gone altogether
        self._streams: set[Stream] = set()
        self._queue: deque[Stream] = deque()  # not given to any loop, in order of arrival
        self._trial: tuple[Stream, float] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._recovery: asyncio.Task[None] | None = None
        self._crashes: deque[float] = deque()
        self._backlog = Backlog(window=max(0.05, supervision.first_token / 20))
        self._past = EngineStats()  # of loops that are gone
        self._info: ModelInfo | None = None
        self._state = ""
        self._reloading = ""
        self._failed: EngineError | None = None
        self._draining = self._closed = False
        self.given_up = (
            asyncio.Event()
        )  #: nothing will be answered any more, for the reason that ``readiness`` gives

    @abstractmethod
    def _spawn(self, path: str) -> StepLoop:
        """A new loop that begins to load the model at ``path``."""

    # what a server calls

    async def start(self) -> ModelInfo:
        """Loads the model. Raises what loading it raised; requests that came meanwhile wait for it."""
        if self._state:
            raise EngineError("start() is called once")
        self._state = f"loading {self._path}"
        self._task(self._watch())
        try:
            loop = await self._load(self._path)
        except DeepseekError as error:
            self._give_up(EngineError(str(error)))
            raise
        return self._adopt(loop, self._path)

    async def __aenter__(self) -> Any:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def info(self) -> ModelInfo:
        if self._info is None:
            raise self._failed or EngineError(f"no model is loaded yet: {self._state or 'start() it first'}")
        return self._info

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        if self._failed or self._closed or not self._state:
            raise self._failed or EngineError("the engine was closed" if self._closed else "start() it first")
        if self._draining:
            raise EngineDraining("the server is stopping and takes no new requests")
        limit = self._rules.first_token
        self._look()
        if limit and (wait := self._backlog.wait(len(request.prompt))) > PROMISED * limit:
            raise EngineBusy(wait, limit)
        stream = Stream(request)
        stream.settled = functools.partial(self._settled, stream)
        self._streams.add(stream)
        self._queue.append(stream)
        self._pump()
        try:
            while True:
                output = await stream.take()
                yield output
                if output.finish is not None:
                    return
        finally:
            self._leave(stream)

    def readiness(self) -> tuple[bool, str]:
        if self._failed:
            return False, str(self._failed)
        if self._closed or self._draining:
            return False, "closed" if self._closed else "draining"
        loop = self._current
        if loop is None:
            return False, self._state or "not started"
        if how := loop.exited():
            return False, f"the step process ended ({how})"
        silence = loop.silence()
        if silence > (self._rules.first_limit if loop.beat.steps < WARM else self._rules.beat_limit):
            return False, f"the step loop gave no sign of life for {silence:.1f} s"
        return True, "ready"

    def stats(self) -> EngineStats:
        total = _added(self._past, *(loop.stats() for loop in self._loops))
        return dataclasses.replace(total, waiting=total.waiting + len(self._queue))

    async def reload(self, path: str) -> ModelInfo:
        if self._closed or self._draining:
            raise EngineDraining(f"no reload of {path}: the server is stopping")
        if self._reloading:
            raise EngineReloading(f"{self._reloading} is being loaded: reload {path} when that is done")
        self._reloading = path
        # Whoever asked may go away: a reload that has begun is finished.
        return await asyncio.shield(self._task(self._replace(path)))

    async def drain(self, seconds: float) -> None:
        self._draining = True
        until = time.monotonic() + seconds
        while self._streams and time.monotonic() < until:
            await asyncio.sleep(0.01)
        for stream in list(self._streams):
            self._end(stream, "abort")
        await asyncio.sleep(0)  # their consumers see it before anything is closed

    async def close(self) -> None:
        self._closed = True
        tasks = [t for t in self._tasks if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in list(self._streams):
            stream.fail(self._failed or EngineError("the engine was closed"))
        await asyncio.gather(*(self._discard(loop) for loop in list(self._spawned)))
        self._current = None

    # requests

    def _pump(self) -> None:
        """Gives the current loop what waits. What saw an engine die goes alone, until it has begun to answer."""
        while self._queue and self._current is not None and not self._current.gone:
            if self._trial is not None:
                stream, until = self._trial
                if not (stream.started or stream.ended) and time.monotonic() < until:
                    return
                self._trial = None
            stream = self._queue.popleft()
            if stream.attempts:
                self._trial = stream, time.monotonic() + self._rules.trial
            self._current.submit(stream)

    def _settled(self, stream: Stream) -> None:
        """It has begun, or ended."""
        self._look()
        self._pump()

    def _look(self) -> None:
        """Keep the account of waiting prompts."""
        if not self._rules.first_token:
            return
        stats = self.stats()
        left = stats.prompt_rows + sum(loop.on_the_way for loop in self._loops)
        left += sum(len(stream.request.prompt) for stream in self._queue)
        told = max((loop.told for loop in self._loops), default=0.0)
        self._backlog.look(told, left, stats.rows)

    def _leave(self, stream: Stream) -> None:
        """Its consumer has all of it, or has gone."""
        self._streams.discard(stream)
        if not stream.ended:
            self._forget(stream)

    def _end(self, stream: Stream, finish: Literal["abort", "timeout"]) -> None:
        self._forget(stream)
        stream.push(Output(stream.request.id, finish=finish, prompt_tokens=len(stream.request.prompt)))

    def _forget(self, stream: Stream) -> None:
        for loop in self._loops:
            loop.abort(stream)
        with contextlib.suppress(ValueError):
            self._queue.remove(stream)
        if self._trial is not None and self._trial[0] is stream:
            self._trial = None
            self._pump()

    # step loops

    def _task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, path: str) -> StepLoop:
        """A loop whose model is loaded; nothing is left of one that could not."""
        loop = self._spawn(path)
        self._loops.add(loop)
        self._spawned.add(loop)
        try:
            await asyncio.wait_for(asyncio.shield(loop.loaded), self._rules.load_limit)
            return loop
        except asyncio.TimeoutError:
            await self._discard(loop, kill=True)
            raise EngineError(f"{path} was not loaded after {self._rules.load_limit:.0f} s") from None
        except BaseException:
            await self._discard(loop, kill=True)
            raise

    def _adopt(self, loop: StepLoop, path: str) -> ModelInfo:
        self._current, self._path, self._info = loop, path, loop.loaded.result()
        self._pump()
        return self._info

    async def _discard(self, loop: StepLoop, kill: bool = False) -> None:
        if kill:
            loop.kill()
        await loop.stop()
        self._spawned.discard(loop)
        self._bury(loop)

    def _bury(self, loop: StepLoop) -> None:
        if loop in self._loops:
            self._loops.discard(loop)
            self._past = _added(self._past, dataclasses.replace(loop.stats(), **dict.fromkeys(GAUGES, 0)))

    def _ended(self, loop: StepLoop) -> None:
        """A loop ended by itself. Called by it, with what it was working on still in ``streams``."""
        if self._closed:
            return
        self._bury(loop)
        self._task(self._discard(loop))
        self._trial = None
        how, again = loop.ending(), []
        for stream in sorted(loop.streams.values(), key=lambda s: s.arrived):
            if stream.started:
                stream.fail(EngineLost(f"{how} after a part of the answer"))
            elif stream.attempts > self.retries:
                stream.fail(
                    EngineCrashed(
                        f"{how}; so did {stream.attempts - 1} before it with this request: it is not tried again"
                    )
                )
            else:
                again.append(stream)
        self._queue = deque(sorted([*again, *self._queue], key=lambda s: s.arrived))
        if loop is self._current:
            self._current = None
            self._recovery = self._task(self._recover(how))
        else:
            self._pump()

    async def _recover(self, how: str) -> None:
        """Starts a step process in place of the one that died, again and again, until one stays or it is given up."""
        rules = self._rules
        while True:
            now = time.monotonic()
            self._crashes.append(now)
            while now - self._crashes[0] > rules.window:
                self._crashes.popleft()
            times = len(self._crashes)
            if times > rules.max_crashes:
                self._give_up(
                    EngineError(
                        f"the engine of {self._path} is given up: its step process died {times} times within "
                        f"{now - self._crashes[0]:.0f} s, the last time because {how}; start the server again "
                        "when the reason is mended"
                    )
                )
                return
            self._state = f"restarting: {how}"
            if times > 1:
                await asyncio.sleep(min(rules.backoff * 2 ** (times - 2), 30.0))
            try:
                loop = await self._load(self._path)
            except DeepseekError as error:
                how = str(error)
                continue
            self._adopt(loop, self._path)
            return

    def _give_up(self, error: EngineError) -> None:
        self._failed = error
        self.given_up.set()
        self._queue.clear()
        for stream in list(self._streams):
            if not any(stream.wire_id in loop.streams for loop in self._loops):
                stream.fail(EngineLost(str(error)) if stream.attempts else error)

    async def _replace(self, path: str) -> ModelInfo:
        """The work of ``reload``."""
        try:
            if self._rules.reload == "beside":
                _room_for(path)
                loop = await self._load(path)
                return self._take_over(loop, path)
            return await self._replace_in_place(path)
        finally:
            self._reloading = ""

    def _take_over(self, loop: StepLoop, path: str) -> ModelInfo:
        if self._recovery is not None:
            self._recovery.cancel()
        old, self._failed = self._current, None
        self.given_up.clear()
        self._crashes.clear()
        info = self._adopt(loop, path)
        if old is not None:
            self._task(self._retire(old))
        return info

    async def _replace_in_place(self, path: str) -> ModelInfo:
        if self._recovery is not None:
            self._recovery.cancel()
        old, self._current = self._current, None
        self._state = f"reloading {path}"
        if old is not None:
            await self._retire(old)
        try:
            return self._take_over(await self._load(path), path)
        except DeepseekError:
            self._recovery = self._task(self._recover(f"{path} could not be loaded"))
            self._crashes.clear()
            raise

    async def _retire(self, loop: StepLoop) -> None:
        """Lets it finish what it has, then ends it."""
        while loop.streams and not loop.gone:
            await asyncio.sleep(0.02)
        if not loop.gone:
            await self._discard(loop)

    async def _watch(self) -> None:
        """What nobody else would notice: hung steps, deadlines of requests that wait for a process, trials."""
        rules, told = self._rules, set[StepLoop]()
        while True:
            await asyncio.sleep(0.25)
            for loop in list(self._loops):
                young = loop.gone or loop.beat.steps < WARM
                limit = max(rules.first_limit, rules.kill_after) if young else rules.kill_after
                if loop.silence() > limit / 2 and loop not in told:
                    told.add(loop)
                    loop.dump()
                if rules.kill_after and loop.silence() > limit:
                    loop.error = EngineError(f"no sign of life for {loop.silence():.0f} s")
                    loop.kill()
            told &= self._loops
            for stream in [s for s in self._queue if (left := s.time_left()) is not None and left <= 0]:
                self._end(stream, "timeout")
            self._pump()
            self._look()


def _added(first: EngineStats, *others: EngineStats) -> EngineStats:
    return EngineStats(
        **{
            f.name: sum((getattr(o, f.name) for o in others), getattr(first, f.name))
            for f in dataclasses.fields(EngineStats)
        }
    )


def _room_for(path: str) -> None:
    """Raises ``EngineError`` where this machine's free memory is less than the weights alone."""
    place, meminfo = Path(path), Path("/proc/meminfo")
    files = [place] if place.is_file() else list(place.glob("*.safetensors")) if place.is_dir() else []
    size = sum(f.stat().st_size for f in files)
    with contextlib.suppress(OSError, IndexError):
        line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024
        if size > free:
            raise EngineError(
                f"{path} has {size / 2**30:.1f} GiB of weights, and {free / 2**30:.1f} GiB of memory are free beside "
                "the model that serves now: reload 'inplace', or free memory"
            )
