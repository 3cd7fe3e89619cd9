"""The step process under attack, with the real engine: what is promised about it, counted.

    aborts   random aborts, by closing iterators and by cancelling tasks, at every moment of a request's life: pages,
             streams and running requests that are left afterwards
    kill     kill -9 of the step process, again and again, while requests run: seconds until ``readiness`` says no, and
             until it says yes again; what became of the requests
    reload   hot reloads of the same model, one after another, under load: requests that were dropped

    python benchmarks/robust_process.py MODEL [aborts kill reload] [--aborts 10000] [--kills 5] [--reloads 5]

MODEL is a run, a Hugging Face directory or a .gguf file. Prints a line of JSON for each; exit status 1 if one fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from typing import Any

from deepseek.errors import EngineError
from deepseek.serve.client import ProcessClient, Supervision
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.request import Request
from deepseek.serve.sampler import SamplingConfig


def prompt(rng: random.Random, c: ProcessClient, longest: int) -> tuple[int, ...]:
    n = rng.choice([1, 8, longest // 4, longest])
    return tuple(rng.randrange(c.info.vocab_size) for _ in range(max(1, n)))


async def aborts(c: ProcessClient, count: int, rng: random.Random) -> dict[str, Any]:
    """``count`` requests, 64 at a time, each aborted at a random moment or left to end."""
    longest = min(256, c.info.max_length // 2)
    room, ended = asyncio.Semaphore(64), Counter[str]()

    async def read(i: int, outputs: float) -> None:
        request = Request(f"a{i}", prompt(rng, c, longest), SamplingConfig(max_tokens=32, seed=i))
        stream = c.generate(request)
        try:
            seen = 0
            async for output in stream:
                seen += 1
                if output.finish:
                    ended[output.finish] += 1
                if seen >= outputs:
                    break
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    async def one(i: int) -> None:
        async with room:
            kind = rng.random()
            task = asyncio.ensure_future(read(i, rng.choice([1, 2, 8]) if kind < 0.6 else float("inf")))
            if kind > 0.7:
                await asyncio.sleep(rng.expovariate(20))
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    began = time.monotonic()
    await asyncio.gather(*(one(i) for i in range(count)))
    seconds = time.monotonic() - began
    await asyncio.sleep(1.0)
    stats = c.stats()
    left = {"pages": stats.pages_used, "running": stats.running, "waiting": stats.waiting}
    return {"test": "aborts", "requests": count, "ended": dict(ended), "left": left, "preemptions": stats.preemptions,
            "seconds": round(seconds, 1), "ok": not any(left.values()) and c.readiness()[0]}  # fmt: skip


async def kill(c: ProcessClient, count: int, rng: random.Random) -> dict[str, Any]:
    """Readiness and requests over ``count`` kills, 16 requests at a time."""
    found, noticed, back, stop = Counter[str](), list[float](), list[float](), asyncio.Event()

    async def work(w: int) -> None:
        i = 0
        while not stop.is_set():
            i += 1
            began = False
            try:
                request = Request(
                    f"k{w}-{i}", prompt(rng, c, 32), SamplingConfig(max_tokens=64, ignore_eos=True)
                )
                async for output in c.generate(request):
                    began = True
                    if output.finish:
                        found[output.finish] += 1
            except EngineError:
                found["error after a part of the answer" if began else "error before any"] += 1

    workers = [asyncio.ensure_future(work(w)) for w in range(16)]
    for _ in range(count):
        await asyncio.sleep(1.0 + rng.random())
        assert c.pid is not None
        os.kill(c.pid, signal.SIGKILL)
        at = time.monotonic()
        while c.readiness()[0]:
            await asyncio.sleep(0.001)
        noticed.append(time.monotonic() - at)
        while not c.readiness()[0] and time.monotonic() - at < 120:
            await asyncio.sleep(0.01)
        back.append(time.monotonic() - at)
    stop.set()
    await asyncio.gather(*workers)
    return {"test": "kill", "kills": count, "not_ready_after_s": round(max(noticed), 4),
            "ready_again_after_s": round(max(back), 2), "requests": dict(found),
            "ok": max(noticed) < 2 and c.readiness()[0] and not found["error before any"]}  # fmt: skip


async def reload(c: ProcessClient, count: int, rng: random.Random) -> dict[str, Any]:
    """Every request that is asked during ``count`` reloads is answered in full."""
    found, stop, seconds = Counter[str](), asyncio.Event(), list[float]()

    async def work(w: int) -> None:
        i = 0
        while not stop.is_set():
            i += 1
            request = Request(f"l{w}-{i}", prompt(rng, c, 32), SamplingConfig(max_tokens=24, ignore_eos=True))
            try:
                got = 0
                async for output in c.generate(request):
                    got += len(output.tokens)
                found["complete" if got == 24 else "short"] += 1
            except EngineError as error:
                found[str(error)] += 1

    workers = [asyncio.ensure_future(work(w)) for w in range(16)]
    for _ in range(count):
        began = time.monotonic()
        await c.reload(c.info.path)
        seconds.append(time.monotonic() - began)
    stop.set()
    await asyncio.gather(*workers)
    return {"test": "reload", "reloads": count, "requests": dict(found), "longest_s": round(max(seconds), 2),
            "ok": set(found) == {"complete"}}  # fmt: skip


async def attack(model: str, tests: list[str], counts: dict[str, int], config: EngineConfig) -> bool:
    """Runs ``tests``, prints what was found; whether all went as promised."""
    kinds = {"aborts": aborts, "kill": kill, "reload": reload}
    rules = Supervision(max_crashes=counts["kill"] + 5)
    fine = True
    async with ProcessClient(model, config, rules) as c:
        for name in tests:
            found = await kinds[name](c, counts[name], random.Random(0))
            print(json.dumps(found), flush=True)
            fine = fine and found["ok"]
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("tests", nargs="*", default=["aborts", "kill", "reload"])
    parser.add_argument("--aborts", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--reloads", type=int, default=5)
    parser.add_argument(
        "--memory-gib", type=float, default=0.0, help="of the cache; little of it makes preemptions"
    )
    args = parser.parse_args()
    counts = {"aborts": args.aborts, "kill": args.kills, "reload": args.reloads}
    config = EngineConfig(memory_gib=args.memory_gib)
    sys.exit(0 if asyncio.run(attack(args.model, args.tests, counts, config)) else 1)


if __name__ == "__main__":
    main()
