"""The one script that runs them all: what it chooses, and that a part that fails or is late leaves the rest alone."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import run_gpu
from run_gpu import PARTS, Part, Runner, chosen


def test_parts_are_chosen_by_name_or_kind() -> None:
    assert chosen("train,moe") == ["train-dense", "train-moe", "moe"]
    assert chosen("optim-target") == ["optim-target"]
    assert set(chosen("")) == {n for n, p in PARTS.items() if not p.asked_only}
    with pytest.raises(SystemExit, match="no part 'trains'"):
        chosen("trains")


def test_every_part_names_a_benchmark() -> None:
    from deepseek.bench import BENCHES

    assert {p.arguments.split()[0] for p in PARTS.values()} == set(BENCHES)


def test_failures_and_lack_of_time_are_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"bad": Part("attention --shapes wrong", 1), "long": Part("attention", 1e6)}
    monkeypatch.setattr(run_gpu, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["run_gpu.py", "--out", str(tmp_path), "--seconds", "100"])
    assert run_gpu.main() == 1
    told = json.loads((tmp_path / "results.json").read_text())
    assert told["bad"]["status"] == 2
    assert told["long"]["skipped"].startswith("needs about 1000000 s")
    assert "not complete: bad" in capsys.readouterr().out
    assert "ROWSxLENGTH" in (tmp_path / "run.log").read_text()


def test_a_part_that_is_late_is_stopped_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_gpu, "PARTS", {"slow": Part("attention", 1)})
    monkeypatch.setattr(run_gpu, "TICK", 0.1)
    script = """import os, sys, time
path = sys.argv[sys.argv.index("--json") + 1]
print("half way", flush=True)
with open(path + "~", "w") as file:
    file.write('{"tables": {"t": [1]}}')
os.replace(path + "~", path)
time.sleep(3600)
"""
    begun: list[int] = []  # its time is over once it has found something

    def told(self: Runner, done: Any, found: Path) -> None:
        note(self, done, found)
        begun.extend([1] * ("result" in done))

    note = Runner.note
    monkeypatch.setattr(Runner, "note", told)
    late = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 1e6 * bool(begun))
    monkeypatch.setattr(run_gpu, "time", late)
    runner = Runner(tmp_path)
    monkeypatch.setattr(
        runner,
        "command",
        lambda name, extra, limit, found: [sys.executable, "-c", script, "--json", str(found)],
    )
    found = runner.run("slow", "", limit=1e5)
    assert found["stopped"]
    assert json.loads((tmp_path / "results.json").read_text())["slow"]["result"] == {"tables": {"t": [1]}}
    assert "half way" in (tmp_path / "run.log").read_text()


def test_goals_are_judged() -> None:
    rows = [
        {
            "stack": "deepseek",
            "tok/s": 350_000,
            "first step s": 80.0,
            "MFU %": 46.3,
            "peak TFLOP/s": 989,
            "of matmul %": 57.0,
        },
        {"stack": "deepseek, forced balance", "tok/s": 380_000, "first step s": 50.0},
        {"stack": "plain-torch, compiled", "tok/s": 243_000, "first step s": 50.0},
    ]
    times = [
        {"attention": "Full, SDPA", "of SDPA, forward+backward": 1.0},
        {"attention": "Hybrid, ours, triton", "of SDPA, forward+backward": 0.6},
    ]
    results = {
        "train-moe": {"result": {"tables": {"training": rows}}},
        "attention": {"result": {"tables": {"time at 1 x 4,096": times}}}, "moe": {"skipped": "no time"},
    }  # fmt: skip
    told = run_gpu.goals(results)
    rows[1:] = []
    assert run_gpu.summary(results)[:2] == [
        "train-moe: deepseek: 350,000 tok/s, MFU 46.3% of 989 TFLOP/s, 57.0% of matmul",
        "met    train-moe, tok/s: 350,000 >= 340,000",
    ]
    assert {what: met for what, *_, met in told} == {
        "train-moe, tok/s": True, "train-moe, first step s": False, "train-moe, tok/s of the best peer": True,
        "hybrid attention 1x4096, of SDPA": False,
    }  # fmt: skip
