"""The process layer on an engine without a model: what is promised when things go right, and when they go wrong."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import fake_engine
import pytest
from fake_engine import DIE, FACTORY, HANG, ODD, RAISE, REFUSE, SICK, FakeEngine, answer

from deepseek.errors import (
    ConfigError,
    DeepseekError,
    EngineError,
    MissingExtraError,
    RequestError,
    WeightsError,
)
from deepseek.serve.client import (
    EngineBusy,
    EngineDraining,
    EngineLost,
    LocalClient,
    ProcessClient,
    Supervision,
)
from deepseek.serve.request import Output, Request
from deepseek.serve.sampler import SamplingConfig
from deepseek.serve.stream import join

#: Nobody is taken for hung only because this machine is busy; tests of hung processes are quicker to.
PATIENT = {"backoff": 0.05, "beat_limit": 60.0, "first_limit": 60.0, "kill_after": 600.0}
QUICK = {"beat_limit": 0.4, "first_limit": 0.4}


def client(path: str = "fake:", **rules: Any) -> ProcessClient:
    return ProcessClient(path, supervision=Supervision(**{**PATIENT, **rules}), factory=FACTORY)


def request(id: str, n: int = 5, first: int = 1, **options: Any) -> Request:
    return Request(id, (first, len(id), 3), SamplingConfig(max_tokens=n), **options)


def want(r: Request) -> tuple[int, ...]:
    return tuple(answer(r, i) for i in range(r.sampling.max_tokens))


async def collect(c: Any, r: Request) -> Output:
    outputs = []
    async with aclosing(c.generate(r)) as stream:
        async for output in stream:
            assert output.id == r.id
            outputs.append(output)
    return join(outputs)


async def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.005)


async def unready(c: Any) -> str:
    """Why it is not ready, once it is not."""
    told: list[str] = []
    await until(lambda: told or told.extend(why for ready, why in [c.readiness()] if not ready))
    return told[0]


def held() -> tuple[set[str], int, list[str]]:
    """Children, file descriptors and threads of this process."""
    gc.collect()
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    threads = sorted(t.name for t in threading.enumerate())
    return set(children), len(list(Path("/proc/self/fd").iterdir())), threads


def more_than(before: tuple[set[str], int, list[str]]) -> str:
    """What is held now and was not before; nothing: ``""``."""
    (was, open_then, running), (now, open_now, threads) = before, held()
    new = [*sorted(now - was), *(Counter(threads) - Counter(running)).elements()]
    return ", ".join([*new, *([f"{open_now - open_then} files"] if open_now > open_then else [])])


def run(test: Coroutine[Any, Any, Any]) -> Any:
    """``test`` in a loop of its own, after which nothing of it is left."""
    before = held()

    async def guarded() -> Any:
        found = await asyncio.wait_for(test, 300)
        left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        assert not left, f"tasks left behind: {left}"
        return found

    found = asyncio.run(guarded())
    end = time.monotonic() + 60  # what ends beside us needs a moment; what other tests left may end meanwhile
    while left := more_than(before):
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.01)
    return found


async def local(test: Callable[[Any], Awaitable[None]]) -> None:
    async with LocalClient(FakeEngine(step=0.001)) as c:
        await test(c)


async def process(test: Callable[[Any], Awaitable[None]]) -> None:
    async with client("fake:step=0.001") as c:
        await test(c)


both = pytest.mark.parametrize("where", [local, process])


# --- when things go right --------------------------------------------------------------------------------------------


@both
def test_five_hundred_at_once_get_their_own_answers(where: Any) -> None:
    async def test(c: Any) -> None:
        asked = [request(f"r{i}" * (i % 3 + 1), n=1 + i % 9) for i in range(500)]
        found = await asyncio.gather(*(collect(c, r) for r in asked))
        for r, output in zip(asked, found):
            assert (output.tokens, output.finish, output.prompt_tokens) == (want(r), "length", 3)
        assert c.readiness() == (True, "ready")
        await until(lambda: c.stats().running == 0)
        stats = c.stats()
        assert stats.generated_tokens == sum(r.sampling.max_tokens for r in asked)
        assert (stats.waiting, stats.pages_used) == (0, 0)

    run(where(test))


@both
def test_what_is_wrong_with_a_request_is_told_to_it_alone(where: Any) -> None:
    async def test(c: Any) -> None:
        good = asyncio.create_task(collect(c, request("good", 200)))
        with pytest.raises(RequestError, match="too long by 7") as told:
            await collect(c, request("bad", first=REFUSE))
        assert told.value.param == "prompt"
        with pytest.raises(EngineError, match="nobody thought of this"):
            await collect(c, request("odd", first=ODD))
        sick = await collect(c, request("sick", first=SICK))
        assert (sick.finish, sick.error) == ("error", "sick")
        assert (await good).tokens == want(request("good", 200))

    run(where(test))


@both
def test_thousands_of_aborts_leave_nothing(where: Any) -> None:
    rng = random.Random(0)

    async def one(c: Any, i: int) -> None:
        stream = c.generate(request(f"x{i}", n=100_000))
        for _ in range(rng.choice([0, 1, 1, 2, 5])):
            await stream.__anext__()
        if rng.random() < 0.5:
            await stream.aclose()
            return
        task = asyncio.create_task(stream.__anext__())
        await asyncio.sleep(rng.choice([0, 0, 0.002]))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await stream.aclose()

    async def test(c: Any) -> None:
        for start in range(0, 2000, 250):
            await asyncio.gather(*(one(c, i) for i in range(start, start + 250)))
        await until(lambda: c.stats().running == 0)
        assert c.stats().pages_used == 0
        assert not c._streams
        assert not c._queue
        assert not c._current.streams

    run(where(test))


@both
def test_an_id_may_come_again_and_late_outputs_of_the_first_do_not_reach_the_second(where: Any) -> None:
    async def test(c: Any) -> None:
        for i in range(30):
            first = Request("same", (i, 1), SamplingConfig(max_tokens=100_000))
            async with aclosing(c.generate(first)) as stream:
                await stream.__anext__()
            second = Request("same", (i, 2), SamplingConfig(max_tokens=3))
            assert (await collect(c, second)).tokens == want(second)

    run(where(test))


@both
def test_a_slow_reader_stalls_nobody_and_gets_everything_in_one_piece(where: Any) -> None:
    async def test(c: Any) -> None:
        slow = request("slow", 1000)
        async with aclosing(c.generate(slow)) as stream:
            outputs = [await stream.__anext__()]
            (held_stream,) = c._streams
            for i in range(10):
                assert (await collect(c, request(f"quick{i}", 20))).finish == "length"
                assert len(held_stream._held) <= 64
            await until(lambda: held_stream.ended)
            outputs.append(await stream.__anext__())
            assert outputs[-1].finish == "length"
            assert join(outputs).tokens == want(slow)
            assert join(outputs).text == "".join(f"{t} " for t in want(slow))

    run(where(test))


def test_a_front_end_that_stops_reading_holds_the_loop_instead_of_filling_memory() -> None:
    async def test() -> None:
        async with client("fake:") as c:
            task = asyncio.create_task(collect(c, request("a", 8000)))
            await until(lambda: c.stats().steps > 10)
            time.sleep(0.3)  # the event loop itself
            assert (await task).tokens == want(request("a", 8000))

    run(test())


@both
def test_a_drain_refuses_the_new_and_waits_for_the_old(where: Any) -> None:
    async def test(c: Any) -> None:
        short = asyncio.create_task(collect(c, request("short", 50)))
        endless = asyncio.create_task(collect(c, request("endless", 10**6)))
        await until(lambda: len(c._streams) == 2)
        drain = asyncio.create_task(c.drain(600))
        await until(lambda: not c.readiness()[0])
        assert c.readiness() == (False, "draining")
        with pytest.raises(EngineDraining):
            await collect(c, request("late"))
        assert (await short).tokens == want(request("short", 50))
        assert not drain.done()
        drain.cancel()
        await c.drain(0.1)
        assert (await endless).finish == "abort"
        await until(lambda: c.stats().running == 0)

    run(where(test))


def test_who_would_wait_too_long_for_a_first_token_is_refused_and_nobody_else() -> None:
    async def test() -> None:
        async with LocalClient(
            FakeEngine(step=0.02, slots=1), Supervision(first_token=1.0, max_crashes=0)
        ) as c:
            asked = [asyncio.create_task(collect(c, request(f"r{i}", 2))) for i in range(8)]
            await asyncio.gather(*asked)  # the speed is not known: all are taken
            while not c._backlog.speed:
                asked = [asyncio.create_task(collect(c, request(f"r{i}", 2))) for i in range(20)]
                await asyncio.gather(*asked)
            c._backlog.speed = 75.0  # tokens a second, on the machine of this test's numbers
            assert (await collect(c, Request("alone", (1,) * 4000, SamplingConfig(max_tokens=1)))).finish
            asked = [asyncio.create_task(collect(c, request(f"s{i}", 2))) for i in range(200)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            busy = [f for f in found if isinstance(f, EngineBusy)]
            assert 20 < len(busy) < 195
            assert all(b.seconds > 0.8 for b in busy)
            assert found[:5] == [f for f in found[:5] if isinstance(f, Output)]
            c._look()
            assert c._backlog.left == 0
            task = asyncio.create_task(collect(c, request("gone", 10**6)))
            await asyncio.sleep(0)
            assert c._backlog.left == 0, "it came to nobody"
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until(lambda: (c._look(), c._backlog.left == 0)[1])

    run(test())


def test_what_is_on_the_way_to_the_engine_is_counted_once() -> None:
    """A burst comes within one step: the engine's own account knows of it only after that step."""

    async def test() -> None:
        engine = FakeEngine(step=0.4)
        async with LocalClient(engine, Supervision(first_token=100.0, max_crashes=0)) as c:
            first = asyncio.create_task(collect(c, request("first", 3)))
            await until(lambda: c.stats().running == 1)
            begun = engine.steps
            await until(lambda: engine.steps > begun)
            await asyncio.sleep(0.1)  # in the middle of a step
            burst = [asyncio.create_task(collect(c, Request(f"b{i}", (7,) * 50, SamplingConfig(max_tokens=1))))
                     for i in range(10)]  # fmt: skip
            await asyncio.sleep(0)
            seen = []
            while not all(task.done() for task in burst):
                c._look()
                seen.append(c._backlog.left)
                await asyncio.sleep(0.005)
            assert seen[0] == 500
            assert set(seen[:-3]) <= {500, 501, 0}
            await asyncio.gather(first, *burst)
            c._look()
            assert c._backlog.left == 0
            assert sum(loop.on_the_way for loop in c._loops) == 0

    run(test())


