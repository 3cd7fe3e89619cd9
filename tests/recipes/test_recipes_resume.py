"""A run that was interrupted ends bit for bit where an undisturbed one ends."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from recipe_runs import (
    checkpointed,
    events,
    identical,
    losses,
    smallest,
    start,
    tensors,
    write_config,
    write_corpus,
)

from deepseek.config import replace
from deepseek.errors import ConfigError
from deepseek.events import MemorySink
from deepseek.recipes.pretrain import PretrainConfig, pretrain, read_config, resume_run
from deepseek.train import Schedule, Stop
from deepseek.weights import checkpoint

STEPS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("resume") / "corpus")


@pytest.fixture(scope="module")
def config(corpus: Path) -> PretrainConfig:
    return smallest(corpus, data={"cache": str(corpus.parent / "cache")})


@pytest.fixture(scope="module")
def straight(config: PretrainConfig, corpus: Path) -> Path:
    """An undisturbed run of ``STEPS`` steps with a checkpoint after every one."""
    run = corpus.parent / "straight"
    assert pretrain(checkpointed(config, 1), run).finished
    return run


@pytest.fixture(autouse=True)
def _forget_determinism() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


class StopAt(MemorySink):
    """Asks a run to stop once it has told of step ``step``; also disturbs every global random generator."""

    def __init__(self, stop: Stop, step: int) -> None:
        super().__init__()
        self.stop, self.step = stop, step

    def write(self, event: object) -> None:
        super().write(event)  # type: ignore[arg-type]
        torch.rand(3)
        if getattr(event, "name", "") == "train" and getattr(event, "step", 0) == self.step:
            self.stop.request("test")


def stopped(config: PretrainConfig, run: Path, at: int, resume: bool = False) -> None:
    stop = Stop()
    sink = StopAt(stop, at)
    torch.manual_seed(random.randrange(2**31))  # a new process would not have the old one's generators
    result = (
        resume_run(run, sinks=[sink], stop=stop) if resume else pretrain(config, run, sinks=[sink], stop=stop)
    )
    assert (result.step, result.finished) == (at, False)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_stopping_anywhere_once_or_twice_changes_no_bit(
    config: PretrainConfig, tmp_path: Path, deterministic: bool, optimizer: str
) -> None:
    config = replace(
        config,
        train=replace(config.train, deterministic=deterministic),
        optim=replace(config.optim, name=optimizer),
    )
    pretrain(config, tmp_path / "whole")
    stopped(config, tmp_path / "run", at=3)
    stopped(config, tmp_path / "run", at=5, resume=True)
    assert resume_run(tmp_path / "run").finished
    found, want = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert any("router.bias" in k for k in want)
    assert any("default_EC" in k for k in want)
    assert any(k.startswith("optimizer/") for k in want)
    assert identical(found, want)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert sorted(losses(tmp_path / "run")) == list(range(1, STEPS + 1))


def test_resuming_at_every_step_is_the_same_as_not_stopping(
    config: PretrainConfig, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopped(config, run, at=1)
    for at in range(2, STEPS):
        stopped(config, run, at=at, resume=True)
        assert identical(tensors(run, at), tensors(straight, at)), at
    assert resume_run(run).finished
    assert identical(tensors(run), tensors(straight))
    assert losses(run) == losses(straight)


def test_checkpoint_state_goes_on_with_loader_generators_and_config(
    straight: Path, config: PretrainConfig
) -> None:
    state = checkpoint.load(straight / "step-000004").state
    assert state["loader"]["batch"] == 4
    assert state["world"] == 1
    assert state["config"]["train"]["steps"] == STEPS
    assert state["loss"] == losses(straight)[4]


def test_going_back_to_an_earlier_step_repeats_history_and_shelves_the_other(
    straight: Path, config: PretrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pretrain(checkpointed(config, 2), run)
    assert resume_run(run, step=4).finished
    assert identical(tensors(run), tensors(straight))
    assert [p.name for p in checkpoint.list_checkpoints(run)] == [f"step-{s:06d}" for s in (2, 4, 6, 8)]
    resumed = [e for e in events(run) if e["event"] == "resume"]
    assert [e["step"] for e in resumed] == [4]


def test_options_that_turn_out_unusable_leave_the_run_as_it_was(
    config: PretrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pretrain(checkpointed(config, 2), run)
    before = (run / "config.toml").read_text()
    longer = replace(config.train, steps=12, activation_checkpoint="budget=0.001")
    with pytest.raises(ConfigError, match="cannot be trained keeping"):
        resume_run(run, replace(config, train=longer))
    assert (run / "config.toml").read_text() == before
    assert resume_run(run, replace(config, train=replace(config.train, steps=9))).step == 9


def test_more_steps_can_be_asked_for_on_resume(config: PretrainConfig, tmp_path: Path) -> None:
    """The rates follow the longer schedule from there on; the data goes on."""
    run = tmp_path / "run"
    pretrain(config, run)
    again = resume_run(run)
    assert (again.step, again.finished) == (STEPS, True)  # nothing left to do
    assert len(checkpoint.list_checkpoints(run)) == 1
    kept = read_config(run / "config.toml")
    longer = replace(kept, train=replace(kept.train, steps=12))
    sink = MemorySink()
    assert resume_run(run, longer, sinks=[sink]).step == 12
    assert [e.step for e in sink.events if e.name == "train"] == [9, 10, 11, 12]
    want = [config.optim.lr * Schedule(config.schedule, 12).factor(i) for i in range(8, 12)]
    assert sink.series("train", "lr") == pytest.approx(want)
    assert read_config(run / "config.toml") == longer
    assert checkpoint.load(run).state["loader"]["batch"] == 12


TRAIN = """
import sys, warnings
warnings.simplefilter("error")
import torch
torch.set_num_threads(1)
from pathlib import Path
from deepseek.recipes.pretrain import pretrain, read_config, resume_run
from deepseek.weights import checkpoint
from deepseek.events import Sink
class Slow(Sink):
    def write(self, event):
        import time
        if event.name == "train":
            print(event.step, flush=True)
            time.sleep(float(sys.argv[3]))
