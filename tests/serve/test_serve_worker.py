"""The real engine in a process of its own: the same answers, and nothing left after aborts and a kill."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path

import pytest
from engine_models import save_tiny

from deepseek.config import replace
from deepseek.errors import ConfigError, DeepseekError, EngineError, RequestError
from deepseek.serve.client import LocalClient, ProcessClient, Supervision
from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.request import Output, Request
from deepseek.serve.sampler import SamplingConfig
from deepseek.serve.stream import join

CONFIG = EngineConfig(device="cpu", precision="fp32", memory_gib=0.01, max_running=16, deterministic=True)
GREEDY = SamplingConfig(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("worker") / "model")


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine.load(model, CONFIG)


def prompts(n: int) -> list[tuple[int, ...]]:
    rng = random.Random(5)
    return [tuple(rng.randrange(6, 320) for _ in range(rng.randrange(1, 60))) for _ in range(n)]


async def collect(c: LocalClient | ProcessClient, request: Request) -> Output:
    return join([o async for o in c.generate(request)])


def answer(output: Output) -> list[int]:
    """What `Engine.generate` gives of it: a stream names the token that ended it, a completion leaves it out."""
    return list(output.tokens[:-1] if isinstance(output.stop, int) else output.tokens)


async def nothing_used(c: LocalClient | ProcessClient) -> None:
    end = time.monotonic() + 60
    while c.stats().running or c.stats().waiting or c.stats().pages_used:
        assert time.monotonic() < end, c.stats()
        await asyncio.sleep(0.01)


def test_answers_are_those_of_the_engine_alone_before_and_after_a_kill(model: Path, engine: Engine) -> None:
    asked = prompts(24)
    want = [c.tokens for c in engine.generate(asked, GREEDY)]
    assert len(set(map(tuple, want))) > 12

    async def test() -> None:
        async with ProcessClient(model, CONFIG, Supervision(backoff=0.05)) as c:
            assert c.info == engine.info
            for again in range(2):
                found = await asyncio.gather(
                    *(collect(c, Request(f"{i}", p, GREEDY)) for i, p in enumerate(asked))
                )
                assert [answer(o) for o in found] == want
                await nothing_used(c)
                if not again:
                    assert c.pid is not None
                    os.kill(c.pid, signal.SIGKILL)
            with pytest.raises(RequestError):
                await collect(c, Request("long", (7,) * 300, GREEDY))

    asyncio.run(test())


def test_a_path_with_nothing_in_it_raises_what_the_engine_raises(tmp_path: Path) -> None:
    with pytest.raises(DeepseekError) as want:
        Engine.load(tmp_path, CONFIG)

    async def test() -> None:
        c = ProcessClient(tmp_path, CONFIG)
        with pytest.raises(type(want.value)) as got:
            await c.start()
        assert str(got.value) == str(want.value)
        await c.close()

    asyncio.run(test())


def test_random_aborts_leave_no_page(engine: Engine) -> None:
    rng = random.Random(1)

    async def one(c: LocalClient, i: int) -> None:
        prompt = tuple(rng.randrange(6, 320) for _ in range(rng.choice([1, 17, 90, 200])))
        stream = c.generate(Request(f"x{i}", prompt, SamplingConfig(max_tokens=50, seed=i)))
        try:
            for _ in range(rng.choice([0, 1, 3, 100])):
                await anext(stream, None)
        except EngineError:  # pragma: no cover
            raise
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    async def test() -> None:
        async with LocalClient(engine) as c:
            await asyncio.gather(*(one(c, i) for i in range(150)))
            await nothing_used(c)
            assert (await collect(c, Request("last", (9, 8, 7), GREEDY))).finish is not None

    asyncio.run(test())


def test_a_step_goal_changes_when_prompts_are_read_and_no_answer(model: Path, engine: Engine) -> None:
    asked = [*prompts(12), tuple(range(6, 200))]
    want = [c.tokens for c in engine.generate(asked, GREEDY)]
    for goal, few in ((1e-9, True), (1e9, False)):
        bound = Engine.load(model, replace(CONFIG, step_goal=goal))
        assert [c.tokens for c in bound.generate(asked, GREEDY)] == want
        assert bound.feedback is not None
        assert (bound.feedback.rows(1, 1) < 256) == few
    with pytest.raises(ConfigError, match="step_goal"):
        replace(CONFIG, step_goal=-1.0)
