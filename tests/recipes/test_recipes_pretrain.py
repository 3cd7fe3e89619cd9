"""What a run writes, what it refuses, and what it survives."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

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

from deepseek import files
from deepseek.assemble import build
from deepseek.batch import IGNORE
from deepseek.config import replace, to_dict
from deepseek.data import prepare
from deepseek.errors import CheckpointError, ConfigError, DataError, DeepseekError, RunError, TrainingError
from deepseek.events import Event, MemorySink
from deepseek.recipes import pretrain as recipe
from deepseek.recipes.pretrain import PretrainConfig, derive, dry_run, pretrain, read_config, resume_run
from deepseek.train import Stop, evaluate
from deepseek.weights import checkpoint
from deepseek.weights.checkpoint import CheckpointConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretrain")


@pytest.fixture(scope="module")
def config(folder: Path) -> PretrainConfig:
    return smallest(
        write_corpus(folder / "corpus"), data={"cache": str(folder / "cache")}, train={"steps": 4}
    )


@pytest.fixture(scope="module")
def finished(config: PretrainConfig, folder: Path) -> Path:
    run = folder / "finished"
    pretrain(checkpointed(config, 2), run)
    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def longer(run: Path, steps: int = 8, **changes: Any) -> PretrainConfig:
    config = read_config(run / "config.toml")
    config = replace(config, train=replace(config.train, steps=steps))
    for name, values in changes.items():
        config = replace(config, **{name: replace(getattr(config, name), **values)})
    return config


def test_the_config_on_disk_is_the_one_that_was_used_and_reads_back_equal(
    config: PretrainConfig, finished: Path
) -> None:
    written = read_config(finished / "config.toml")
    plan = derive(config, prepare(config.data).tokenizer.vocab_size)
    assert written == checkpointed(plan.config, 2)
    assert to_dict(written) == checkpoint.load(finished).state["config"]
    assert written.model.vocab_size % 64 == 0
    assert derive(written, prepare(written.data).tokenizer.vocab_size).config == written


def test_what_was_measured_is_written_so_that_a_resumed_run_measures_nothing_else(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ended = replace(
        config, train=replace(config.train, precision_mode="auto", micro_rows=0, steps=0, tokens=1024)
    )
    pretrain(open_ended, tmp_path / "run")
    train = read_config(tmp_path / "run" / "config.toml").train
    told = next(e for e in events(tmp_path / "run") if e["event"] == "run")
    assert train.precision_mode == told["dtype"] in ("fp32", "bf16")
    assert (train.steps, train.micro_rows) == (4, 8)


def test_a_run_tells_what_it_did(config: PretrainConfig, finished: Path) -> None:
    told = events(finished)
    names = [e["event"] for e in told]
    run = next(e for e in told if e["event"] == "run")
    assert run["total_steps"] == 4
    assert run["parameters"] == sum(
        p.numel() for p in build(read_config(finished / "config.toml").model).parameters()
    )
    assert names.count("train") == 4
    assert names.count("checkpoint") == 2
    assert names[-1] == "done"
    assert [e["step"] for e in told if e["event"] == "evaluate"] == [4]
    steps = [e for e in told if e["event"] == "train"]
    for e in steps:
        assert 0 < e["tokens"] <= 256
        assert len(e["load"]) == 1
        assert sum(e["load"][0]) == pytest.approx(1, abs=1e-5)
        assert list(e["gates"]) == ["1"]
        assert e["lr"] > 0
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_a_run_is_not_overwritten(config: PretrainConfig, finished: Path) -> None:
    before = tensors(finished)
    with pytest.raises(RunError, match=r"already has checkpoints.*deepseek resume"):
        pretrain(config, finished)
    assert identical(tensors(finished), before)


def test_a_strangers_config_file_is_not_overwritten(config: PretrainConfig, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("mine = true\n")
    with pytest.raises(RunError, match=r"config\.toml that no run wrote"):
        pretrain(config, tmp_path)
    assert (tmp_path / "config.toml").read_text() == "mine = true\n"
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot be a run directory"):
        pretrain(config, tmp_path / "file")


def test_a_start_that_failed_before_its_first_checkpoint_can_be_repeated(
    config: PretrainConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "fit", lambda *a, **k: (_ for _ in ()).throw(TrainingError("lost power")))
        with pytest.raises(TrainingError):
            pretrain(config, run)
    with pytest.raises(RunError, match="no checkpoint to resume from"):
        resume_run(run)
    pretrain(checkpointed(config, 2), run)
    assert identical(tensors(run), tensors(finished))


WAIT = """
import sys, time
import torch
torch.set_num_threads(1)
from deepseek.events import Sink
from deepseek.recipes.pretrain import pretrain, read_config
class Wait(Sink):
    def write(self, event):
        if event.name == "train":
            print("training", flush=True)
            time.sleep(600)
