"""The inspector on real runs: any checkpoint, a live run, an export, a text of one's own; and what a person sees."""

from __future__ import annotations

import base64
import io
import json
import threading
from pathlib import Path

import pytest
import torch
from recipe_runs import checkpointed, free_port, smallest, start, write_config, write_corpus
from rich.console import Console

from deepseek import assemble, cli
from deepseek.config import replace
from deepseek.errors import ConfigError, DataError, RunError
from deepseek.monitor.control import request
from deepseek.monitor.inspect import Inspector
from deepseek.monitor.inspect.examine import attentions
from deepseek.monitor.inspect.updates import update_ratios
from deepseek.recipes.evaluate import evaluate_run
from deepseek.recipes.export import export
from deepseek.recipes.inspect import inspect_run, render
from deepseek.recipes.pretrain import pretrain
from deepseek.weights import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    config = checkpointed(smallest(write_corpus(root / "text")), every=4)
    pretrain(config, root / "run")
    return root / "run"


def test_everything_is_json_and_belongs_to_its_step(run: Path) -> None:
    inspector = Inspector(run)
    overview = inspector.overview()
    assert overview["steps"] == [4, 8]
    assert [(x["kind"], x["heads"], x["experts"]) for x in overview["layers"]] == [
        ("window", 2, 0),
        ("hybrid", 2, 4),
    ]
    first, last = inspector.heads(4), inspector.heads()
    assert (first["step"], last["step"]) == (4, 8)
    assert first["loss"] > last["loss"]
    head = last["layers"][1]["heads"][0]
    assert 0 < head["gate"] < 1
    assert head["entropy"] > 0
    assert set(head["z"]) == {"output_norm", "entropy", "sink", "max_logit", "gate"}
    assert last["layers"][0]["heads"][0]["gate"] is None
    assert len(last["ranking"]) == 4
    (experts,) = last["experts"]
    assert sum(experts["load"]) == pytest.approx(1)
    answers = [
        overview, last, inspector.attention(1, 0), inspector.ablate(1, head=0), inspector.ablate(1, expert=2),
        inspector.ablate_all(), inspector.histograms(), inspector.updates(), inspector.suspects(), inspector.traces(),
    ]  # fmt: skip
    assert all(json.loads(json.dumps(answer, allow_nan=False)) == answer for answer in answers[1:])


def test_the_loss_is_the_evaluations(run: Path) -> None:
    wanted = evaluate_run(run, "cpu", compressors=False)
    found = Inspector(run, tokens=16_384).heads()
    assert found["tokens"] == wanted.model.tokens
    assert found["loss"] == pytest.approx(wanted.model.loss, abs=1e-5)
    assert found["text"] == "the run's held-out documents"


def test_a_map_names_its_tokens(run: Path) -> None:
    inspector = Inspector(run)
    found = inspector.attention(0, 1, start=4, size=20, pixels=10)
    assert (found["size"], found["pixels"], len(found["tokens"])) == (20, 10, 20)
    assert len(base64.b64decode(found["values"])) == 100
    assert len(found["sink"]) == 10
    whole = inspector.attention(0, 1)
    assert whole["length"] == whole["size"] == 64  # as long as the model takes
    text = "".join(token["text"] for token in whole["tokens"])
    assert text.startswith("<|endoftext|>")
    assert "alpha" in text or "beta" in text
    assert found["tokens"] == whole["tokens"][4:24]
    for branch in ("", "window", "pooled"):
        assert inspector.attention(1, 0, branch=branch)["branch"] == branch


def test_answers_are_kept(run: Path) -> None:
    inspector = Inspector(run)
    assert inspector.ablate(1, head=1) is inspector.ablate(1, head=1)
    assert inspector.histograms() is inspector.histograms()


