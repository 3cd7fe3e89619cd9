"""What the server does when it is treated badly: a real one, in its own process, on a tiny hybrid expert model.

    python benchmarks/robust_serve.py aborts --count 10000   # clients that go at any moment: is a page still in use?
    python benchmarks/robust_serve.py overload --seconds 20  # four times what it can do: how fast is a refusal?
    python benchmarks/robust_serve.py kill --times 5         # kill -9 of the step process: when does /ready say so?
    python benchmarks/robust_serve.py drain --streams 64     # SIGTERM under load: how many answers are lost?
    python benchmarks/robust_serve.py slow --idle 1000       # idle connections, and readers that do not read
    python benchmarks/robust_serve.py fuzz --cases 10000     # schemathesis, all phases: answers by status
    python benchmarks/robust_serve.py all --json out.json

``--model`` serves another model (a run, a Hugging Face directory, a GGUF file). Each part exits with 1 when its promise
is broken; times are printed, with the load of the machine, and judged by nobody.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

KEY = "sk-robust-0123456789abcdef"
TEXT = "The quick brown fox jumps over the lazy dog while five boxing wizards jump quickly. "


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--count", type=int, default=10_000, help="aborts")
    parser.add_argument("--seconds", type=float, default=20.0, help="of overload")
    parser.add_argument("--times", type=int, default=5, help="kills")
    parser.add_argument("--streams", type=int, default=64, help="running at SIGTERM")
    parser.add_argument("--idle", type=int, default=1000, help="idle connections")
    parser.add_argument("--cases", type=int, default=10_000, help="of schemathesis")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    gc.collect()
    gc.freeze()  # the client's own collections are not the server's pauses
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        model = args.model or tiny_model(Path(place) / "tiny")
        for name in PARTS if args.part == "all" else [args.part]:
            print(f"{name}: load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
            found[name] = PARTS[name](model, args)
            print("  " + json.dumps(found[name]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    broken = [name for name, told in found.items() if not told["kept"]]
    print("kept" if not broken else f"broken: {', '.join(broken)}")
    return 1 if broken else 0


def tiny_model(path: Path) -> Path:
    """A hybrid mixture of experts with random weights, as a Hugging Face directory; its answers are noise."""
    import torch

    from deepseek.data.tokenizer import train_tokenizer
    from deepseek.models import ModelConfig, Transformer
    from deepseek.nn.attention import AttentionConfig
    from deepseek.nn.moe import MoEConfig
    from deepseek.weights.convert import save_hf

    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT * 50], 512)
    tokenizer.save(path.parent / "tokenizer")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden=64, layers=3, ffn=96, pattern="LHF", max_length=1024,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=16, window=32, block=16, stride=16),
        moe=MoEConfig(experts=8, top_k=2, expert_ffn=32),
    )  # fmt: skip
    save_hf(Transformer(config).eval(), path, path.parent / "tokenizer")
    return path


# --- a server and a client ------------------------------------------------------------------------------------


@dataclass
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; (0, b"") when it cannot be reached."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 10) as link:
                link.sendall(_head("GET", path, b"", close=True))
                data = b"".join(iter(lambda: link.recv(65536), b""))
        except OSError:
            return 0, b""
        head, _, body = data.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), body

    def metric(self, name: str, **labels: str) -> float:
        found = 0.0
        for line in self.get("/metrics")[1].decode().splitlines():
            head, _, value = line.rpartition(" ")
            if head.partition("{")[0] == name and all(f'{k}="{v}"' in head for k, v in labels.items()):
                found += float(value)
        return found

    def statuses(self) -> dict[str, int]:
        """Answers by status since the start."""
        found: Counter[str] = Counter()
        for line in self.get("/metrics")[1].decode().splitlines():
            if line.startswith("http_requests_total{"):
                found[line.split('status="')[1][:3]] += int(float(line.rpartition(" ")[2]))
        return dict(sorted(found.items()))

    def step_process(self) -> int:
        """The pid of the process that computes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return max(map(int, children), key=lambda pid: _rss(pid))

    def quiet(self, seconds: float = 60.0) -> dict[str, float]:
        """Wait until nothing runs or waits; what is still in use then."""
        end = time.monotonic() + seconds
        names = ("running", "waiting", "admitted")
        while True:
            left = {n: self.metric(f"vllm:num_requests_{n}") for n in names}
            left["pages_used"] = self.metric("vllm:kv_cache_usage_perc")
            if not any(left.values()) or time.monotonic() > end:
                return left
            time.sleep(0.1)


