"""What the process border costs: the step loop's own time per step, and the front end's per output.

    loop    ``worker.run`` around an engine whose steps take no time, with its outputs going to another process that
            throws them away. What is left is the loop: taking messages, packing, sending, the heartbeat.
    client  ``ProcessClient`` with N streams: processor time of this process per output that a consumer takes.
    start   seconds from the start of a step process to ready, with an engine without a model (so: Python and imports).

Processor time is given beside wall time, because on a machine that others use only the former says anything.

    python benchmarks/bench_worker.py [--streams 1 32 256] [--steps 2000]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek.serve import wire, worker
from deepseek.serve.client import ProcessClient
from deepseek.serve.request import EngineStats, FinishReason, ModelInfo, Output, Request
from deepseek.serve.sampler import SamplingConfig
from deepseek.serve.wire import Channel, Heartbeat

SINK = "import socket, sys\ns = socket.socket(fileno=int(sys.argv[1]))\nwhile s.recv(1 << 18): pass"


class Instant:
    """Every step gives every request one token, already made; counts the steps it still has."""

    info = ModelInfo("instant", "instant", 4096, 1000, 64, 1)

    def __init__(self, streams: int, steps: int) -> None:
        self.left = steps
        self.outputs = [Output(f"{i}:request-{i}", " token", (i,), prompt_tokens=100) for i in range(streams)]
        self.live: dict[str, int] = {}

    @property
    def has_work(self) -> bool:
        return self.left > 0

    def prepared(self, request: Request) -> bool:
        return True

    def prepare(self, request: Request) -> None: ...

    def add(self, request: Request) -> None:
        self.live[request.id] = request.sampling.max_tokens

    def abort(self, id: str, reason: FinishReason = "abort") -> bool:
        return self.live.pop(id, None) is not None

    def step(self) -> list[Output]:
        self.left -= 1
        return self.outputs

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.outputs), steps=self.left)


class Endless(Instant):
    """For a process of its own: one token for every live request in every step."""

    def __init__(self) -> None:
        super().__init__(0, 0)

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def step(self) -> list[Output]:
        outputs = []
        for id, left in list(self.live.items()):
            outputs.append(
                Output(id, " token", (5,), finish=None if left > 1 else "length", prompt_tokens=100)
            )
            if left > 1:
                self.live[id] = left - 1
            else:
                del self.live[id]
        return outputs


def endless(path: str, options: dict[str, Any]) -> Endless:
    return Endless()


def loop(streams: int, steps: int) -> tuple[float, float]:
    """Wall and processor microseconds of the loop per step."""
    ours, theirs = socket.socketpair()
    page = Heartbeat.file()
    beat = Heartbeat(page)
    os.close(page)
    with theirs:
        sink = subprocess.Popen(
            [sys.executable, "-c", SINK, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
    channel, engine = Channel(ours), Instant(streams, steps)

    def messages(chunks: int = 0) -> Iterator[wire.Message]:
        return iter([] if engine.left else [(wire.STOP,)])

    took = channel.receive
    channel.receive = lambda chunks=1: [*took(chunks), *messages()]  # type: ignore[method-assign]
    wall, cpu = time.perf_counter(), time.process_time()
    worker.run(engine, channel, beat)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    channel.close()
    beat.close()
    sink.wait()
    return wall / steps * 1e6, cpu / steps * 1e6


async def client(streams: int, tokens: int) -> tuple[float, float, float]:
    """Seconds to ready; outputs taken per second; processor microseconds of this process per output."""
    here = str(Path(__file__).parent)
    if here not in sys.path:
        sys.path.append(here)
    began = time.perf_counter()
    async with ProcessClient("instant", factory="bench_worker:endless") as c:
        start = time.perf_counter() - began

        async def one(i: int) -> int:
            n = 0
            async for output in c.generate(Request(f"r{i}", (1,) * 100, SamplingConfig(max_tokens=tokens))):
                n += len(output.tokens)
            return n

        wall, cpu = time.perf_counter(), time.process_time()
        done = sum(await asyncio.gather(*(one(i) for i in range(streams))))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert done == streams * tokens
    return start, done / wall, cpu / done * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    print("streams   loop us/step (wall, cpu)   client outputs/s   client cpu us/output   start s")
    for n in args.streams:
        best = min((loop(n, args.steps) for _ in range(3)), key=lambda x: x[1])
        start, rate, cpu = asyncio.run(client(n, max(1, 20 * args.steps // n)))
        print(f"{n:7}   {best[0]:12.1f} {best[1]:10.1f}   {rate:16,.0f}   {cpu:20.1f}   {start:7.2f}")


if __name__ == "__main__":
    main()