@both
def test_closing_ends_what_runs(where: Any) -> None:
    async def test(c: Any) -> None:
        task = asyncio.create_task(collect(c, request("x", 100_000)))
        await until(lambda: c.stats().running == 1)
        await c.close()
        with pytest.raises(EngineError, match="closed"):
            await task
        with pytest.raises(EngineError, match="closed"):
            await collect(c, request("y"))
        assert not c.readiness()[0]

    run(where(test))


@pytest.mark.parametrize("after", [0.0, 0.1, 0.4])
def test_closing_in_the_middle_of_anything_leaves_nothing(after: float) -> None:
    """Of a start, of a restart and a reload at once: ``run`` looks at processes, descriptors, threads and tasks."""

    async def test() -> None:
        c = client("fake:load=0.3")
        start = asyncio.create_task(c.start())
        await asyncio.sleep(after)
        if not start.done():
            start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        await c.close()

        c = client("fake:load=0.1,step=0.01")
        await c.start()
        asked = [asyncio.create_task(collect(c, request(f"r{i}", 100_000))) for i in range(5)]
        await until(lambda: c.stats().running == 5)
        reload = asyncio.create_task(c.reload("fake:load=0.2"))
        await asyncio.sleep(0)
        assert c.pid is not None
        os.kill(c.pid, signal.SIGKILL)
        await asyncio.sleep(after)
        await c.close()
        found = await asyncio.gather(reload, *asked, return_exceptions=True)
        assert all(isinstance(f, EngineError) for f in found[1:])

    run(test())


