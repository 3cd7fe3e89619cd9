"""How fast the dashboard's server answers, with many runs open and many clients listening.

    python benchmarks/bench_server.py --run RUN             # a big run, as bench_dashboard.py --keep DIR makes one
    python benchmarks/bench_server.py --run RUN --runs 50 --clients 1000 --json out.json

The root that is served holds ``--runs`` runs: links to RUN, each opened by itself, and a live one that this program
logs to. Every figure is the median of ``--repeats`` requests over one kept connection from another process, with the
95th percentile and the processor time that the server took for one (which other programs on the machine do not touch),
beside the first request, which may find everything cold. The floor is an answer of the same server that reads nothing
(404), so the rest is what the work itself costs. Then ``--clients`` event streams are opened: what they cost in memory
and processor time while nothing happens, what a request takes beside them, and how long a logged row takes to reach the
last of them.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepseek.monitor.series import SeriesReader, SeriesWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    reader = SeriesReader(args.run / "monitor")
    names, (first, last) = reader.names(), reader.steps()
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"{args.run}: {len(names)} series, steps {first:,} to {last:,}; {load}")
    with tempfile.TemporaryDirectory() as place, served(Path(place), args.run, args.runs) as (port, process):
        answers = requests(port, process.pid, names, last, args.repeats)
        found: dict[str, Any] = {"requests": answers, "clients": {}}
        found["server_mib_with_all_runs_open"] = megabytes(process.pid)
        print(f"server: {found['server_mib_with_all_runs_open']:.0f} MiB with {args.runs} runs open")
        if args.clients:
            found["clients"] = clients(port, process.pid, Path(place) / "live", args.clients)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


@contextmanager
def served(place: Path, run: Path, runs: int) -> Iterator[tuple[int, Any]]:
    """A root of ``runs`` links and a live run, and ``deepseek monitor`` on it: its port and process."""
    for number in range(runs):
        (place / f"run-{number:02d}").symlink_to(run.resolve(), target_is_directory=True)
    with SeriesWriter(place / "live" / "monitor") as writer:
        writer.log(1, {"train/loss": 2.0})
    command = [sys.executable, "-m", "deepseek", "monitor", str(place), "--port", "0", "--ends-with-stdin"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        line = process.stdout.readline()
        yield int(line.split("http://")[1].split(":")[1].split("/")[0]), process
    finally:
        process.stdin.close()
        process.wait(30)


def requests(port: int, pid: int, names: list[str], last: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of each kind of request: until the answer is there, and of the server's processor."""
    rng = random.Random(0)
    base = "/api/runs/run-00"
    layers = [n for n in names if n.startswith("layer/")] or names

    def window() -> str:
        start = rng.randrange(max(1, last - 20_000))
        return f"{base}/data?name={rng.choice(names)}&start={start}&stop={start + 20_000}"

    kinds: dict[str, Callable[[], str]] = {
        "nothing (404)": lambda: "/api/nothing",
        "list of runs": lambda: "/api/runs",
        "a run": lambda: base,
        "list of series": lambda: f"{base}/series",
        "one series, whole": lambda: f"{base}/data?name={rng.choice(names)}&start={-rng.randrange(10**6)}",
        "the same again (kept)": lambda: f"{base}/data?name={names[0]}",
        "one series, 20k steps": window,
        "12 series, whole": lambda: (
            f"{base}/data?start={-rng.randrange(10**6)}&"
            + "&".join(f"name={n}" for n in rng.sample(layers, min(12, len(layers))))
        ),
        "100 series, 300 points": lambda: (
            f"{base}/data?points=300&start={-rng.randrange(10**6)}&"
            + "&".join(f"name={n}" for n in layers[:100])
        ),
        "metrics of one run": lambda: "/metrics?run=run-00",
    }
    found = {}
    for kind, path in kinds.items():
        for coding in ("identity", "gzip"):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            timed = [request(connection, path(), coding)]
            spent = seconds(pid)
            timed += [request(connection, path(), coding) for _ in range(repeats)]
            cpu = (seconds(pid) - spent) / repeats * 1e3
            connection.close()
            rest = sorted(ms for ms, _ in timed[1:])
            figures = {"first_ms": timed[0][0], "p50_ms": statistics.median(rest),
                       "p95_ms": rest[int(0.95 * len(rest))], "cpu_ms": cpu, "bytes": timed[-1][1]}  # fmt: skip
            found[f"{kind}, {coding}"] = figures
            print(f"{kind:24} {coding:8}  first {figures['first_ms']:8.1f}  p50 {figures['p50_ms']:7.2f}  "
                  f"p95 {figures['p95_ms']:7.2f}  cpu {cpu:6.2f} ms  {figures['bytes'] / 1e3:8.1f} kB")  # fmt: skip
    return found


def request(connection: http.client.HTTPConnection, path: str, coding: str) -> tuple[float, int]:
    began = time.perf_counter()
    connection.request("GET", path, headers={"Accept-Encoding": coding})
    size = len(connection.getresponse().read())
    return (time.perf_counter() - began) * 1e3, size


def clients(port: int, pid: int, run: Path, count: int) -> dict[str, float]:
    """What ``count`` idle streams cost, and how soon all have a new row."""
    before = megabytes(pid)
    listening = [stream(port) for _ in range(count)]
    gather(listening, b"event: status")
    time.sleep(1)
    memory = megabytes(pid) - before
    began, spent = time.perf_counter(), seconds(pid)
    time.sleep(10)
    share = (seconds(pid) - spent) / (time.perf_counter() - began)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    beside = statistics.median(
        request(connection, "/api/runs/run-00/series", "identity")[0] for _ in range(20)
    )
    arrivals = []
    with SeriesWriter(run / "monitor") as writer:
        for step in range(2, 7):
            began = time.perf_counter()
            writer.log(step, {"train/loss": 2.0})
            arrivals.append([(at - began) * 1e3 for at in gather(listening, b"event: row")])
            time.sleep(0.5)
    for open_ in listening:
        open_.close()
    found = {"clients": count, "mib": memory, "idle_core_share": share, "series_list_beside_them_ms": beside,
             "row_at_the_first_ms": statistics.median(min(a) for a in arrivals),
             "row_at_the_last_ms": statistics.median(max(a) for a in arrivals)}  # fmt: skip
    print("  ".join(f"{k} {v:.2f}" for k, v in found.items()))
    return found


def stream(port: int) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", port))
    found.sendall(b"GET /api/runs/live/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    return found


def gather(listening: list[socket.socket], mark: bytes) -> list[float]:
    """When each of the streams had ``mark``, as ``time.perf_counter``."""
    waiting, arrived = selectors.DefaultSelector(), []
    held = dict.fromkeys(listening, b"")
    for each in listening:
        waiting.register(each, selectors.EVENT_READ, data=each)
    while held:
        for key, _ in waiting.select(30):
            each = key.data
            data = each.recv(65536)
            assert data, "the server closed a stream"
            held[each] = held[each][-64:] + data
            if mark in held[each]:
                arrived.append(time.perf_counter())
                waiting.unregister(each)
                del held[each]
    waiting.close()
    return arrived


def megabytes(pid: int) -> float:
    """Resident memory of a process (Linux)."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def seconds(pid: int) -> float:
    """Processor time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
