"""Actions on a run of two processes: all ranks do the same, and it is what one process would do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import (
    checkpointed,
    events,
    free_port,
    identical,
    largest_difference,
    losses,
    smallest,
    start,
    tensors,
    write_config,
    write_corpus,
)

from deepseek.config import replace
from deepseek.monitor.commands import Commands
from deepseek.recipes.pretrain import PretrainConfig, pretrain, resume_run
from deepseek.recipes.provenance import samples_of

pytestmark = pytest.mark.slow

RANK = """
import sys, warnings
import torch
torch.set_num_threads(1)
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from action_runs import Asks
from deepseek.dist import comm
from deepseek.events import Sink
from deepseek.recipes import control
from deepseek.errors import CheckpointError
from deepseek.recipes.pretrain import pretrain, read_config, resume_run
from deepseek.weights.checkpoint import Checkpointer

folder = Path(sys.argv[1])
rank, world = comm.start()
assert world == 2
control.EVERY = 0.0
config = read_config(folder / "config.toml")
run = folder / "live"
gone = {"source": "corpus", "path": "003.txt", "offset": 0}
asked = {
    (4, 1): [("quarantine", {"documents": [gone]}), ("replay", {"step": 4})],
    (5, 1): [("pause", {}), ("replay", {"step": 5, "at": "current"}), ("continue", {}), ("checkpoint", {})],
    (7, 1): [("rollback_skip", {"skip": [2, 2]}), ("quarantine", {"documents": [{**gone, "path": "none"}]})],
    (8, 1): [("checkpoint", {})],
    (9, 1): [("rollback_skip", {"skip": [7, 8]})],
}
if rank == 0:
    real = Checkpointer._check_space
    def full(self, job):
        if job.manifest.step == 8:
            raise CheckpointError("disk full")
        real(self, job)
    Checkpointer._check_space = full
assert pretrain(config, run, sinks=[Asks(run, asked)] if rank == 0 else []).finished
assert resume_run(folder / "offline", skip=(7, 8)).finished
comm.barrier()
comm.stop()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def config(folder: Path) -> PretrainConfig:
    """One row at a time: the same forward passes on one rank and on two."""
    config = smallest(
        write_corpus(folder / "corpus"), data={"cache": str(folder / "cache")}, train={"steps": 10}
    )
    return checkpointed(replace(config, train=replace(config.train, micro_rows=1)), 3)


@pytest.fixture(scope="module")
def two(folder: Path, config: PretrainConfig) -> list[dict[str, Any]]:
    """Both ranks' work done; the answers to what was asked."""
    write_config(config, folder / "config.toml")
    pretrain(config, folder / "straight")
    shutil.copytree(folder / "straight", folder / "offline")
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    here = Path(__file__).parent
    ranks = [start(RANK, folder, here, env={"RANK": str(r), "LOCAL_RANK": str(r), **group}) for r in range(2)]
    try:
        told = [p.communicate(timeout=300) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert [p.returncode for p in ranks] == [0, 0], "\n".join(errors for _, errors in told)
    with Commands(folder / "live") as commands:
        return [c.to_dict() for c in commands.commands()]


def test_every_action_is_answered(two: list[dict[str, Any]]) -> None:
    told = [(c["action"], c["status"]) for c in two]
    assert told == [
        ("quarantine", "done"),
        ("replay", "done"),
        ("pause", "done"),
        ("replay", "done"),
        ("continue", "done"),
        ("checkpoint", "done"),
        ("rollback_skip", "failed"),
        ("quarantine", "failed"),
        ("checkpoint", "failed"),
        ("rollback_skip", "done"),
    ]
    assert two[-2]["result"] == {"error": "disk full"}  # rank 0 alone found out, and no rank waited for ever
    assert two[-1]["result"]["to_step"] == 6
    assert two[-1]["result"]["batches"] == [[6, 7]]


def test_a_resume_that_skips_is_one_process_or_two(folder: Path, two: list[dict[str, Any]]) -> None:
    shutil.copytree(folder / "straight", folder / "one")
    assert resume_run(folder / "one", skip=(7, 8)).finished
    assert losses(folder / "offline") == pytest.approx(losses(folder / "one"), abs=1e-5)
    assert largest_difference(tensors(folder / "offline"), tensors(folder / "one")) < 1e-5


def test_the_live_run_is_the_same_done_by_hand_in_one_process(
    folder: Path, config: PretrainConfig, two: list[dict[str, Any]]
) -> None:
    """Quarantine after step 4, rolled back to 6, steps 7 and 8 left out; here by resumes from checkpoints."""
    run = folder / "by-hand"
    pretrain(replace(config, checkpoint=replace(config.checkpoint, every=4)), run)
    shutil.copy(folder / "live" / "quarantine.jsonl", run)
    pretrain_from = resume_run(run, replace(config, checkpoint=replace(config.checkpoint, every=2)), step=4)
    assert pretrain_from.finished
    assert resume_run(run, config, skip=(7, 8)).finished
    assert losses(run) == pytest.approx(losses(folder / "live"), abs=1e-5)
    assert largest_difference(tensors(run), tensors(folder / "live")) < 1e-5
    assert not identical(tensors(run), tensors(folder / "straight"))


def test_replays_of_two_ranks_list_every_piece_once(folder: Path, two: list[dict[str, Any]]) -> None:
    before, current = (c["result"] for c in two if c["action"] == "replay")
    assert (before["weights"], current["weights"]) == (3, 5)
    assert before["loss"] == pytest.approx(losses(folder / "live")[4], abs=1e-5)
    pieces = {
        (d["row"], d["column"], d["path"], d["offset"], d["start"], d["length"]) for d in before["documents"]
    }
    assert pieces == {
        (s.row, s.column, s.path, s.offset, s.start, s.length) for s in samples_of(folder / "live", 4)
    }
    weighted = sum(d["loss"] * d["length"] for d in before["documents"]) / before["targets"]
    assert weighted == pytest.approx(before["loss"])


def test_the_record_tells_of_each_action_once(folder: Path, two: list[dict[str, Any]]) -> None:
    told = [e for e in events(folder / "live") if e["event"] == "action" and e["status"] != "started"]
    assert [e["id"] for e in told] == [c["id"] for c in two]
    held = [json.loads(line) for line in (folder / "live" / "skips.jsonl").read_text().splitlines()]
    assert [(h["steps"], h["settled"]) for h in held] == [([7, 8], True)]