pretrain(read_config(sys.argv[1]), sys.argv[2], sinks=[Wait()])
"""


@pytest.mark.skipif(os.name == "nt", reason="needs advisory locks")
def test_a_second_process_in_the_same_run_is_refused_until_the_first_is_gone(
    config: PretrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(WAIT, write_config(config, tmp_path / "c.toml"), run)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        told = (run / "events.jsonl").read_bytes()
        with pytest.raises(RunError, match=f"process {process.pid} is training in"):
            pretrain(config, run)
        assert (run / "events.jsonl").read_bytes() == told
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert pretrain(config, run).finished  # the claim died with its process


def test_two_threads_of_one_process_are_refused_too(config: PretrainConfig, tmp_path: Path) -> None:
    refused: list[str] = []

    class Again(MemorySink):
        def write(self, event: Event) -> None:
            if event.name == "train" and not refused:
                with pytest.raises(RunError) as error:
                    pretrain(config, tmp_path / "run")
                refused.append(str(error.value))

    pretrain(config, tmp_path / "run", sinks=[Again()])
    assert f"process {os.getpid()}" in refused[0]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_ends_the_run_with_its_checkpoints_intact_and_it_goes_on(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    config = replace(checkpointed(config, 2, asynchronous=asynchronous), train=replace(config.train, steps=8))
    pretrain(config, tmp_path / "whole")
    run, real = tmp_path / "run", files.write_file
    from deepseek.weights import checkpoint as writer

    def full(path: Path, chunks: Any) -> Any:
        if "step-000004" in path.parent.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_file", full)
        with pytest.raises(CheckpointError, match=r"disk full.*earlier checkpoints are intact"):
            pretrain(config, run)
    assert [p.name for p in checkpoint.list_checkpoints(run)] == ["step-000002"]
    assert resume_run(run).finished
    assert identical(tensors(run), tensors(tmp_path / "whole"))
    assert losses(run) == losses(tmp_path / "whole")


def test_a_disk_that_is_full_for_everything_else_is_one_clear_line(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config, the tokenizer and the events are written by others than the checkpointer."""
    run = tmp_path / "run"
    pretrain(checkpointed(config, 2), run)
    before = tensors(run)

    def full(path: Path, data: bytes | str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recipe, "write_atomic", full)
    with pytest.raises(
        RunError, match=r"cannot write in .*No space left on device; its checkpoints are intact"
    ):
        resume_run(run, longer(run))
    assert identical(tensors(run), before)


def test_nan_weights_stop_the_run_with_a_way_out(copy: Path, tmp_path: Path) -> None:
    """A checkpoint whose weights went bad: every step is skipped, none of them changes anything."""
    config, found = longer(copy, train={"max_nonfinite": 2, "steps": 20}), checkpoint.load(copy)
    found.model["norm.weight"][0] = float("nan")
    with checkpoint.Checkpointer(copy) as writer:
        writer.save(4, tensors=found.tensors, state=found.state, wait=True)
    sink = MemorySink()
    with pytest.raises(TrainingError, match="3 consecutive non-finite steps up to step 7"):
        resume_run(copy, config, sinks=[sink])
    assert sink.series("train", "skipped") == [True] * 3
    warnings = [e.values["text"] for e in sink.events if e.name == "warning"]
    skipped = [text for text in warnings if "skipped: loss nan" in text]
    assert [text.partition(" skipped")[0] for text in skipped] == ["step 5", "step 6", "step 7"]
    assert warnings == skipped  # the monitor, which sees the NaN too, has no trouble of its own
    assert {e.values["kind"] for e in sink.events if e.name == "incident"} == {"nan"}
    assert identical(tensors(copy, 2), tensors(copy, 2))
    assert resume_run(copy, replace(config, train=replace(config.train, steps=8)), step=2).finished


