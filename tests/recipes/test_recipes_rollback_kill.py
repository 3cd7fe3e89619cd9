"""A process killed in the middle of a rollback leaves a run that goes on as if it had not been."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from recipe_runs import checkpointed, identical, losses, smallest, start, tensors, write_config, write_corpus

from deepseek.recipes.rollback import read_rewinds
from deepseek.weights import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")]

FORKED = """
import os, signal, sys, warnings
warnings.simplefilter("error")
import torch
torch.set_num_threads(1)
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from action_runs import Asks
from deepseek.recipes import control, rollback
from deepseek.recipes import pretrain as recipe
from deepseek.weights import checkpoint

folder = Path(sys.argv[1])
config = recipe.read_config(folder / "config.toml")
control.EVERY = 0.0

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def before(module, name):
    setattr(module, name, die)

def after(module, name):
    real = getattr(module, name)
    def both(*args, **kwargs):
        real(*args, **kwargs)
        die()
    setattr(module, name, both)

def second(module, name):
    real, calls = getattr(module, name), []
    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            die()
        return real(*args, **kwargs)
    setattr(module, name, counted)

POINTS = {
    "before-anything": lambda: before(rollback, "write_rewind"),
    "written-down": lambda: after(rollback, "write_rewind"),
    "weights-are-back": lambda: after(recipe._Pretraining, "_restore"),
    "half-set-aside": lambda: second(checkpoint, "_set_aside"),
    "set-aside": lambda: before(rollback, "settle"),
    "settled": lambda: after(rollback, "settle"),
    "first-step-after": lambda: before(control.Controller, "rewound"),
    "none": lambda: None,
}

def child(name):
    POINTS[name]()
    run = folder / name
    recipe.pretrain(config, run, sinks=[Asks(run, {(10, 1): [("rollback_skip", {"skip": [5, 6]})]})])

for name in POINTS:
    pid = os.fork()
    if pid == 0:
        try:
            if name == "settled":  # the beginning of a run settles nothing
                pass
            child(name)
            os._exit(0)
        except BaseException as error:
            print(name, repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (0 if name == "none" else -9), (name, status)
    if name != "none":
        assert recipe.resume_run(folder / name).finished, name
print("end")
"""


def test_killed_anywhere_in_a_rollback(tmp_path: Path) -> None:
    config = smallest(
        write_corpus(tmp_path / "corpus"), data={"cache": str(tmp_path / "cache")}, train={"steps": 11}
    )
    write_config(checkpointed(config, 3), tmp_path / "config.toml")
    process = start(FORKED, tmp_path, Path(__file__).parent)
    out, problems = process.communicate(timeout=300)
    assert process.returncode == 0, problems
    assert out.strip() == "end"
    want, told = tensors(tmp_path / "none"), losses(tmp_path / "none")
    for name in (
        "written-down",
        "weights-are-back",
        "half-set-aside",
        "set-aside",
        "settled",
        "first-step-after",
    ):
        run = tmp_path / name
        assert identical(tensors(run), want), name
        assert losses(run) == told, name
        (rewind,) = read_rewinds(run)
        assert (rewind.to_step, rewind.batches, rewind.settled) == (3, ((4, 5),), True), name
        assert [p.name for p in checkpoint.list_checkpoints(run)] == [f"step-{s:06d}" for s in (3, 6, 9, 11)]
    untouched = tmp_path / "before-anything"  # killed before the rollback was written down: it never was
    assert not identical(tensors(untouched), want)
    assert read_rewinds(untouched) == []