def _rss(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return 0


@contextlib.contextmanager
def served(model: Path, *options: str) -> Iterator[Server]:
    """``deepseek serve`` on any free port, ready to answer; ended by SIGTERM unless it has ended."""
    command = [sys.executable, "-m", "deepseek", "serve", str(model), "--port", "0", "--log", "", *options]
    command += ["--memory-gib", "0.25"]
    environment = {**os.environ, "DEEPSEEK_ADMIN_KEYS": KEY, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if "http://" not in line:
            raise SystemExit(f"the server did not start: {line!r}")
        yield Server(process, int(line.rsplit(":", 1)[1]))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _head(method: str, path: str, body: bytes, close: bool = False) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Connection: close\r\n" if close else ""
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    return (head + "\r\n").encode() + body


@dataclass
class Answer:
    """What came back, and when; seconds since the request was sent."""

    status: int = 0
    first: float = 0.0  # the first token, or the whole answer
    total: float = 0.0
    body: bytes = b""

    @property
    def whole(self) -> bool:
        """Whether a stream came to its proper end."""
        return (
            self.status == 200
            and self.body.rstrip().endswith(b"data: [DONE]\n\n\r\n0")
            and b'"error"' not in self.body
        )


async def ask(port: int, body: dict[str, Any], path: str = "/v1/completions") -> Answer:
    """One request over a connection of its own."""
    answer, began = Answer(), time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(_head("POST", path, json.dumps(body).encode(), close=True))
            while piece := await reader.read(65536):
                if not answer.body:
                    answer.status = int(piece.split(b" ", 2)[1])
                answer.body += piece
                if not answer.first and b"data: {" in answer.body:
                    answer.first = time.perf_counter() - began
        finally:
            writer.close()
    except OSError:
        pass
    answer.total = time.perf_counter() - began
    answer.first = answer.first or answer.total
    return answer


def percentiles(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {
        f"p{p}_ms": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)] * 1e3, 1)
        for p in (50, 95, 99)
    }