def test_another_tokenizer_on_resume_is_refused(copy: Path, folder: Path, tmp_path: Path) -> None:
    before, toml = tensors(copy), (copy / "config.toml").read_text()
    with pytest.raises(CheckpointError, match=r"does not fit this model.*embedding\.weight.*config\.toml"):
        resume_run(copy, longer(copy, data={"vocab_size": 500}))
    other = write_corpus(tmp_path / "other", seed=5)
    source = replace(longer(copy).data.sources[0], path=str(other))
    with pytest.raises(DataError, match="another corpus"):
        resume_run(copy, longer(copy, data={"sources": (source,)}))
    with pytest.raises(DataError, match="another seed"):
        resume_run(copy, longer(copy, data={"seed": 1}))
    assert (copy / "config.toml").read_text() == toml  # what was refused leaves no trace in the config
    assert identical(tensors(copy), before)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": {"hidden": 24}}, CheckpointError, "of another shape"),
        ({"model": {"layers": 3}}, CheckpointError, "tensors missing"),
        ({"model": {"layers": 1}}, CheckpointError, "left over"),
        ({"optim": {"name": "adamw"}}, CheckpointError, r"optim\.name"),
        ({"train": {"length": 16}}, DataError, "another length"),
        ({"parallel": {"tp": 3}}, ConfigError, r"tp=3 does not divide 2 attention heads; try 2"),
        ({"train": {"device": "warp"}}, ConfigError, "'warp' is not a device"),
        ({"train": {"batch_tokens": 100}}, ConfigError, "try 96"),
    ],
)
def test_changes_that_do_not_fit_the_checkpoint_are_refused_by_name(
    changes: dict[str, Any], error: type[DeepseekError], message: str, copy: Path
) -> None:
    before = {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file() and p.name != "events.jsonl"}
    with pytest.raises(error, match=message):
        resume_run(copy, longer(copy, **changes))
    after = {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file() and p.name != "events.jsonl"}
    assert {k: v for k, v in after.items() if k != ".training"} == {
        k: v for k, v in before.items() if k != ".training"
    }


def test_a_batch_may_change_on_resume(copy: Path) -> None:
    """The place in the data knows nothing of rows."""
    assert resume_run(copy, longer(copy, train={"batch_tokens": 4 * 32, "micro_rows": 1})).step == 8


def test_resuming_what_is_not_there_names_what_is(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; it has: step-000002, step-000004"):
        resume_run(copy, step=3)
    with pytest.raises(RunError, match="no run at"):
        resume_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"no config\.toml"):
        resume_run(tmp_path)
    state = checkpoint.load(copy)
    with checkpoint.Checkpointer(copy) as writer:
        writer.save(9, tensors=state.tensors, state={"mine": 1}, wait=True)
    with pytest.raises(CheckpointError, match=r"not made by pretraining.*loader.*rng"):
        resume_run(copy)


def test_the_best_checkpoint_is_the_one_that_was_evaluated_best(
    config: PretrainConfig, tmp_path: Path
) -> None:
    """A figure belongs to the step it was measured at, not to those after it."""
    run = tmp_path / "run"
    config = replace(checkpointed(config, 1), evaluate=replace(config.evaluate, every=2, tokens=64))
    pretrain(config, run)
    metrics = {p.name: checkpoint.load(p).manifest.metric for p in checkpoint.list_checkpoints(run)}
    told = {e["step"]: e for e in events(run) if e["event"] == "evaluate"}
    assert metrics == {
        "step-000001": None, "step-000002": told[2]["bits_per_byte"],
        "step-000003": None, "step-000004": told[4]["bits_per_byte"],
    }  # fmt: skip
    assert 64 <= told[2]["tokens"] < told[4]["tokens"]  # the last evaluation takes everything


def test_held_out_zero_trains_without_evaluating(config: PretrainConfig, tmp_path: Path) -> None:
    config = replace(
        config, data=replace(config.data, held_out=0.0), evaluate=replace(config.evaluate, every=1)
    )
    assert pretrain(config, tmp_path / "run").evaluation is None


def test_a_stop_asked_for_before_the_first_step_still_leaves_something_to_resume(
    config: PretrainConfig, finished: Path, tmp_path: Path
) -> None:
    stop = Stop()
    stop.request("early")
    assert pretrain(config, tmp_path / "run", stop=stop).step == 1
    assert resume_run(tmp_path / "run").finished
    assert identical(tensors(tmp_path / "run"), tensors(finished))


