import json
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepseek.errors import CheckpointError, ConfigError
from deepseek.events import MemorySink, attached
from deepseek.weights import checkpoint as module
from deepseek.weights.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    best,
    latest,
    list_checkpoints,
    load,
    rng_state,
    set_rng_state,
)

SYNC = CheckpointConfig(asynchronous=False)


def model(step: int) -> dict[str, dict[str, Tensor]]:
    return {"model": {"w": torch.full((4, 3), float(step))}, "optimizer": {"m": torch.arange(3) + step}}


def save(run: Path, *steps: int, config: CheckpointConfig = SYNC, **options: Any) -> None:
    with Checkpointer(run, config) as writer:
        for step in steps:
            writer.save(step, tensors=model(step), state={"step": step}, **options)


def names(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run)]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, asynchronous: bool) -> None:
    state = {
        "cursor": {"file": 3, "offset": 2**60},
        "lr": 0.1,
        "text": "é\ud800",
        "inf": float("inf"),
        "none": None,
    }
    sink = MemorySink()
    with (
        attached(sink),
        Checkpointer(tmp_path, CheckpointConfig(asynchronous=asynchronous), world=4) as writer,
    ):
        path = writer.save(500, tensors=model(500), state=state, metric=1.5)
    assert path == tmp_path / "step-000500"
    read = load(tmp_path)
    assert (read.step, read.path, read.state) == (500, path, state)
    assert torch.equal(read.model["w"], model(500)["model"]["w"])
    assert torch.equal(read.optimizer["m"], model(500)["optimizer"]["m"])
    assert (read.manifest.metric, read.manifest.world, read.manifest.parent) == (1.5, 4, None)
    assert set(read.manifest.code) >= {"version"}
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    (event,) = sink.events
    assert (event.name, event.step, event.values["path"]) == ("checkpoint", 500, str(path))
    assert event.values["bytes"] == sum(f.stat().st_size for f in path.iterdir() if f.name != "manifest.json")
    assert event.values["seconds"] >= event.values["stall_seconds"] > 0


def test_only_the_groups_asked_for_are_read(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-000001" / "optimizer.safetensors").write_bytes(
        bytes((tmp_path / "step-000001" / "optimizer.safetensors").stat().st_size)
    )
    read = load(tmp_path, groups=["model"])
    assert set(read.tensors) == {"model"}
    assert read.optimizer == {}
    with pytest.raises(CheckpointError, match=r"no tensor group 'modle' \(did you mean 'model'\?\)"):
        load(tmp_path, groups=["modle"])


def test_a_background_save_is_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), module.write_group

    def slow(*args: Any) -> Any:
        assert gate.wait(120)
        return write(*args)

    monkeypatch.setattr(module, "write_group", slow)
    weights = torch.zeros(1000)
    with Checkpointer(tmp_path) as writer:
        for step in (1, 2):  # the second reuses the host buffers of the first
            gate.clear()
            writer.save(step, tensors={"model": {"w": weights}}, state={})
            weights.add_(1)
            assert names(tmp_path) == [f"step-{s:06d}" for s in range(1, step)]  # invisible while incomplete
            gate.set()
            writer.wait()
    assert torch.equal(load(tmp_path / "step-000001").model["w"], torch.zeros(1000))
    assert torch.equal(load(tmp_path / "step-000002").model["w"], torch.ones(1000))


def test_one_save_at_a_time_and_errors_are_raised_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("the writer broke")

    writer = Checkpointer(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_group", fail)
        writer.save(1, tensors=model(1), state={})
        with pytest.raises(CheckpointError, match=r"could not write .*the writer broke"):
            writer.save(2, tensors=model(2), state={})
        with pytest.raises(CheckpointError, match="the writer broke"):
            writer.save(3, tensors=model(3), state={}, wait=True)
    writer.save(4, tensors=model(4), state={}, wait=True)
    writer.close()
    assert names(tmp_path) == ["step-000004"]
    assert load(tmp_path).manifest.parent is None  # no failed save enters the lineage
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")] == []


def test_an_error_on_its_way_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_group", lambda *a: 1 / 0)

    def interrupted() -> None:
        with Checkpointer(tmp_path) as writer:
            writer.save(1, tensors=model(1), state={})
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "left"),
    [(3, True, [2, 5, 6, 7]), (3, False, [5, 6, 7]), (1, True, [2, 7]), (0, True, [1, 2, 3, 4, 5, 6, 7])],
)
def test_retention(tmp_path: Path, keep_last: int, keep_best: bool, left: list[int]) -> None:
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=keep_last, keep_best=keep_best)) as writer:
        for step in range(1, 8):
            metric = {1: float("nan"), 3: None}.get(step, abs(step - 2.0))
            writer.save(step, tensors=model(step), state={}, metric=metric)
    assert names(tmp_path) == [f"step-{s:06d}" for s in left]
    assert best(tmp_path) == tmp_path / f"step-{2 if 2 in left else 5:06d}"
    assert latest(tmp_path) == tmp_path / "step-000007"
    assert load(tmp_path).manifest.parent == 6