def test_a_drain_waits_for_requests_that_are_tried_again() -> None:
    async def test() -> None:
        async with client("fake:step=0.3") as c:
            asked = request("r", 2)
            task = asyncio.create_task(collect(c, asked))
            await asyncio.sleep(0)
            assert c.pid is not None
            os.kill(c.pid, signal.SIGKILL)
            await c.drain(600)
            assert (await task).tokens == want(asked)

    run(test())


def test_requests_that_come_while_the_model_loads_wait_for_it() -> None:
    async def test() -> None:
        c = client("fake:load=0.5")
        with pytest.raises(EngineError, match="start"):
            await collect(c, request("early"))
        start = asyncio.create_task(c.start())
        await asyncio.sleep(0)
        assert c.readiness() == (False, "loading fake:load=0.5")
        with pytest.raises(EngineError, match="no model is loaded yet: loading"):
            _ = c.info
        expired = asyncio.create_task(collect(c, request("expired", deadline=0.01)))
        assert (await collect(c, request("a"))).tokens == want(request("a"))
        assert (await expired).finish in ("timeout", "length")
        assert (await start).name == c.info.name == "fake"
        await c.close()

    run(test())


def test_a_deadline_passes_for_those_that_wait_too() -> None:
    async def test() -> None:
        c = client("fake:load=3600")
        start = asyncio.create_task(c.start())
        await asyncio.sleep(0)
        assert (await collect(c, request("a", deadline=0.1))).finish == "timeout"
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        await c.close()

    run(test())


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind", "told"),
    [
        ("fake:fail=extra", MissingExtraError, r"\[serve\]"),
        ("fake:fail=crash", EngineError, r"SIGKILL\) while loading"),
        ("nonsense", EngineError, "AssertionError: nonsense"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_model_arrives_as_it_was_raised(
    path: str, kind: type[DeepseekError], told: str
) -> None:
    async def test() -> None:
        c = client(path)
        with pytest.raises(kind, match=told) as caught:
            await c.start()
        assert type(caught.value) is kind
        assert not c.readiness()[0]
        with pytest.raises(EngineError):
            await collect(c, request("a"))
        await c.close()

    run(test())


def test_a_factory_that_is_not_there_and_a_load_that_takes_too_long() -> None:
    async def test() -> None:
        c = ProcessClient("fake:", factory="fake_engine:nothing")
        with pytest.raises(ConfigError, match="no engine factory 'fake_engine:nothing'"):
            await c.start()
        await c.close()
        c = client("fake:load=60", load_limit=1.0)
        with pytest.raises(EngineError, match="not loaded after 1 s"):
            await c.start()
        await c.close()

    run(test())


# --- when the step process dies --------------------------------------------------------------------------------------


def test_kill_9_is_seen_at_once_and_nothing_that_had_not_begun_is_lost() -> None:
    """At once: by the process's end, long before its silence would tell."""

    async def test() -> None:
        async with client("fake:step=0.05,load=0.3") as c:
            begun = [asyncio.create_task(collect(c, request(f"b{i}", 100_000))) for i in range(4)]
            await until(lambda: all(s.started for s in c._streams) and len(c._streams) == 4)
            order: list[str] = []

            async def fresh(r: Request) -> Output:
                async with aclosing(c.generate(r)) as stream:
                    first = await stream.__anext__()
                    order.append(r.id)
                    return join([first, *[o async for o in stream]])

            asked = [request(f"f{i}", 3) for i in range(6)]
            waiting = [asyncio.create_task(fresh(r)) for r in asked]
            await asyncio.sleep(0)
            first_pid = c.pid
            os.kill(first_pid, signal.SIGKILL)
            assert "SIGKILL" in await unready(c)
            for task in begun:
                with pytest.raises(EngineLost, match=r"SIGKILL.*after a part of the answer"):
                    await task
            for r, output in zip(asked, await asyncio.gather(*waiting)):
                assert output.tokens == want(r)
            assert order == [r.id for r in asked]
            assert c.readiness() == (True, "ready")
            assert c.pid != first_pid

    run(test())


def test_an_error_of_the_engine_itself_ends_its_process_with_the_reason() -> None:
    async def test() -> None:
        async with client("fake:step=0.02") as c:
            other = asyncio.create_task(collect(c, request("other", 100_000)))
            await until(lambda: c.stats().running == 1)
            with pytest.raises(EngineError, match=r"logits are not finite.*so did 1 before it"):
                await collect(c, request("bad", first=RAISE))
            with pytest.raises(EngineError, match="logits are not finite"):
                await other
            assert (await collect(c, request("next"))).finish == "length"

    run(test())


def test_a_request_that_kills_is_tried_twice_and_takes_no_other_with_it() -> None:
    async def test() -> None:
        async with client("fake:step=0.02") as c:
            asked = [request(f"g{i}", 1) for i in range(8)]  # over as soon as begun
            asked[3] = request("poison", first=DIE)
            found = await asyncio.gather(*(collect(c, r) for r in asked), return_exceptions=True)
            assert "not tried again" in str(found.pop(3))
            del asked[3]
            assert [o.tokens for o in found] == [want(r) for r in asked]  # type: ignore[union-attr]
            assert len(c._crashes) == 2
            assert c.readiness()[0]

    run(test())


def test_processes_that_keep_dying_are_given_up_with_the_reason() -> None:
    async def test() -> None:
        async with client("fake:die_at=1", max_crashes=3) as c:

            async def ask(i: int) -> Output:
                return await collect(c, request(f"r{i}"))

            tasks = []
            for i in range(20):
                tasks.append(asyncio.create_task(ask(i)))
                await asyncio.sleep(0)
                with pytest.raises(EngineError):
                    await tasks[-1]
                if c._failed:
                    break
            ready, why = c.readiness()
            assert not ready
            assert "given up: its step process died 4 times" in why
            with pytest.raises(EngineError, match="given up"):
                await ask(99)
            assert c.pid is None
            # A model that works is the way out.
            assert (await c.reload("fake:name=good")).name == "good"
            assert (await ask(100)).finish == "length"

    run(test())


def test_a_hung_step_is_not_ready_and_may_come_back() -> None:
    async def test() -> None:
        async with client("fake:step=0.001", **QUICK) as c:
            task = asyncio.create_task(collect(c, request("x", 2000)))
            await until(lambda: c.stats().steps > 20)
            os.kill(c.pid, signal.SIGSTOP)
            try:
                assert "no sign of life" in await unready(c)
            finally:
                os.kill(c.pid, signal.SIGCONT)
            await until(lambda: c.readiness()[0])
            assert (await task).tokens == want(request("x", 2000))

    run(test())


def test_a_step_that_hangs_for_good_is_replaced(capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with client(kill_after=3.0, **QUICK) as c:
            with pytest.raises(EngineError, match="no sign of life for 3 s"):
                await collect(c, request("h", first=HANG))
            assert (await collect(c, request("next"))).finish == "length"

    run(test())
    assert "in step" in capfd.readouterr().err  # where it hung


def test_a_process_that_idles_stays_ready() -> None:
    async def test() -> None:
        async with client() as c:
            for _ in range(3):  # it goes on saying so
                silence = c._current.silence
                await until(lambda: silence() < 0.1)  # noqa: B023
                await until(lambda: silence() > 0.1)  # noqa: B023
            assert c.readiness() == (True, "ready")

    run(test())


PARENT = """
import asyncio, os, sys
sys.path[:0] = {paths!r}
from deepseek.serve.client import ProcessClient
from deepseek.serve.request import Request
from deepseek.serve.sampler import SamplingConfig

async def main():
    async with ProcessClient("fake:step=0.01", factory="fake_engine:load") as c:
        stream = c.generate(Request("a", ({first},), SamplingConfig(max_tokens=10000)))
        if {first} == 1:
            await stream.__anext__()
        else:
            task = asyncio.create_task(stream.__anext__())
            await asyncio.sleep(0.5)
        print(c.pid, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except OSError:
        return False


@pytest.mark.parametrize("first", [1, HANG])
def test_a_step_process_ends_with_its_parent(first: int) -> None:
    paths = [str(Path(fake_engine.__file__).parent), str(Path(__file__).parents[2])]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(paths=paths, first=first)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal, of a service manager
            os.kill(child, number)
        time.sleep(0.2)
        assert alive(child)
    finally:
        parent.kill()
        parent.communicate()
    end = time.monotonic() + 60
    while alive(child):
        assert time.monotonic() < end
        time.sleep(0.02)


# --- reload ----------------------------------------------------------------------------------------------------------


async def load_of(c: ProcessClient, stop: asyncio.Event, workers: int = 20) -> int:
    """Requests without a pause until told to stop; every one must be answered in full. How many."""
    done = 0

    async def one(w: int) -> None:
        nonlocal done
        i = 0
        while not stop.is_set():
            i += 1
            r = request(f"w{w}-{i}", 1 + i % 30)
            assert (await collect(c, r)).tokens == want(r)
            done += 1

    await asyncio.gather(*(one(w) for w in range(workers)))
    return done


@pytest.mark.parametrize("how", ["beside", "inplace"])
def test_a_reload_under_load_drops_nothing(how: str) -> None:
    async def test() -> None:
        async with client("fake:name=a,step=0.002", reload=how) as c:
            stop = asyncio.Event()
            load = asyncio.create_task(load_of(c, stop))
            long = asyncio.create_task(collect(c, request("long", 400)))
            await until(lambda: c.stats().generated_tokens > 100)
            pids = [c.pid]
            reload = asyncio.create_task(c.reload("fake:name=b,step=0.002"))
            await asyncio.sleep(0)
            with pytest.raises(EngineError, match="is being loaded: reload fake:name=c when"):
                await c.reload("fake:name=c")
            assert (await reload).name == c.info.name == "b"
            pids.append(c.pid)
            assert (await c.reload("fake:name=c,step=0.002")).name == "c"
            pids.append(c.pid)
            stop.set()
            assert await load > 40
            assert (await long).tokens == want(request("long", 400))
            await until(lambda: len(c._loops) == 1)
            assert [alive(p) for p in pids] == [False, False, True]
            assert c.stats().running == 0
            assert c.stats().generated_tokens > 400  # counters go on

    run(test())


@pytest.mark.parametrize("how", ["beside", "inplace"])
def test_a_reload_that_fails_leaves_the_old_model_serving(how: str) -> None:
    async def test() -> None:
        async with client("fake:name=a,step=0.002", reload=how) as c:
            stop = asyncio.Event()
            load = asyncio.create_task(load_of(c, stop))
            with pytest.raises(WeightsError, match="after 12 of 96 bytes"):
                await c.reload("fake:fail=weights")
            with pytest.raises(EngineError, match=r"SIGKILL\) while loading"):
                await c.reload("fake:fail=crash")
            await until(lambda: c.readiness()[0])
            assert c.info.name == "a"
            stop.set()
            assert await load > 0

    run(test())


def test_a_model_larger_than_the_free_memory_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(1 << 42)

    async def test() -> None:
        async with client() as c:
            with pytest.raises(EngineError, match=r"4096\.0 GiB of weights.*reload 'inplace'"):
                await c.reload(str(tmp_path))
            assert c.readiness()[0]

    run(test())


def test_the_old_process_dies_while_it_finishes() -> None:
    async def test() -> None:
        async with client("fake:name=a,step=0.02") as c:
            begun = asyncio.create_task(collect(c, request("begun", 5000)))
            await until(lambda: any(s.started for s in c._streams))
            old = c.pid
            await c.reload("fake:name=b")
            os.kill(old, signal.SIGKILL)
            with pytest.raises(EngineError, match="SIGKILL"):
                await begun
            assert c.readiness()[0]
            assert (await collect(c, request("x"))).finish == "length"
            assert not c._crashes

    run(test())


def test_a_local_client_fails_for_good_and_reloads_nothing() -> None:
    async def test() -> None:
        async with LocalClient(FakeEngine()) as c:
            with pytest.raises(EngineError, match="use ProcessClient"):
                await c.reload("fake:")
            with pytest.raises(EngineError, match="logits are not finite"):
                await collect(c, request("bad", first=RAISE))
            assert not c.readiness()[0]
            with pytest.raises(EngineError, match="given up"):
                await collect(c, request("next"))

    run(test())


@pytest.mark.parametrize("bad", [{"beat_limit": 0.0}, {"first_limit": 1.0}, {"load_limit": 0.0}])
def test_supervision_that_cannot_be_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"must|above"):
        Supervision(**bad)
