"""A run that is watched: the same weights as unwatched, what it tells, and that nothing that fails ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import events, identical, smallest, tensors, write_corpus

from deepseek.config import replace
from deepseek.errors import ConfigError
from deepseek.events import Event, MemorySink, Sink
from deepseek.monitor.config import MonitorConfig
from deepseek.monitor.probes import StepProbe
from deepseek.recipes.observe import Guarded, Observer
from deepseek.recipes.pretrain import PretrainConfig, pretrain
from deepseek.train import StepResult


def watched(corpus: Path, monitor: dict[str, Any], **changes: Any) -> PretrainConfig:
    config = smallest(corpus, **changes)
    return replace(config, monitor=MonitorConfig(**monitor))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("observe") / "text")


def series(sink: MemorySink) -> dict[str, dict[int, float]]:
    """Every figure of the 'probe' events, by name and step."""
    found: dict[str, dict[int, float]] = {}
    for event in sink.events:
        if event.name != "probe":
            continue
        told = dict(event.values.get("series", {}))
        if "names" in event.values:
            assert len(event.values["names"]) == len(event.values["values"])
            told |= dict(zip(event.values["names"], event.values["values"].tolist()))
        for name, value in told.items():
            assert event.step is not None
            found.setdefault(name, {})[event.step] = float(value)
    return found


@pytest.mark.parametrize("mode", ["none", "blocks"])
def test_training_is_bit_for_bit_the_same_with_the_monitor_and_without(
    tmp_path: Path, corpus: Path, mode: str
) -> None:
    train = {"activation_checkpoint": mode, "deterministic": True}
    try:
        on, off = tmp_path / "on", tmp_path / "off"
        sink = MemorySink()
        pretrain(watched(corpus, {"every": 1, "rows": 2}, train=train), on, sinks=[sink])
        pretrain(watched(corpus, {"enabled": False}, train=train), off)
    finally:
        torch.use_deterministic_algorithms(False)
    assert identical(tensors(on), tensors(off))
    told = series(sink)
    assert len(told["layer/0/activation_rms"]) >= 6  # the probes did run
    assert [e["loss"] for e in events(on) if e["event"] == "train"] == [
        e["loss"] for e in events(off) if e["event"] == "train"
    ]


def test_what_a_run_tells_every_step_and_at_sampled_ones(tmp_path: Path, corpus: Path) -> None:
    sink = MemorySink()
    pretrain(watched(corpus, {"every": 3}), tmp_path / "run", sinks=[sink])
    told = series(sink)
    for name in ("layer/embedding/grad_norm", "layer/1/grad_norm", "router/1/entropy", "precision/nonfinite"):
        assert sorted(told[name]) == list(range(1, 9))
    for name in (
        "layer/0/weight_norm", "layer/head/update_ratio", "layer/1/activation_max", "layer/0/dead_units",
        "attention/0/1/entropy", "attention/1/0/sink", "attention/1/1/max_logit", "attention/0/0/output_norm",
        "expert/1/3/bias", "expert/1/0/weight_norm", "expert/1/2/dead_units", "memory/weights", "memory/rss",
        "memory/optimizer", "memory/activations", "memory/gradients", "data/text/loss",
    ):  # fmt: skip
        assert sorted(told[name]) == [3, 6], name
    gathered = [e for e in sink.events if e.name == "ranks"]
    assert gathered
    assert all(len(e.values[key]) == 1 for e in gathered for key in ("seconds", "data", "memory"))
    assert not [e for e in events(tmp_path / "run") if e["event"] in ("probe", "ranks", "data")]
    assert not [e for e in sink.events if e.name == "warning"]


def test_the_source_losses_of_whole_batches_are_the_loss(tmp_path: Path, corpus: Path) -> None:
    """With all rows looked at and a learning rate of almost nothing, the one source's loss is the step's loss."""
    sink = MemorySink()
    changes = {"optim": {"lr": 1e-12, "weight_decay": 0.0}}
    pretrain(watched(corpus, {"every": 2, "rows": 8}, **changes), tmp_path / "run", sinks=[sink])
    told = series(sink)["data/text/loss"]
    losses = {e.step: float(e.values["loss"]) for e in sink.events if e.name == "train"}
    assert told
    for step, loss in told.items():
        assert loss == pytest.approx(losses[step], rel=2e-3)  # evaluation mode: no token floor


def test_documents_of_a_batch_are_named_worst_first(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, list[dict[str, Any]]] = {}

    class Asking(Observer):
        def __call__(self, step: int, result: StepResult) -> None:
            super().__call__(step, result)
            if step == 3:
                found["at once"] = self.explain(3)
            if step == 8:
                found["later"] = self.explain(3)  # made again from the loader

    monkeypatch.setattr("deepseek.recipes.pretrain.Observer", Asking)
    pretrain(watched(corpus, {"every": 4, "samples": 100}), tmp_path / "run")
    for samples in found.values():
        losses = [s["loss"] for s in samples if s["length"] > 8]
        assert losses == sorted(losses, reverse=True)
        assert sum(s["share"] for s in samples) == pytest.approx(1.0)
        for s in samples:
            text = (corpus / Path(s["path"]).name).read_text(encoding="utf-8")
            assert s["start"] or text.startswith(s["text"][:20])
    places = [
        {tuple(s[k] for k in ("row", "column", "length", "path", "offset", "start")) for s in samples}
        for samples in found.values()
    ]
    assert places[0] == places[1]


class Broken(Sink):
    def __init__(self) -> None:
        self.heard, self.closed = 0, False

    def write(self, event: Event) -> None:
        self.heard += 1
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        self.closed = True
        raise OSError(28, "No space left on device")


def test_a_broken_store_and_a_broken_probe_are_told_once_and_end_nothing(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken()
    monkeypatch.setattr(Observer, "_store", lambda self: Guarded(broken, "the series store"))
    monkeypatch.setattr(StepProbe, "__call__", lambda self, result: 1 / 0)
    sink = MemorySink()
    done = pretrain(watched(corpus, {"every": 2}), tmp_path / "run", sinks=[sink])
    assert done.finished
    assert broken.heard == 1
    assert broken.closed
    warnings = [e.values["text"] for e in sink.events if e.name == "warning"]
    assert len(warnings) == 2
    assert any("No space left" in text for text in warnings)
    assert any("division by zero" in text for text in warnings)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"overhead": 0.0}, "half a percent"),
        ({"every": -1}, "at least 0"),
        ({"webhook": "example.org"}, "https://"),
        ({"on_incident": "pause", "detect": False}, "monitor.detect"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        MonitorConfig(**options)