def greedy(server: Server) -> bytes:
    """An answer that must not change, whatever happens between."""
    body = {"prompt": TEXT[:20], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    told = asyncio.run(ask(server.port, body))
    assert told.status == 200, told
    return json.dumps(json.loads(told.body.partition(b"\r\n\r\n")[2])["choices"][0]["text"]).encode()


# --- the parts ------------------------------------------------------------------------------------------------


def aborts(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Clients that go at random moments: while they send, wait, or read."""
    rng, how = random.Random(0), Counter[str]()

    async def one(port: int) -> None:
        kind = rng.choice(["stream", "stream", "wait", "send", "chat"])
        start = rng.randrange(len(TEXT))
        prompt = TEXT[:start] if rng.random() < 0.5 else TEXT[start:] * rng.randint(1, 5)
        body: dict[str, Any] = {"max_tokens": rng.randint(1, 120), "ignore_eos": True, "n": rng.choice([1, 1, 1, 3]),
                                "stream": kind in ("stream", "chat") and rng.random() < 0.8}  # fmt: skip
        path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
        if kind == "chat":
            body["messages"] = [{"role": "user", "content": prompt or "x"}]
        else:
            body["prompt"] = prompt or "x"
        data = _head("POST", path, json.dumps(body).encode())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            if kind == "send":
                data = data[: rng.randrange(1, len(data))]
            writer.write(data)
            with contextlib.suppress(asyncio.TimeoutError, OSError):
                if kind == "stream" and rng.random() < 0.6:
                    for _ in range(rng.randint(1, 20)):
                        if not await asyncio.wait_for(reader.readline(), 5):
                            break
                else:
                    await asyncio.wait_for(reader.read(1), rng.expovariate(20))
            if rng.random() < 0.5:  # with a reset, not a goodbye
                link = writer.get_extra_info("socket")
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            how[kind] += 1
        finally:
            writer.transport.abort()

    async def work(port: int) -> int:
        left, failed = args.count, 0

        async def worker() -> None:
            nonlocal left, failed
            while left > 0:
                left -= 1
                try:
                    await one(port)
                except OSError:
                    failed += 1

        await asyncio.gather(*(worker() for _ in range(48)))
        return failed

    with served(model, "--max-running", "16", "--max-waiting", "200") as server:
        before, began = greedy(server), time.monotonic()
        failed = asyncio.run(work(server.port))
        seconds = time.monotonic() - began
        left, after = server.quiet(), greedy(server)
        statuses = server.statuses()
        aborted = server.metric("vllm:request_success_total", finished_reason="abort")
        restarts = server.process.poll()
    kept = not any(left.values()) and before == after and restarts is None and not _faults(statuses)
    return {"kept": kept, "aborts": sum(how.values()), "kinds": dict(how), "could_not_connect": failed,
            "sequences_aborted_in_the_engine": int(aborted), "left_in_use": left, "same_greedy_answer": before == after,
            "statuses": statuses, "seconds": round(seconds, 1)}  # fmt: skip


def _faults(statuses: dict[str, int]) -> int:
    return sum(count for status, count in statuses.items() if status.startswith("5"))


def overload(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Poisson arrivals at four times the rate that the server was measured to finish."""
    body = {"prompt": TEXT, "max_tokens": 32, "ignore_eos": True, "stream": True}
    running, waiting = 8, 16

    async def capacity(port: int, seconds: float) -> float:
        end, done = time.monotonic() + seconds, 0

        async def worker() -> None:
            nonlocal done
            while time.monotonic() < end:
                answer = await ask(port, body)
                done += answer.status == 200

        await asyncio.gather(*(worker() for _ in range(running)))
        return done / seconds

    async def open_loop(port: int, rate: float) -> list[Answer]:
        rng, tasks, end = random.Random(1), [], time.monotonic() + args.seconds
        due = time.monotonic()
        while due < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(ask(port, body)))
            due += rng.expovariate(rate)
        return list(await asyncio.gather(*tasks))

    with served(model, "--max-running", str(running), "--max-waiting", str(waiting)) as server:
        asyncio.run(capacity(server.port, 2.0))
        rate = asyncio.run(capacity(server.port, 6.0))
        answers = asyncio.run(open_loop(server.port, 4 * rate))
        left, statuses = server.quiet(), server.statuses()
    refused = [a.total for a in answers if a.status == 429]
    admitted = [a for a in answers if a.status == 200]
    bound = (running + waiting) / rate  # who is let in last waits for all before
    late = [a for a in admitted if a.first > 2 * bound + 0.5]
    told = percentiles(refused)
    kept = bool(refused) and all(a.whole for a in admitted) and not late and not _faults(statuses)
    kept = kept and not any(left.values())
    return {"kept": kept, "capacity_per_s": round(rate, 1), "offered_per_s": round(4 * rate, 1),
            "refused": len(refused), "refusal": told, "refusal_p99_below_50_ms": told.get("p99_ms", 1e9) < 50,
            "admitted": len(admitted), "admitted_ttft": percentiles([a.first for a in admitted]),
            "ttft_slo_ms": round(bound * 1e3), "not_whole": sum(not a.whole for a in admitted),
            "other": len(answers) - len(refused) - len(admitted), "statuses": statuses}  # fmt: skip


def kill(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """``kill -9`` of the step process under load."""
    noticed, recovered, outcomes = [], [], Counter[str]()
    body = {"prompt": TEXT, "max_tokens": 400, "ignore_eos": True, "stream": True}

    async def load(server: Server) -> None:
        tasks = [asyncio.create_task(ask(server.port, body)) for _ in range(8)]
        await asyncio.sleep(0.3)
        os.kill(server.step_process(), signal.SIGKILL)
        began = time.monotonic()
        while (await asyncio.to_thread(server.get, "/ready"))[0] != 503:
            if time.monotonic() - began > 30:
                break
            await asyncio.sleep(0.005)
        noticed.append(time.monotonic() - began)
        while (await asyncio.to_thread(server.get, "/ready"))[0] != 200:
            if time.monotonic() - began > 120:
                break
            await asyncio.sleep(0.02)
        recovered.append(time.monotonic() - began)
        for answer in await asyncio.gather(*tasks):
            outcomes["whole" if answer.whole else f"error after {answer.status}"] += 1

    with served(model, "--max-running", "16") as server:
        before = greedy(server)
        for _ in range(args.times):
            asyncio.run(load(server))
        left, after = server.quiet(), greedy(server)
        alive = server.get("/health")[0] == 200
    kept = max(noticed) <= 2 and max(recovered) < 120 and before == after and alive and not any(left.values())
    return {"kept": kept, "until_ready_says_503_s": [round(s, 3) for s in noticed],
            "until_ready_again_s": [round(s, 2) for s in recovered], "streams": dict(outcomes),
            "same_greedy_answer": before == after, "left_in_use": left}  # fmt: skip


def drain(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """SIGTERM while answers run and others come."""
    body = {"prompt": TEXT, "max_tokens": 120, "ignore_eos": True}

    async def work(server: Server) -> tuple[list[Answer], list[Answer], int]:
        running = [
            asyncio.create_task(ask(server.port, {**body, "stream": i % 2 == 0})) for i in range(args.streams)
        ]
        while await asyncio.to_thread(server.metric, "vllm:num_requests_admitted") < args.streams:
            await asyncio.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        late = []
        while not all(task.done() for task in running):
            late.append(await ask(server.port, body))
            await asyncio.sleep(0.02)
        status = await asyncio.to_thread(server.process.wait, 60)
        return list(await asyncio.gather(*running)), late, status

    with served(model, "--max-running", "16", "--drain", "120") as server:
        began = time.monotonic()
        answers, late, status = asyncio.run(work(server))
        seconds = time.monotonic() - began
    streams = [a for i, a in enumerate(answers) if i % 2 == 0]
    dropped = sum(not a.whole for a in streams) + sum(a.status != 200 for a in answers)
    after = Counter("refused connection" if a.status == 0 else str(a.status) for a in late)
    kept = dropped == 0 and status == 0 and set(after) <= {"503", "refused connection", "200"}
    return {"kept": kept, "running_at_sigterm": args.streams, "dropped": dropped, "exit_status": status,
            "after_sigterm": dict(after), "seconds": round(seconds, 1)}  # fmt: skip


def slow(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Idle connections and slow readers beside ordinary requests."""
    body = {"prompt": TEXT, "max_tokens": 16, "ignore_eos": True}
    long = {**body, "max_tokens": 900, "stream": True, "logprobs": 5}

    async def timed(port: int, count: int) -> list[float]:
        found = []
        for _ in range(count):
            answer = await ask(port, body)
            assert answer.status == 200, answer
            found.append(answer.total)
        return found

    async def ping(link: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> bool:
        reader, writer = link
        writer.write(_head("GET", "/health", b""))
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
            await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0]))
            return head.startswith(b"HTTP/1.1 200")
        return False

    async def work(server: Server) -> dict[str, Any]:
        alone = await timed(server.port, 20)
        before = _rss(server.process.pid)
        links = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(args.idle)]
        first = sum([await ping(link) for link in links])
        with_idle = await timed(server.port, 20)
        readers = [await _slow_reader(server.port, long) for _ in range(20)]
        beside = await timed(server.port, 20)
        last = sum([await ping(link) for link in links])
        grown = _rss(server.process.pid) - before
        for _, writer in [*links, *readers]:
            writer.transport.abort()
        return {"kept": first == last == args.idle, "idle_answered": last, "mib_more": round(grown / 2**20, 1),
                "alone": percentiles(alone), "beside_idle": percentiles(with_idle),
                "beside_idle_and_slow_readers": percentiles(beside)}  # fmt: skip

    with served(model, "--max-running", "32") as server:
        told = asyncio.run(work(server))
        left = server.quiet()
    told["kept"] = told["kept"] and not any(left.values())
    return {**told, "left_in_use": left}


async def _slow_reader(port: int, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream that is begun and hardly read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.write(_head("POST", "/v1/completions", json.dumps(body).encode()))
    await reader.read(1)
    return reader, writer


def fuzz(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Schemathesis over all routes and phases, with seed after seed until there are enough cases."""
    options = ("--max-running", "16", "--max-length", "64")  # or most of the time is spent on long answers
    with served(model, *options) as server, tempfile.TemporaryDirectory() as place:
        before, seed, failures = greedy(server), 0, list[str]()
        while sum(server.statuses().values()) < args.cases and seed < 50:
            seed += 1
            phases = "examples,coverage,fuzzing,stateful" if seed == 1 else "fuzzing,stateful"
            command = [
                str(Path(sys.executable).parent / "schemathesis"), "run", f"http://127.0.0.1:{server.port}/openapi.json",
                "-H", f"Authorization: Bearer {KEY}", "--phases", phases, "--max-examples", "150", "--checks", "all",
                "--exclude-checks", "positive_data_acceptance", "--continue-on-failure", "--no-shrink",
                "--warnings", "off", "--suppress-health-check", "all", "--seed", str(seed), "--request-timeout", "60",
            ]  # fmt: skip
            done = subprocess.run(command, cwd=place, capture_output=True, text=True)
            failures += [line.strip()[:200] for line in done.stdout.splitlines() if line.startswith("- ")]
            print(f"  seed {seed}: {server.statuses()}", flush=True)
        left, statuses, after = server.quiet(), server.statuses(), greedy(server)
    kept = not _faults(statuses) and not failures and before == after and not any(left.values())
    return {"kept": kept, "cases": sum(statuses.values()), "statuses": statuses, "failures": failures[:20],
            "same_greedy_answer": before == after, "left_in_use": left}  # fmt: skip


PARTS = {"aborts": aborts, "overload": overload, "kill": kill, "drain": drain, "slow": slow, "fuzz": fuzz}

if __name__ == "__main__":
    sys.exit(main())