run = Path(sys.argv[2])
go_on = checkpoint.latest(run) is not None
done = resume_run(run, sinks=[Slow()]) if go_on else pretrain(read_config(sys.argv[1]), run, sinks=[Slow()])
print("end", done.step, done.finished, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_cleanly_and_another_process_goes_on(
    number: signal.Signals, config: PretrainConfig, straight: Path, tmp_path: Path
) -> None:
    run, toml = tmp_path / "run", write_config(config, tmp_path / "c.toml")
    process = start(TRAIN, toml, run, 0.2)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "3":
        assert process.poll() is None
    process.send_signal(number)
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    stopped_at = int(out.split("end ")[1].split()[0])
    assert out.strip().endswith("False")
    assert 3 <= stopped_at < STEPS
    assert [p.name for p in checkpoint.list_checkpoints(run)] == [f"step-{stopped_at:06d}"]
    assert [e["signal"] for e in events(run) if e["event"] == "interrupted"] == [number.name]
    process = start(TRAIN, toml, run, 0)
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert out.strip().endswith(f"end {STEPS} True")
    assert identical(tensors(run), tensors(straight))


FORKED = """
import os, random, signal, sys, time, warnings
warnings.simplefilter("error")
import torch
torch.set_num_threads(1)
from pathlib import Path
from deepseek.recipes.pretrain import pretrain, read_config, resume_run
from deepseek.weights import checkpoint
config, run = read_config(sys.argv[1]), Path(sys.argv[2])
random.seed(0)
kills = 0
while True:
    reader, out = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            from deepseek.events import Sink
            class Tell(Sink):
                def write(self, event):
                    os.write(out, b".")
            if checkpoint.latest(run) is None:
                pretrain(config, run, sinks=[Tell()])
            else:
                resume_run(run, sinks=[Tell()])
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    os.close(out)
    os.read(reader, 1)
    if kills < int(sys.argv[3]):
        time.sleep(random.uniform(0.0, 0.5))
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(reader)
    if status == -9:
        kills += 1
    elif status == 0:
        break
    else:
        sys.exit(f"exit {status} after {kills} kills")
print(kills)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_killed_again_and_again_ends_where_an_undisturbed_one_ends(
    config: PretrainConfig, tmp_path: Path
) -> None:
    config = replace(checkpointed(config, 2), train=replace(config.train, steps=40))
    pretrain(config, tmp_path / "whole")
    process = start(FORKED, write_config(config, tmp_path / "c.toml"), tmp_path / "run", 12)
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert int(out) >= 5
    assert identical(tensors(tmp_path / "run"), tensors(tmp_path / "whole"))
    told = losses(tmp_path / "run")  # what was told last of a step is what an undisturbed run tells
    want = losses(tmp_path / "whole")
    assert told.keys() <= want.keys()
    assert all(want[step] == loss for step, loss in told.items())


def test_the_config_decides_every_bit_of_a_run(
    config: PretrainConfig, straight: Path, tmp_path: Path
) -> None:
    pretrain(config, tmp_path / "run")
    assert identical(tensors(tmp_path / "run"), tensors(straight))
    other = replace(config, train=replace(config.train, seed=1))
    pretrain(other, tmp_path / "other")
    assert not identical(tensors(tmp_path / "other"), tensors(straight))
