"""Two ranks: the slow one is seen although both finish together, and both name their documents of a bad step."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from recipe_runs import free_port, identical, smallest, start, tensors, write_config, write_corpus

from deepseek.config import replace
from deepseek.monitor.config import MonitorConfig

RANK = """
import json, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from deepseek.dist import comm
from deepseek.events import MemorySink, Sink, emit
from deepseek.monitor import probe_ranks
from deepseek.recipes import observe, pretrain as recipe
from deepseek.train import TrainStep

folder = Path(sys.argv[1])
rank, world = comm.start()
probe_ranks.PERIOD = 0.0
slow = TrainStep.micro
def micro(self, *args, **kwargs):
    if rank == 1:
        time.sleep(0.2)
    return slow(self, *args, **kwargs)
TrainStep.micro = micro

kept = []
from deepseek.recipes.respond import Responder
def explained(self, step, samples):
    found = [i for i in self._unexplained if i["step"] == step]
    for incident in found:
        self._unexplained.remove(incident)
        kept.append({**incident, "samples": samples})
Responder.explained = explained

class Alarm(Sink):
    def write(self, event):
        if event.name == "train" and event.step in (3, 8):
            emit("incident", event.step, kind="loss_spike", severity="critical", id=event.step, step=event.step)

sink = MemorySink()
config = recipe.read_config(folder / "on.toml")
recipe.pretrain(config, folder / "on", sinks=[sink, Alarm()])
recipe.pretrain(recipe.read_config(folder / "off.toml"), folder / "off")
comm.barrier()
comm.stop()
ranks = [{"step": e.step, **e.values} for e in sink.events if e.name == "ranks"]
seconds = [e.values["seconds"] for e in sink.events if e.name == "train"]
print(json.dumps({"rank": rank, "ranks": ranks, "seconds": seconds, "kept": kept}))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    config = smallest(write_corpus(folder / "corpus"), data={"cache": str(folder / "cache")})
    write_config(replace(config, monitor=MonitorConfig(every=2, samples=64)), folder / "on.toml")
    write_config(replace(config, monitor=MonitorConfig(enabled=False)), folder / "off.toml")
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [start(RANK, folder, env={"RANK": str(r), "LOCAL_RANK": str(r), **group}) for r in range(2)]
    try:
        told = [p.communicate(timeout=300) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(errors for _, errors in told)
    return folder, [json.loads(out.splitlines()[-1]) for out, _ in told]


pytestmark = pytest.mark.slow


def test_two_ranks_train_the_same_with_the_monitor_and_without(
    ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, _ = ranks
    assert identical(tensors(folder / "on"), tensors(folder / "off"))


def test_the_slow_rank_is_told_apart_from_the_first_steps_on(
    ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    first, second = ranks[1]
    assert [e["step"] for e in first["ranks"]] == sorted(e["step"] for e in first["ranks"])
    assert second["ranks"] == []  # events are rank 0's
    assert first["ranks"][0]["step"] <= 3
    later = [e["seconds"] for e in first["ranks"] if e["step"] > 1]
    assert later
    assert median(slow - fast for fast, slow in later) > 0.2  # two micro-batches a step, 0.2 s each
    assert all(len(e["memory"]) == 2 and min(e["memory"]) > 1e7 for e in first["ranks"])
    assert median(s["communication"] for s in first["seconds"]) > 0.2  # rank 0 waits for the other


def test_the_documents_of_both_ranks_are_named(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = ranks[1]
    assert second["kept"] == []
    assert [incident["step"] for incident in first["kept"]] == [3, 8]  # the last step's, too
    for incident in first["kept"]:
        rows = {sample["row"] for sample in incident["samples"]}
        assert rows == set(range(8))
        losses = [s["loss"] for s in incident["samples"] if s["length"] > 8]
        assert losses == sorted(losses, reverse=True)