def test_retention_leaves_the_damaged_and_the_foreign_alone(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step-000001" / "manifest.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    save(tmp_path, 3, 4, config=CheckpointConfig(keep_last=1))
    assert names(tmp_path) == ["step-000001", "step-000004"]
    assert (tmp_path / "notes").is_dir()


def test_the_same_step_is_replaced_and_later_steps_are_set_aside(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    with Checkpointer(tmp_path, SYNC, parent=1) as writer:
        writer.save(2, tensors=model(20), state={})
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert load(tmp_path).model["w"][0, 0] == 20
    assert load(tmp_path).manifest.parent == 1
    assert load(tmp_path / "abandoned" / "step-000003").model["w"][0, 0] == 3
    save(tmp_path, 3, 2)
    assert (tmp_path / "abandoned" / "step-000003-1").is_dir()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = Checkpointer(tmp_path / "run", rank=1, world=2)
    assert writer.save(1, tensors=model(1), state={}, wait=True) == tmp_path / "run" / "step-000001"
    writer.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": {"a": {3: 1}}}, r"state\['a'\] has the key 3"),
        ({"state": {"a": torch.ones(1)}}, "tensors belong in `tensors`"),
        ({"tensors": {"model": {"w": [1.0]}}}, "is a list, not a tensor"),
        ({"tensors": {"model": {"w": torch.ones(2, device="meta")}}}, "meta device"),
        ({"tensors": {"model": {"w": torch.eye(2).to_sparse()}}}, "sparse"),
        ({"tensors": {"../model": {}}}, "tensor group cannot be called"),
        ({"tensors": {"model": {"__metadata__": torch.ones(1)}}}, "cannot name a tensor"),
        ({"step": -1}, "whole number"),
        ({"step": 1.5}, "whole number"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_once(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with Checkpointer(tmp_path) as writer, pytest.raises(CheckpointError, match=message):
        writer.save(**{"step": 1, "tensors": model(1), "state": {}, **arguments})
    assert list_checkpoints(tmp_path) == []


def test_config_refuses_negative_numbers() -> None:
    with pytest.raises(ConfigError, match="every is -1"):
        CheckpointConfig(every=-1)
    with pytest.raises(ConfigError, match="keep_last is -1"):
        CheckpointConfig(keep_last=-1)


def test_a_run_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints"):
        Checkpointer(tmp_path / "file")


def test_the_interpreter_finishes_a_background_save_before_it_exits(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from deepseek.weights.checkpoint import Checkpointer; from pathlib import Path\n"
        "Checkpointer(Path(sys.argv[1])).save(7, tensors={'model': {'w': torch.ones(500_000)}}, state={})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    assert load(tmp_path).model["w"].sum() == 500_000
    assert names(tmp_path) == ["step-000007"]


def test_rng_state_makes_every_generator_go_on(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            torch.rand(1).item(),
        ]

    draw()
    torch.randn(1)
    with Checkpointer(tmp_path, SYNC) as writer:
        writer.save(1, tensors={}, state={"rng": rng_state()})
    expected = [draw(), draw()]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert draw() != expected[0]
    set_rng_state(load(tmp_path).state["rng"])
    assert [draw(), draw()] == expected


@pytest.mark.parametrize(
    "change", [{"python": [3, [1], None]}, {"numpy": ["x", []]}, {"torch": "?"}, {"torch": ""}]
)
def test_a_malformed_rng_state_is_refused(change: dict[str, Any]) -> None:
    state = json.loads(json.dumps(rng_state()))
    with pytest.raises(CheckpointError, match="random state"):
        set_rng_state({**state, **change})
    with pytest.raises(CheckpointError, match="random state"):
        set_rng_state({})
    set_rng_state(state)


def test_a_run_directory_that_vanished_is_named(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as writer:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(CheckpointError, match=r"cannot write .*run"):
            writer.save(1, tensors=model(1), state={})


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_an_accelerator_is_copied_and_its_generators_go_on(tmp_path: Path) -> None:
    device = torch.accelerator.current_accelerator()
    weights = torch.randn(2000, 2000, device=device)
    expected = weights.cpu()
    with Checkpointer(tmp_path) as writer:
        for step in (1, 2):
            writer.save(step, tensors={"model": {"w": weights}}, state={"rng": rng_state()})
            weights.add_(1)
    drawn = torch.rand(5, device=device)
    read = load(tmp_path / "step-000001", device=str(device))
    assert read.model["w"].device.type == weights.device.type
    assert torch.equal(read.model["w"].cpu(), expected)
    set_rng_state(load(tmp_path).state["rng"])
    assert torch.equal(torch.rand(5, device=device), drawn)
