"""A step's batch once more: the figures are right, always the same, and the run does not notice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from action_runs import with_actions
from recipe_runs import checkpointed, identical, losses, smallest, tensors, write_corpus

from deepseek.assemble import load
from deepseek.config import replace
from deepseek.errors import DataError, RunError
from deepseek.monitor.store import RunStore
from deepseek.recipes import control
from deepseek.recipes.pretrain import PretrainConfig, pretrain, resume_run
from deepseek.recipes.provenance import open_data, samples_of
from deepseek.recipes.replay import replay_run

STEPS = 10


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("replay") / "corpus")


@pytest.fixture(scope="module")
def config(corpus: Path) -> PretrainConfig:
    config = smallest(corpus, data={"cache": str(corpus.parent / "cache")}, train={"steps": STEPS})
    return checkpointed(config, 3)


@pytest.fixture(scope="module")
def straight(config: PretrainConfig, corpus: Path) -> Path:
    run = corpus.parent / "straight"
    assert pretrain(config, run).finished
    return run


def test_a_live_run_is_bit_for_bit_what_it_would_have_been(
    config: PretrainConfig, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "EVERY", 0.0)
    run = tmp_path / "run"
    asked = {
        5: [
            ("replay", {"step": 5}),
            ("replay", {"step": 1, "at": "current"}),
            ("replay", {"step": 9, "at": 3}),
        ],
        8: [("replay", {"step": 7}), ("replay", {"step": 7})],
    }
    answers = with_actions(config, run, asked).answers()
    assert {a.status for a in answers} == {"done"}
    assert [(a.result["step"], a.result["weights"]) for a in answers] == [
        (5, 3),
        (1, 5),
        (9, 3),
        (7, 6),
        (7, 6),
    ]
    assert answers[3].result == answers[4].result  # with training steps between none of them
    for step in (6, 9, STEPS):
        assert identical(tensors(run, step), tensors(straight, step)), step
    assert losses(run) == losses(straight)
    # From the files alone, the same; and the loss is what the step told, when the weights are those before it.
    assert replay_run(straight, 7, device="cpu").to_dict() == answers[3].result
    assert answers[3].result["loss"] == pytest.approx(losses(straight)[7], rel=1e-6)


@pytest.mark.parametrize("step", [1, 4, 10])
def test_samples_and_their_losses_are_the_documents_own(
    config: PretrainConfig, tmp_path: Path, step: int
) -> None:
    """Without experts a document's loss does not depend on its neighbours: each is computed by itself here."""
    dense = replace(config, model=replace(config.model, ffn_pattern="DD"))
    run = tmp_path / "run"
    pretrain(dense, run)
    result = replay_run(run, step, "current", "cpu")
    assert result.weights == STEPS
    assert result.targets == sum(d.length for d in result.documents)
    assert [d.loss for d in result.documents] == sorted(
        (d.loss or 0.0 for d in result.documents), reverse=True
    )
    places = {(s.row, s.column) for s in samples_of(run, step)}
    assert {(d.row, d.column) for d in result.documents} == places
    loaded = load(run)
    with open_data(run, step) as data:
        store = data.corpus.train
        for told in result.documents:
            (number,) = store.find(told.source, told.path, told.offset)
            ids = torch.from_numpy(store.tokens(number).astype("int64"))
            piece = ids[told.start : told.start + told.length + 1]
            with torch.no_grad():
                logits = loaded.model.logits(loaded.model(piece[None, :-1]).hidden)[0]
            assert F.cross_entropy(logits, piece[1:]).item() == pytest.approx(told.loss, rel=1e-4)
            text = (Path(data.config.data.sources[0].path) / told.path).read_text(encoding="utf-8")
            assert told.text.rstrip("…\ufffd") in text or "\ufffd" in told.text


def test_the_batch_is_that_of_its_time(config: PretrainConfig, tmp_path: Path) -> None:
    """Also after a resume that changed the size of the batch, and of a run that has no checkpoint yet."""
    run = tmp_path / "run"
    pretrain(replace(config, train=replace(config.train, steps=6)), run)
    before = {step: samples_of(run, step) for step in range(1, 7)}
    assert {s.row for s in before[5]} == set(range(8))
    smaller = replace(config.train, batch_tokens=4 * 32)
    resume_run(run, replace(config, train=smaller))
    assert {step: samples_of(run, step) for step in range(1, 7)} == before
    assert {s.row for s in samples_of(run, 7)} == set(range(4))
    assert replay_run(run, 7, device="cpu").loss == pytest.approx(losses(run)[7], rel=1e-6)


def test_what_a_replay_finds_is_kept_beside_its_incident(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "EVERY", 0.0)
    run = tmp_path / "run"
    with RunStore(run) as store:
        store.put_incident({"id": "spike", "step": 5, "kind": "loss_spike"})
        asked = {6: [("replay", {"step": 5, "incident": "spike"}), ("checkpoint", {"incident": "none such"})]}
        answers = with_actions(config, run, asked).answers()
        assert [a.status for a in answers] == ["done", "done"]
        incident = store.incident("spike")
        assert incident["samples"] == answers[0].result["documents"]
        assert [(a["action"], a["status"], a["by"]) for a in incident["actions"]] == [
            ("replay", "done", "test")
        ]
        assert store.samples(5) == [{**d, "step": 5} for d in incident["samples"]]


def test_what_is_not_there_is_told(straight: Path, config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no checkpoint before step 2; it has: 3, 6, 9, 10"):
        replay_run(straight, 2)
    with pytest.raises(RunError, match="no checkpoint of step 5"):
        replay_run(straight, 2, at=5)
    with pytest.raises(RunError, match="steps count from 1"):
        samples_of(straight, 0)
    run = tmp_path / "run"
    pretrain(replace(config, data=replace(config.data, cache=str(tmp_path / "cache"))), run)
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"is not in .*cache; restore it"):
        samples_of(run, 2)
