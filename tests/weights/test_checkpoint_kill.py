"""``kill -9`` at any moment: at random ones, and before every single change to the disk.

A supervisor process imports torch once and forks the writers that are killed. Writers save values that follow
from a counter ``g``, every step twice, so that new steps, replaced steps and retention come under the knife.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

COMMON = """
import contextlib, json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from deepseek.weights.checkpoint import CheckpointConfig, Checkpointer, latest, list_checkpoints, load
run, base = Path(sys.argv[1]), Path(sys.argv[2])

def tensors(g):
    return {"model": {f"w{i}": torch.full((50, 7), float(g * 10 + i)) for i in range(3)},
            "optimizer": {"m": torch.arange(100) + g}}

def value(path):
    read = load(path)
    g = read.state["g"]
    assert read.step == g // 2, (read.step, g)
    for name, group in tensors(g).items():
        assert set(group) == set(read.tensors[name])
        for key, tensor in group.items():
            assert torch.equal(tensor, read.tensors[name][key]), (g, key)
    return g

def save(writer, g, **more):
    writer.save(g // 2, tensors=tensors(g), state={"g": g}, metric=float(g % 7), **more)

def hidden():
    return [p.name for p in run.iterdir() if p.name != ".lock" and not p.name[0] == "s"]
"""

RANDOM = """
random.seed(1)
results, g = [], 0
for attempt in range(40):
    reader, out = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with Checkpointer(run, CheckpointConfig(keep_last=2, asynchronous=attempt % 2 == 0)) as writer:
                if attempt:
                    g = value(run)
                while True:
                    g += 1
                    save(writer, g)
                    writer.wait()
                    os.write(out, b"%d\\n" % g)
        except BaseException as error:
            os.write(out, b"-1\\n")
            print(repr(error), file=sys.stderr)
        os._exit(1)
    os.close(out)
    first = os.read(reader, 64)   # at least one save is complete
    time.sleep(random.uniform(0, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as rest:
        told = [int(x) for x in (first + rest.read()).split()]
    found = [value(path) for path in list_checkpoints(run)]
    results.append({"told": told[-1], "found": found, "latest": value(run), "left": len(hidden())})
Checkpointer(run).close()
print(json.dumps({"results": results, "hidden": hidden()}))
"""

EVERY = """
import deepseek.files
with Checkpointer(base) as writer:
    for g in (2, 4, 6):
        save(writer, g)
results, n, before = [], 0, os.environ["WHICH"]
done = False
while not done:
    n += 1
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(base, run)
    child = os.fork()
    if child == 0:
        count = 0
        def knife(real):
            def cut(*args, **options):
                global count
                count += 1
                if count == n:
                    os._exit(9)
                return real(*args, **options)
            return cut
        os.fsync, os.unlink, os.rmdir = knife(os.fsync), knife(os.unlink), knife(os.rmdir)
        for name in ("rename", "mkdir", "unlink"):
            setattr(Path, name, knife(getattr(Path, name)))
        Path.open = knife(Path.open)
        try:
            config = CheckpointConfig(keep_last=2, keep_best=False, asynchronous=False)
            with Checkpointer(run, config) as writer:
                save(writer, {"new": 8, "same": 7, "back": 5}[before])
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    done = code == 0
    seen = value(run)
    all_seen = [value(path) for path in list_checkpoints(run)]
    Checkpointer(run).close()
    results.append({"code": code, "seen": seen, "after": value(run), "all": all_seen,
                    "new": [p.name for p in run.glob("*.new")],
                    "hidden": [h for h in hidden() if h != "abandoned"]})
print(json.dumps(results))
"""


def supervise(code: str, tmp_path: Path, which: str = "") -> Any:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + code, str(tmp_path / "run"), str(tmp_path / "base")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WHICH": which},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_loads_and_has_lost_nothing_it_reported(tmp_path: Path) -> None:
    outcome = supervise(RANDOM, tmp_path)
    assert len(outcome["results"]) == 40
    for result in outcome["results"]:
        assert result["told"] > 0
        assert result["latest"] == max(result["found"])
        assert result["told"] <= result["latest"] <= result["told"] + 1
    assert any(result["left"] for result in outcome["results"])  # some were killed in the middle of a save
    assert outcome["hidden"] == []


@pytest.mark.slow
@pytest.mark.parametrize(("which", "old", "new"), [("new", 6, 8), ("same", 6, 7), ("back", 6, 5)])
def test_a_run_killed_before_each_change_to_the_disk_loads(
    tmp_path: Path, which: str, old: int, new: int
) -> None:
    results = supervise(EVERY, tmp_path, which)
    assert len(results) > 20
    assert [r["code"] for r in results] == [9] * (len(results) - 1) + [0]
    switched = False
    for result in results:
        assert result["seen"] in (old, new)
        switched = switched or result["seen"] == new
        assert (result["seen"] == new) == switched  # once visible, it stays
        assert result["after"] == result["seen"]  # tidying up changes nothing that a reader sees
        assert not result["new"]
        assert not result["hidden"]
    assert results[0]["seen"] == old
    assert results[-1]["seen"] == new
