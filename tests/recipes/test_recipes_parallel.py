"""Two ranks are one process: losses, weights, samples, and a change of the number of ranks on resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import (
    checkpointed,
    events,
    free_port,
    largest_difference,
    losses,
    smallest,
    start,
    tensors,
    write_config,
    write_corpus,
)

from deepseek.config import replace
from deepseek.errors import ConfigError
from deepseek.events import Event, MemorySink
from deepseek.recipes.pretrain import PretrainConfig, pretrain, resume_run
from deepseek.train import Stop

STEPS, HALF = 8, 4

RANK = """
import json, sys, warnings
import torch
torch.set_num_threads(1)
from pathlib import Path
from deepseek.batch import IGNORE
from deepseek.dist import comm
from deepseek.events import Sink
from deepseek.recipes import pretrain as recipe
from deepseek.train import Stop, TrainStep

folder = Path(sys.argv[1])
rank, world = comm.start()
assert world == 2 and comm.rank() == rank

counted = [0, 0]
real = TrainStep.__call__
def counting(self, batch):
    counted[0] += int((batch.targets != IGNORE).sum())
    counted[1] += batch.n_targets
    return real(self, batch)
TrainStep.__call__ = counting

class StopAt(Sink):
    def __init__(self, stop): self.stop = stop
    def write(self, event):
        if event.name == "train" and event.step == 4: self.stop.request("only rank 0 knows")

for name in ("floor", "plain"):
    recipe.pretrain(recipe.read_config(folder / f"{name}.toml"), folder / f"{name}-two")
stop = Stop()
config = recipe.read_config(folder / "floor.toml")
result = recipe.pretrain(config, folder / "two-then-one", sinks=[StopAt(stop)], stop=stop)
assert result.step == 4 and not result.finished, result
assert stop.agreed and bool(stop.reason) == (rank == 0)
assert recipe.resume_run(folder / "one-then-two").finished
assert recipe.resume_run(folder / "one-then-two").finished  # nothing left to do, on any rank

assert comm.agree(rank == 1) is True and comm.agree(False) is False
assert comm.from_first({"rank": rank}) == {"rank": 0}
mixed = [torch.full((2, 3), float(rank + 1)), torch.tensor(rank + 1), torch.full((4,), rank + 1.0)]
comm.sum_in_place(mixed)
assert [m.unique().tolist() for m in mixed] == [[3.0], [3], [3.0]]
share = torch.tensor(counted[0])
comm.sum_in_place([share])
try:
    recipe.pretrain(recipe.replace(config, train=recipe.replace(config.train, batch_tokens=7 * 32)), folder / "odd")
    refused = ""
except Exception as error:
    refused = f"{type(error).__name__}: {error}"
comm.barrier()
comm.stop()
print(json.dumps({"rank": rank, "targets": int(share), "counted": counted[1], "own": counted[0], "refused": refused}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def configs(folder: Path) -> dict[str, PretrainConfig]:
    """``floor``: one row at a time, so that token floor and balance loss see the same forward passes everywhere;
    ``plain``: without them, and rows grouped differently on one rank and on two."""
    base = smallest(write_corpus(folder / "corpus"), data={"cache": str(folder / "cache")})
    base = checkpointed(replace(base, evaluate=replace(base.evaluate, every=3)), 2)
    quiet = replace(base.model, moe=replace(base.model.moe, token_floor=0.0, entropy_weight=0.0))
    found = {
        "floor": replace(base, train=replace(base.train, micro_rows=1)),
        "plain": replace(base, model=quiet, train=replace(base.train, micro_rows=3)),
    }
    for name, config in found.items():
        write_config(config, folder / f"{name}.toml")
        pretrain(config, folder / f"{name}-one")
    return found


class _StopAt(MemorySink):
    def __init__(self, stop: Stop) -> None:
        super().__init__()
        self.stop = stop

    def write(self, event: Event) -> None:
        if event.name == "train" and event.step == HALF:
            self.stop.request("test")


@pytest.fixture(scope="module")
def ranks(folder: Path, configs: dict[str, PretrainConfig]) -> list[dict[str, Any]]:
    stop = Stop()
    assert pretrain(configs["floor"], folder / "one-then-two", sinks=[_StopAt(stop)], stop=stop).step == HALF
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [start(RANK, folder, env={"RANK": str(r), "LOCAL_RANK": str(r), **group}) for r in range(2)]
    try:
        told = [p.communicate(timeout=300) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(errors for _, errors in told)
    assert resume_run(folder / "two-then-one").finished
    return [json.loads(out.splitlines()[-1]) for out, _ in told]


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["floor", "plain"])
def test_two_ranks_train_what_one_process_trains(
    name: str, folder: Path, ranks: list[dict[str, Any]]
) -> None:
    one, two = losses(folder / f"{name}-one"), losses(folder / f"{name}-two")
    assert sorted(two) == list(range(1, STEPS + 1))
    assert two == pytest.approx(one, abs=1e-5)
    assert largest_difference(tensors(folder / f"{name}-one"), tensors(folder / f"{name}-two")) < 1e-5


@pytest.mark.parametrize("history", ["two-then-one", "one-then-two"])
def test_the_number_of_ranks_may_change_on_resume(
    history: str, folder: Path, ranks: list[dict[str, Any]]
) -> None:
    assert losses(folder / history) == pytest.approx(losses(folder / "floor-one"), abs=1e-5)
    assert largest_difference(tensors(folder / history), tensors(folder / "floor-one")) < 1e-5


def test_the_ranks_share_every_target_of_every_batch(ranks: list[dict[str, Any]]) -> None:
    assert (
        ranks[0]["targets"] == ranks[0]["counted"] == ranks[1]["counted"] == ranks[0]["own"] + ranks[1]["own"]
    )
    assert min(r["own"] for r in ranks) > 0


def test_evaluations_add_up_over_ranks(folder: Path, ranks: list[dict[str, Any]]) -> None:
    def evaluations(run: str) -> dict[int, tuple[float, int, int]]:
        found = [e for e in events(folder / run) if e["event"] == "evaluate"]
        return {e["step"]: (e["bits_per_byte"], e["tokens"], e["bytes"]) for e in found}

    one, two = evaluations("plain-one"), evaluations("plain-two")
    assert sorted(one) == sorted(two) == [3, 6, 8]
    for step, (bits, tokens, size) in one.items():
        assert two[step] == (pytest.approx(bits, abs=1e-5), tokens, size)


def test_rows_that_do_not_divide_are_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["refused"].startswith(ConfigError.__name__)
        assert "2 ranks" in rank["refused"]