def test_bits_per_byte_is_that_of_an_unpacked_loop_in_float64(config: PretrainConfig, finished: Path) -> None:
    """One held-out document at a time, cut where packing cuts it, every target once, divided by the real bytes."""
    plan = derive(read_config(finished / "config.toml"), 300)
    corpus, found = prepare(config.data), checkpoint.load(finished)
    model = build(plan.config.model)
    model.load_state_dict(found.model)
    store = corpus.held_out
    assert store is not None
    length = config.train.length
    packed = evaluate(model, corpus.eval_batches(rows=3, length=length), plan.policy)
    wide = build(plan.config.model).double().eval()
    wide.load_state_dict(found.model)
    nats = size = count = 0.0
    texts = [corpus.tokenizer.decode(store.tokens(i).tolist()) for i in range(len(store))]
    with torch.no_grad():
        for i in range(len(store)):
            ids = torch.from_numpy(store.tokens(i).astype("int64"))
            for at in range(0, len(ids) - 1, length):
                piece = ids[at : at + length + 1][None]
                logits = wide.logits(wide(piece[:, :-1]).hidden)[0]
                nats -= float(logits.log_softmax(-1).gather(1, piece[0, 1:, None]).sum())
                count += piece.shape[1] - 1
    size = sum(len(t.encode()) for t in texts)
    assert packed.tokens == count
    assert packed.bytes == size
    assert packed.loss == pytest.approx(nats / count, rel=1e-5)
    assert packed.bits_per_byte == pytest.approx(nats / 0.6931471805599453 / size, rel=1e-5)
    last = [e for e in events(finished) if e["event"] == "evaluate"][-1]
    assert last["bits_per_byte"] == pytest.approx(packed.bits_per_byte, rel=1e-5)


def test_evaluating_restores_the_mode_and_an_empty_evaluation_is_not_perfect(config: PretrainConfig) -> None:
    plan = derive(config, 300)
    model = build(plan.config.model, seed=0)
    corpus = prepare(config.data)
    batches = list(corpus.eval_batches(rows=2, length=32))
    for training in (True, False):
        model.train(training)
        evaluate(model, batches[:1], plan.policy)
        assert model.training == training
    some = evaluate(model, batches, plan.policy, tokens=1)
    assert some.tokens == batches[0].n_targets == int((batches[0].targets != IGNORE).sum())
    nothing = evaluate(model, [], plan.policy)
    assert nothing.tokens == 0
    assert nothing.loss != nothing.loss
    assert nothing.bits_per_byte != nothing.bits_per_byte


def test_a_dry_run_costs_nothing_and_agrees_with_the_run(config: PretrainConfig, finished: Path) -> None:
    found = dry_run(read_config(finished / "config.toml"))
    run = next(e for e in events(finished) if e["event"] == "run")
    assert found["parameters"]["total"] == run["parameters"]
    assert found["flops_per_token"] == run["flops_per_token"]
    assert (found["steps"], found["tokens"]) == (4, 1024)


def test_steps_follow_from_tokens_or_from_the_model(config: PretrainConfig) -> None:
    by_tokens = derive(replace(config, train=replace(config.train, steps=0, tokens=2560)), 300)
    assert by_tokens.config.train.steps == 10
    derived = derive(replace(config, train=replace(config.train, steps=0)), 300)
    active = next(
        int(why.split()[0].replace(",", "")) for name, _, why in derived.derived if name == "parameters"
    )
    assert derived.config.train.steps == round(20 * active / 256)
    assert derived.rows == 8


def test_a_resumed_run_keeps_its_model(copy: Path) -> None:
    """An option that alters no shape and yet the function is refused, and nothing is written."""
    config = read_config(copy / "config.toml")
    changed = replace(
        config, model=replace(config.model, norm_eps=1e-3), train=replace(config.train, steps=6)
    )
    before = (copy / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match=r"model\.norm_eps was 1e-06 .* keeps its model"):
        resume_run(copy, changed)
    assert (copy / "config.toml").read_bytes() == before


def test_going_back_sets_later_checkpoints_aside(copy: Path) -> None:
    config = read_config(copy / "config.toml")
    resume_run(copy, replace(config, train=replace(config.train, steps=3)), step=2)
    assert [p.name for p in checkpoint.list_checkpoints(copy)] == ["step-000002", "step-000003"]
    assert (copy / "abandoned/step-000004/manifest.json").is_file()


def test_fewer_steps_than_done_are_refused(copy: Path) -> None:
    config = read_config(copy / "config.toml")
    with pytest.raises(RunError, match=r"is at step 4 already, train\.steps=3"):
        resume_run(copy, replace(config, train=replace(config.train, steps=3)))


@pytest.mark.parametrize(
    ("steps", "every", "found"),
    [(199, None, 0), (200, None, 20), (2001, None, 201), (500, 0, 0), (500, 7, 7)],
)
def test_a_long_run_can_be_taken_back_without_being_told(
    config: PretrainConfig, steps: int, every: int | None, found: int
) -> None:
    asked = replace(
        config, train=replace(config.train, steps=steps), checkpoint=CheckpointConfig(every=every)
    )
    assert derive(asked, 300).config.checkpoint.every == found
