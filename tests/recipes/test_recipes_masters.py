"""A whole run with bf16 weights and fp32 masters, as on an accelerator: its checkpoints, and going on from them."""

from __future__ import annotations

from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import events, identical, losses, smallest, tensors, write_corpus

from deepseek.assemble import load
from deepseek.config import replace
from deepseek.errors import ConfigError
from deepseek.events import Event, MemorySink
from deepseek.precision import Policy, choose
from deepseek.recipes import plan
from deepseek.recipes.pretrain import PretrainConfig, pretrain, resume_run
from deepseek.train import Stop


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("masters") / "corpus")


@pytest.fixture
def config(corpus: Path) -> PretrainConfig:
    return smallest(corpus, data={"cache": str(corpus.parent / "cache")}, train={"precision_mode": "bf16"})


@pytest.fixture
def _masters(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_masters(mode: str, device: torch.device, *rest: Any, **options: Any) -> Policy:
        found = choose(mode, device, *rest, **options)
        return changed(found, masters=found.name == "bf16")

    monkeypatch.setattr(plan, "choose", with_masters)


class StopAt(MemorySink):
    def __init__(self, stop: Stop, step: int) -> None:
        super().__init__()
        self.stop, self.step = stop, step

    def write(self, event: Event) -> None:
        super().write(event)
        if event.name == "train" and event.step == self.step:
            self.stop.request("test")


@pytest.mark.usefixtures("_masters")
@pytest.mark.parametrize(
    "options",
    [
        {"optim": {"name": "muon"}},
        {"optim": {"name": "adafactor", "first_moment": "int8"}, "train": {"clip": "zclip"}},
    ],
)  # fmt: skip
def test_a_run_with_masters_resumes_bit_for_bit(
    config: PretrainConfig, tmp_path: Path, options: dict[str, dict[str, Any]]
) -> None:
    config = replace(config, **{k: replace(getattr(config, k), **v) for k, v in options.items()})
    pretrain(config, tmp_path / "whole")
    stop = Stop()
    assert pretrain(config, tmp_path / "run", sinks=[StopAt(stop, 3)], stop=stop).step == 3
    assert resume_run(tmp_path / "run").finished
    found, want = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert identical(found, want)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    resumed = next(e for e in events(tmp_path / "run") if e["event"] == "resume")
    assert resumed["probe_before"] == resumed["probe_after"]
    assert any(k.startswith("optimizer/*clip|") for k in want) == ("train" in options)
    weights = {k: t for k, t in want.items() if k.startswith("model/")}
    assert {t.dtype for t in weights.values()} == {torch.float32}
    rounded = weights["model/blocks.1.ffn.down"].bfloat16().float()
    assert not torch.equal(
        weights["model/blocks.1.ffn.down"], rounded
    )  # the masters, not what was computed with


@pytest.mark.usefixtures("_masters")
def test_a_checkpoint_of_masters_is_an_ordinary_one(config: PretrainConfig, tmp_path: Path) -> None:
    """It goes on in fp32, and a run in fp32 goes on with masters."""
    stop = Stop()
    pretrain(config, tmp_path / "run", sinks=[StopAt(stop, 3)], stop=stop)
    fp32 = replace(config, train=replace(config.train, precision_mode="fp32", steps=5))
    assert resume_run(tmp_path / "run", fp32).finished
    back = replace(config, train=replace(config.train, precision_mode="bf16", steps=7))
    assert resume_run(tmp_path / "run", back).finished
    assert {p.dtype for p in load(tmp_path / "run").model.parameters()} == {torch.float32}
    assert sorted(losses(tmp_path / "run")) == list(range(1, 8))


def test_graphs_without_a_gpu_are_refused(config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cuda_graph"):
        pretrain(replace(config, train=replace(config.train, cuda_graph=True)), tmp_path / "run")
    assert not (tmp_path / "run").exists()  # nor may a refused resume move checkpoints or change config.toml
