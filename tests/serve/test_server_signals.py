"""`deepseek serve` as a process (its engine pretends): two signals, new keys, and reloads while requests come."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fake_client import ADMIN, KEY
from fake_served import process

ROOT = {"authorization": f"Bearer {ADMIN}"}


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.1)


def complete(url: str, key: str = KEY, **more: Any) -> httpx2.Response:
    body = {"prompt": [1, 2], "max_tokens": 5, **more}
    headers = {"authorization": f"Bearer {key}"}
    return httpx2.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)


def metric(url: str, name: str, key: str = "") -> int:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    text = httpx2.get(f"{url}/metrics", headers=headers, timeout=60).text
    found = [x for x in text.splitlines() if x.startswith(f"vllm:{name}{{")]
    return sum(int(float(line.rpartition(" ")[2])) for line in found)


def running(url: str, key: str = "") -> int:
    return metric(url, "num_requests_admitted", key)


@pytest.mark.parametrize(
    ("second", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_second_signal_ends_at_once_and_says_so(tmp_path: Path, second: int, status: int) -> None:
    with process(tmp_path, "fake:step=0.02", drain=600) as (server, url), ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(complete, url, max_tokens=4000, stream=True) for _ in range(2)]
        whole = [pool.submit(complete, url, max_tokens=4000) for _ in range(2)]
        until(lambda: running(url) == 4)
        until(lambda: metric(url, "generation_tokens_total") > 60)  # all have begun
        server.send_signal(signal.SIGTERM)
        until(lambda: httpx2.get(f"{url}/ready", timeout=60).status_code == 503)
        server.send_signal(second)
        assert server.wait(60) == status
        for answer in (s.result() for s in streams):
            events = answer.text.strip().split("\n\n")
            assert answer.status_code == 200
            assert len(events) > 4
            assert events[-1] == "data: [DONE]"
            told = json.loads(events[-2].removeprefix("data: "))
            assert told["error"]["code"] == "aborted"
        for answer in (w.result() for w in whole):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["code"] == "aborted"


def test_keys_change_while_the_server_runs(tmp_path: Path) -> None:
    """By themselves within seconds, at once on SIGHUP; a file that is no good changes nothing, and is told."""
    file, bob, carol = tmp_path / "keys.toml", "sk-bob-0123456789abc", "sk-carol-0123456789a"
    file.write_text(f'[alice]\nkey = "{KEY}"\n')
    with process(tmp_path, "fake:step=0.02", keys_file=file) as (server, url), ThreadPoolExecutor(1) as pool:
        assert complete(url, KEY).status_code == 200
        assert complete(url, bob).status_code == 401
        long = pool.submit(complete, url, max_tokens=200)
        until(lambda: running(url, KEY) == 1)
        file.write_text(f'[bob]\nkey = "{bob}"\n')
        until(lambda: complete(url, bob).status_code == 200)
        assert complete(url, KEY).status_code == 401
        assert long.result().status_code == 200, "what was let in is finished"
        file.write_text("[carol")
        server.send_signal(signal.SIGHUP)
        assert complete(url, bob).status_code == 200  # answered after the signal was, by the same loop
        file.unlink()
        server.send_signal(signal.SIGHUP)
        assert complete(url, bob).status_code == 200
        new = tmp_path / "new.toml"
        new.write_text(f'[bob]\nkey = "{bob}"\nrequests_per_minute = 1\n[carol]\nkey = "{carol}"\n')
        new.replace(file)
        server.send_signal(signal.SIGHUP)
        until(lambda: complete(url, carol).status_code == 200)
        assert [complete(url, bob).status_code for _ in range(2)] == [200, 429]
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=60)
        assert server.returncode == 0
    assert "new: bob; gone or changed: alice" in said
    assert "the keys stay as they were" in said
    assert "no config file" in said
    assert "new: carol; gone or changed: none" in said
    assert not any(key in said for key in (KEY, bob, carol))


@pytest.mark.parametrize("how", ["beside", pytest.param("inplace", marks=pytest.mark.slow)])
def test_a_reload_is_one_at_a_time_and_drops_nobody(tmp_path: Path, how: str) -> None:
    keys, new = tmp_path / "keys.toml", "fake:name=b,load=5,step=0.002"
    keys.write_text(f'[root]\nkey = "{ADMIN}"\nadmin = true\n')
    (tmp_path / new).touch()
    with process(tmp_path, "fake:name=a,step=0.002", keys_file=keys, reload=how) as (_, url):

        def reload(path: str) -> httpx2.Response:
            return httpx2.post(f"{url}/admin/reload", json={"path": path}, headers=ROOT, timeout=60)

        def flow() -> list[tuple[int, str]]:
            seen = []
            while not stop:
                answer = complete(url, ADMIN, max_tokens=20)
                seen.append((answer.status_code, answer.json().get("system_fingerprint", "")))
            return seen

        stop: list[bool] = []
        with ThreadPoolExecutor(6) as pool:
            flows = [pool.submit(flow) for _ in range(4)]
            first = pool.submit(reload, new)
            time.sleep(1.0)
            refused = [reload(path) for path in (new, "fake:name=a,step=0.002")]
            assert not first.done(), "they were not made to wait"
            for answer in refused:
                assert (answer.status_code, answer.headers["retry-after"]) == (409, "2")
                assert answer.json()["error"]["code"] == "reload_in_progress"
                assert f"{new} is being loaded" in answer.json()["error"]["message"]
            assert httpx2.get(f"{url}/ready", timeout=60).status_code == (200 if how == "beside" else 503)
            assert first.result().status_code == 200
            time.sleep(0.2)
            stop.append(True)
            seen = [pair for f in flows for pair in f.result()]
        assert {status for status, _ in seen} == {200}
        assert len({fingerprint for _, fingerprint in seen}) == 2, "the old model, then the new one"
        assert reload("fake:name=a,step=0.002").status_code == 200, "and again"


def test_a_server_whose_engine_is_given_up_ends_and_says_why(tmp_path: Path) -> None:
    """Whoever started it can start it again; a server that nobody can use any more helps nobody."""
    with process(tmp_path, "fake:die_on=7", max_crashes=0) as (server, url):
        assert complete(url).status_code == 200
        dead = complete(url, prompt=[7, 2])
        assert (dead.status_code, dead.json()["error"]["code"]) == (503, "engine_lost")
        said = server.communicate(timeout=60)[1]
        assert server.returncode == 1
        assert "given up: its step process died 1 times" in said


def test_a_request_that_may_have_killed_two_step_processes_is_not_to_be_sent_again(tmp_path: Path) -> None:
    with process(tmp_path, "fake:die_on=7", backoff=0.05) as (server, url):
        dead = complete(url, prompt=[7, 2])
        assert (dead.status_code, dead.json()["error"]["code"]) == (503, "engine_crashed")
        assert (dead.headers["x-should-retry"], "retry-after" in dead.headers) == ("false", False)
        assert complete(url).status_code == 200
        assert server.poll() is None
