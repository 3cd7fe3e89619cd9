"""kill -9 of step processes behind a router: real front ends with real step processes, whose engines pretend."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_served import process
from test_router import Answer, Routed, routed, until

HEADERS = {"Content-Type": "application/json"}
TOKENS = 6


def step_processes(pid: int) -> list[int]:
    """Of the server ``pid``: its children."""
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ask(router: Routed, number: int) -> Answer:
    prompt = [1 + number % 900, number // 900 + 1, 3]
    if number % 3 == 2:
        messages = [{"role": "user", "content": f"hello {number}"}]
        body = {"messages": messages, "max_tokens": TOKENS, "stream": True}
        return router.ask("POST", "/v1/chat/completions", body, HEADERS)
    body = {"prompt": prompt, "max_tokens": TOKENS, "stream": number % 3 == 1}
    return router.ask("POST", "/v1/completions", body, HEADERS)


def fate(answer: Answer, number: int) -> str:
    """'whole'; 'broken' for a stream that had begun and says that it broke off; or what no client may see."""
    if answer.status != 200:
        return f"{answer.status} {answer.body[:200]!r}"
    if number % 3 == 0:
        return "whole" if answer.json["usage"]["completion_tokens"] == TOKENS else f"torn {answer.body!r}"
    lines = [x for x in answer.body.split(b"\n\n") if x and not x.startswith(b":")]
    events = [x.removeprefix(b"data: ") for x in lines]
    told = [json.loads(e) for e in events if e != b"[DONE]"]
    words = [
        c for e in told for c in e.get("choices", ()) if c.get("text") or c.get("delta", {}).get("content")
    ]
    if events[-1] == b"[DONE]" and told[-1].get("choices", [{}])[0].get("finish_reason") == "length":
        return "whole"
    if words and told[-1].get("error", {}).get("code") == "engine_lost":
        return "broken"
    return f"torn {answer.body!r}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kill_9_of_step_processes_fails_nobody_who_has_no_part_of_an_answer(tmp_path: Path) -> None:
    rng, rules = random.Random(3), {"max_crashes": 100, "backoff": 0.05}
    engine = "fake:step=0.01,slots=4"  # so most requests wait in the engine, half a second and more
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(process(tmp_path, engine, **rules)) for _ in range(2)]
        router = stack.enter_context(routed(*(url for _, url in servers)))
        until(lambda: len(router.router.fleet.usable()) == 2)
        pool = stack.enter_context(ThreadPoolExecutor(24))
        stop, answers = threading.Event(), dict[int, Answer]()

        def flow(first: int) -> None:
            number = first
            while not stop.is_set():
                answers[number] = ask(router, number)
                number += 24

        flows = [pool.submit(flow, i) for i in range(24)]
        try:
            for kill in range(4):
                goal = len(answers) + 60
                until(lambda: len(answers) > goal)  # noqa: B023
                time.sleep(rng.uniform(0, 0.1))
                server = servers[kill % 2][0]
                old = step_processes(server.pid)
                os.kill(old[0], signal.SIGKILL)
                until(lambda: step_processes(server.pid) not in ([], old))  # noqa: B023
                until(lambda: len(router.router.fleet.usable()) == 2)
        finally:
            stop.set()
        for done in flows:
            done.result()
        fates = [fate(a, n) for n, a in answers.items()]
        assert set(fates) <= {"whole", "broken"}, sorted(set(fates))
        assert fates.count("broken") <= 4 * 4, "those that a step process was in the middle of"
        retried = sum(router.metric(f'retries_total{{replica="{url}"}}') for _, url in servers)
        assert retried > 0, "answers that were not streamed, broken off, are made anew"
