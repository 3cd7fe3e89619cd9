"""What the router costs: time added to an answer, and how many events and requests a second pass through one process.

    python benchmarks/bench_router.py [--streams 64] [--events 500] [--requests 500]

The replicas are two processes that only write: they stand for engines that are never the bottleneck. The client is a
third, and the router a fourth, so a machine with four idle cores shows the router and not the waiting for each other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
EVENT = b"data: " + json.dumps({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [
    {"index": 0, "text": " word", "logprobs": None, "finish_reason": None}]}).encode() + b"\n\n"  # fmt: skip
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)


async def replica(port: int) -> None:
    """Answers ``/ready``, and every POST with as many events as its body says, ``pace`` seconds apart."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            else:
                if b"100-continue" in head:
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                length = next(
                    int(x.split(b":")[1])
                    for x in head.split(b"\r\n")
                    if x.lower().startswith(b"content-length")
                )
                asked = json.loads(await reader.readexactly(length))
                writer.write(HEAD)
                for _ in range(asked["events"]):
                    writer.write(CHUNK)
                    await (asyncio.sleep(asked["pace"]) if asked["pace"] else writer.drain())
                writer.write(b"0\r\n\r\n")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def ask(port: int, events: int, pace: float = 0.0) -> tuple[float, int]:
    """Seconds to the first event, and how many came."""
    body = json.dumps({"prompt": "p", "events": events, "pace": pace}).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    first, count, tail = 0.0, 0, b""
    while count < events:
        data = await reader.read(1 << 16)
        if not data:
            break
        data = tail + data
        found, tail = data.count(b"data: "), data[-5:]  # the word may be cut in two
        first = first or (time.perf_counter() - began if found else 0.0)
        count += found
    writer.close()
    return first, count


async def measure(port: int, options: argparse.Namespace) -> dict[str, float]:
    await ask(port, 1)
    firsts = sorted([(await ask(port, 1))[0] for _ in range(options.requests)])
    began = time.perf_counter()
    counts = [
        c for _, c in await asyncio.gather(*(ask(port, options.events) for _ in range(options.streams)))
    ]
    flood = sum(counts) / (time.perf_counter() - began)
    assert set(counts) == {options.events}
    return {"first event p50 ms": 1e3 * firsts[len(firsts) // 2], "p99 ms": 1e3 * firsts[len(firsts) * 99 // 100],
            "requests/s, one at a time": len(firsts) / sum(firsts), "events/s, unpaced": flood}  # fmt: skip


async def paced(port: int, streams: int) -> int:
    """Events of streams as slow as a model's: nothing can be passed on together."""
    return sum(c for _, c in await asyncio.gather(*(ask(port, 100, 0.02) for _ in range(streams))))


@contextlib.contextmanager
def started(*command: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline().strip().rpartition(":")[2])
        finally:
            process.terminate()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--events", type=int, default=500)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--replica", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replica is not None:
        asyncio.run(replica(options.replica))
        return
    with started(__file__, "--replica", "0") as (_, a), started(__file__, "--replica", "0") as (_, b):
        urls = (f"http://127.0.0.1:{a}", f"http://127.0.0.1:{b}")
        with started("-m", "deepseek", "route", *urls, "--port", "0") as (process, port):
            direct = asyncio.run(measure(a, options))
            routed = asyncio.run(measure(port, options))
            before = cpu_seconds(process.pid)
            events = asyncio.run(paced(port, options.streams))
            busy = cpu_seconds(process.pid) - before
    for name in direct:
        print(f"{name:28} direct {direct[name]:12,.2f}   routed {routed[name]:12,.2f}")
    print(f"router: {1e6 * busy / events:.0f} µs of one core per event of {options.streams} paced streams")


if __name__ == "__main__":
    main()
