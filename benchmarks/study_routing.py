"""What sending equal beginnings to the same replica is worth: the router's own choice, on conversations, simulated.

    python benchmarks/study_routing.py [--replicas 4] [--rate 6] [--hours 0.1] [--seed 0]

Real: ``Fleet.choose`` and ``prefix_key``, with the bodies that a client would send. Simulated: the replicas. Each reads
prompts one after the other at ``--prefill`` tokens per second, less what its prefix cache holds (the most recently used
beginnings, ``--cache`` tokens in all, in pages of 16), and then answers beside others at 50 tokens per second.
Conversations begin at ``--rate`` per second, under one of 50 system prompts (Zipf), and go on for 1 to 8 turns.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import itertools
import json
import random
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TypeAlias

from deepseek.serve.router import RouterConfig
from deepseek.serve.router.affinity import prefix_key
from deepseek.serve.router.replica import Address, Fleet, Replica

PAGE = 16
POLICIES = [
    "in turn",
    "least outstanding",
    "affinity 256",
    "affinity 1024",
    "affinity 4096",
    "affinity-unbounded 1024",
]
SYSTEM, USER, ANSWER = 800, 100, 200  # tokens; a user's message varies by ±50%

#: A conversation: its messages, their tokens, the turns left, its name. In the queue it asks; a replica has answered.
Talk: TypeAlias = tuple[list[dict[str, str]], list[int], int, int]


@dataclass
class Simulated:
    """The replica behind a ``Replica``: its prefix cache, and when it has read what it was given."""

    capacity: int
    pages: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    free_at: float = 0.0
    given: int = 0

    def read(self, now: float, pages: list[bytes], tokens: int, rate: float) -> tuple[float, int]:
        """When its first token comes, and how many tokens of the prompt were cached."""
        hit = len(list(itertools.takewhile(self.pages.__contains__, pages))) * PAGE
        for page in reversed(pages):  # the beginning is the newest, and stays longest
            self.pages[page] = None
            self.pages.move_to_end(page)
        while len(self.pages) * PAGE > self.capacity:
            self.pages.popitem(last=False)
        self.free_at = max(self.free_at, now) + (tokens - hit) / rate
        self.given += 1
        return self.free_at, hit


def pages_of(messages: list[dict[str, str]], lengths: list[int]) -> list[bytes]:
    """A name for every page of the prompt that depends on all before it."""
    found, chain = [], b""
    for message, length in zip(messages, lengths):
        for i in range(length // PAGE):
            chain = hashlib.blake2b(
                chain + message["content"].encode() + bytes([i % 256]), digest_size=8
            ).digest()
            found.append(chain)
    return found


def simulate(policy: str, options: argparse.Namespace) -> dict[str, float]:
    chance = random.Random(options.seed)
    fleet = Fleet(1e9 if policy.startswith("affinity-unbounded") else options.load)
    fleet.replicas = [
        Replica(Address("http", f"r{i}", 8000), f"10.0.0.{i}", ready=True) for i in range(options.replicas)
    ]
    engines = {r.name: Simulated(options.cache) for r in fleet.replicas}
    weights = [1 / (i + 1) for i in range(50)]
    turn = itertools.count()
    queue: list[tuple[float, int, Talk | Replica]] = []
    at = 0.0
    while at < options.hours * 3600:
        at += chance.expovariate(options.rate)
        system = f"system {chance.choices(range(50), weights)[0]} " + "x" * 3000
        talk: Talk = ([{"role": "system", "content": system}], [SYSTEM], chance.randint(1, 8), next(turn))
        heapq.heappush(queue, (at, next(turn), talk))
    waits, hits, total, worst, looks, around = [], 0, 0, 0.0, 0, itertools.cycle(fleet.replicas)
    while queue:
        now, _, what = heapq.heappop(queue)
        if isinstance(what, Replica):
            what.outstanding -= 1
            continue
        messages, lengths, left, name = what
        length = int(USER * chance.uniform(0.5, 1.5))
        messages = [*messages, {"role": "user", "content": f"{name} {len(messages)} {length}"}]
        lengths = [*lengths, length]
        body = json.dumps({"model": "m", "messages": messages}).encode()
        characters = int(policy.partition(" ")[2] or 0) if policy.startswith("affinity") else 0
        key = prefix_key(body, characters)
        chosen = next(around) if policy == "in turn" else fleet.choose(key)
        assert chosen is not None
        chosen.outstanding += 1
        first, hit = engines[chosen.name].read(
            now, pages_of(messages, lengths), sum(lengths), options.prefill
        )
        waits.append(first - now)
        hits, total = hits + hit, total + sum(lengths)
        mean = fleet.outstanding / len(fleet.replicas)
        worst, looks = worst + max(r.outstanding for r in fleet.replicas) / mean, looks + 1
        end = first + ANSWER / 50
        heapq.heappush(queue, (end, next(turn), chosen))
        if left > 1:
            messages, lengths = (
                [*messages, {"role": "assistant", "content": f"{name} answer"}],
                [*lengths, ANSWER],
            )
            heapq.heappush(
                queue, (end + chance.expovariate(0.1), next(turn), (messages, lengths, left - 1, name))
            )
    waits.sort()
    return {"cached %": 100 * hits / total, "first token p50 ms": 1e3 * waits[len(waits) // 2],
            "p95 ms": 1e3 * waits[len(waits) * 95 // 100], "p99 ms": 1e3 * waits[len(waits) * 99 // 100],
            "busiest / mean": worst / looks, "requests": len(waits)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--rate", type=float, default=6.0, help="conversations per second")
    parser.add_argument("--hours", type=float, default=0.1)
    parser.add_argument("--cache", type=int, default=200_000, help="tokens that a prefix cache holds")
    parser.add_argument("--prefill", type=float, default=15_000.0, help="tokens per second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--load", type=float, default=RouterConfig().affinity_load, help="times the mean, for affinity"
    )
    parser.add_argument(
        "--policies", nargs="*", default=POLICIES, help="affinity N: by the first N characters"
    )
    options = parser.parse_args()
    for policy in options.policies:
        found = simulate(policy, options)
        print(f"{policy:20}" + "".join(f"   {name} {value:9,.1f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