def test_histograms_count_every_value(run: Path) -> None:
    layers = Inspector(run).histograms()["layers"]
    model = assemble.load(run).model
    weight = attentions(model)[0].query.weight.detach()
    found = layers[0]["weights"]["attention.query.weight"]
    assert found["below"] + sum(found["counts"]) + found["above"] == found["count"] == weight.numel()
    assert found["min"] == pytest.approx(float(weight.min()))
    assert found["max"] == pytest.approx(float(weight.max()))
    assert found["std"] == pytest.approx(float(weight.std(correction=0)), rel=1e-5)
    edges = torch.linspace(found["low"], found["high"], len(found["counts"]) + 1)
    wanted, _ = torch.histogram(weight.flatten(), edges)
    assert (
        sum(abs(a - b) for a, b in zip(wanted.tolist(), found["counts"])) <= 4
    )  # values at the edge of a bin
    assert layers[1]["activations"]["residual"]["rms"] > 0


def test_updates_between_checkpoints(run: Path) -> None:
    found = Inspector(run).updates()
    (step,) = found["checkpoints"]
    assert (step["from"], step["step"]) == (4, 8)
    before, after = (checkpoint.load(run / f"step-{n:06d}").model for n in (4, 8))
    names = [n for n, _ in assemble.load(run).model.named_parameters() if n.startswith("blocks.1.")]
    old, new = (torch.cat([w[n].flatten() for n in names]) for w in (before, after))
    assert step["layers"]["1"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
    assert step["per_step"]["1"] == pytest.approx(step["layers"]["1"] / 4)
    assert set(step["layers"]) == {"0", "1", "embedding", "head", "norm"}
    assert update_ratios({"a.w": torch.zeros(2)}, {"a.w": torch.ones(2)}) == {"a": float("inf")}


def test_a_planted_head_is_the_first_suspect(run: Path, tmp_path: Path) -> None:
    import shutil

    spoilt = tmp_path / "run"
    shutil.copytree(run, spoilt)
    loaded = assemble.load(spoilt)
    attention = attentions(loaded.model)[0]
    attention.query.weight.data[:8] = attention.query.weight.data[8:]
    attention.output.weight.data[:, :8] = attention.output.weight.data[:, 8:]
    with checkpoint.Checkpointer(spoilt) as saver:
        state = checkpoint.load(spoilt).state
        saver.save(9, tensors={"model": loaded.model.state_dict()}, state=state, wait=True)
    shutil.copytree(run.parent / ".corpora", tmp_path / ".corpora")
    done = inspect_run(spoilt, device="cpu")
    assert {(s["layer"], s["head"], s["kind"]) for s in done.found["suspects"][:2]} == {
        (0, 0, "duplicated"), (0, 1, "duplicated")
    }  # fmt: skip


def test_any_thread_may_ask(run: Path) -> None:
    inspector = Inspector(run)
    found: list[float] = []
    work = [
        lambda: found.append(inspector.heads()["loss"]),
        lambda: found.append(inspector.ablate(1, expert=0)["loss"]),
        lambda: found.append(inspector.ablate(0, head=0)["loss"]),
        lambda: found.append(inspector.heads(8)["loss"]),
    ]
    threads = [threading.Thread(target=w) for w in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert max(found) - min(found) < 1e-5


def test_an_export_and_a_text_of_ones_own(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "hf")
    text = tmp_path / "text.txt"
    text.write_text("alpha beta gamma delta " * 60, encoding="utf-8")
    inspector = Inspector(done.path, text, length=32)
    found = inspector.heads()
    assert found["step"] is None
    assert found["text"] == str(text)
    assert inspector.overview()["steps"] == []
    assert inspector.updates() == {"checkpoints": [], "recorded": {}}
    own = Inspector(run, text).heads()
    assert found["loss"] == pytest.approx(own["loss"], abs=1e-5)
    assert Inspector(done.path).heads()["text"].startswith("the Python standard library")
    with pytest.raises(RunError, match="no step 4"):
        inspector.heads(4)
    text.write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        Inspector(run, text).heads()


def test_one_checkpoint_by_its_path(run: Path) -> None:
    assert Inspector(run / "step-000004").heads()["step"] == 4


def test_what_is_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no checkpoint of step 5.*\[4, 8\]"):
        Inspector(run).heads(5)
    with pytest.raises(RunError, match="no run at"):
        Inspector(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="layers 0 to 1"):
        Inspector(run).attention(2, 0)
    with pytest.raises(RunError, match="there are: none"):
        Inspector(run).trace("step-000001")


def test_a_loop_of_ones_own_has_traces_only(tmp_path: Path) -> None:
    (tmp_path / "monitor").mkdir()
    inspector = Inspector(tmp_path)
    assert inspector.traces() == []
    for ask in (inspector.overview, inspector.heads):
        with pytest.raises(RunError, match=r"config\.toml"):
            ask()


def test_a_table_for_people_in_eighty_columns(run: Path) -> None:
    text = io.StringIO()
    render(inspect_run(run, device="cpu", ablate=True), Console(file=text, width=80))
    told = text.getvalue()
    assert max(map(len, told.splitlines())) <= 80
    for words in (
        "held-out loss",
        "Heads",
        "Experts",
        "entropy",
        "removal",
        "Change of the loss",
        "expert 3",
    ):
        assert words in told
    assert "suspect" in told.lower()


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(run), "--step", "4", "--json", "--ablate", "--device=cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 4
    assert len(found["ablation"]["parts"]) == 4 + 4
    assert cli.main(["inspect", str(run), "--step", "5"]) == 1
    assert "no checkpoint of step 5" in capsys.readouterr().err


def test_a_trace_of_a_live_run_on_demand(tmp_path: Path) -> None:
    """``capture`` is asked for from outside while the run trains; the inspector then shows the trace."""
    config = smallest(write_corpus(tmp_path / "text"))
    config = replace(config, train=replace(config.train, steps=40))
    path = tmp_path / "run"
    asked: list[int] = []

    class Ask:
        def write(self, event: object) -> None:
            if getattr(event, "name", "") == "train" and getattr(event, "step", 0) == 3:
                asked.append(request(path, "capture", {"steps": 2}, by="test"))

        def close(self) -> None: ...

    pretrain(config, path, sinks=[Ask()])  # type: ignore[list-item]
    inspector = Inspector(path)
    assert asked
    (verdict,) = inspector.traces()
    assert verdict["steps"] == 2
    assert verdict["phases"]["backward"] > 0
    assert inspector.trace(verdict["id"])["profiles"]
    assert inspector.trace(verdict["id"], "verdict")["verdict"] == verdict["verdict"]
    assert inspector.trace_file(verdict["id"]).name == "trace.json.gz"
    assert inspector.overview()["traces"] == 1


RANK = """
import sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from deepseek.dist import comm
from deepseek.monitor.inspect.trace import TraceCapture
from deepseek.recipes import observe, pretrain as recipe
from deepseek.train import TrainStep

rank, _ = comm.start()
plain, calls = TrainStep.micro, []
def micro(self, *args, **kwargs):
    calls.append(1)
    if rank == 1 and 4 < len(calls) <= 8:  # steps 3 and 4, which are recorded, have two micro-batches each
        time.sleep(1.0)
    return plain(self, *args, **kwargs)
TrainStep.micro = micro

idle = TraceCapture.__call__
def armed(self, step, result):
    if step == 2:
        self.capture(2)
    idle(self, step, result)
TraceCapture.__call__ = armed
recipe.pretrain(recipe.read_config(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_waiting_for_a_slow_rank_is_communication(tmp_path: Path) -> None:
    """Real ranks over gloo: rank 1 is slow, and rank 0's trace says that it waits in the exchange."""
    config = smallest(write_corpus(tmp_path / "text"))
    written = write_config(replace(config, train=replace(config.train, steps=5)), tmp_path / "c.toml")
    port = free_port()
    ranks = [
        start(RANK, written, tmp_path / "run", env={
            "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        })
        for r in range(2)
    ]  # fmt: skip
    try:
        told = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], told
    (found,) = Inspector(tmp_path / "run").traces()
    assert found["verdict"] == "communication-bound"
    assert found["phases"]["communication"] * found["seconds"] > 1.0
    assert found["top"][0]["kind"] == "communication"
