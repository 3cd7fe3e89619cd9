"""A run that is watched: the same weights as unwatched, what it tells, and that nothing that fails ends it."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import events, identical, losses, smallest, tensors, write_corpus

from deepseek.config import replace
from deepseek.errors import ConfigError
from deepseek.events import Event, MemorySink, Sink, attached, emit
from deepseek.monitor.catalogue import describe
from deepseek.monitor.config import MonitorConfig
from deepseek.monitor.detect import Watch
from deepseek.monitor.probes import StepProbe
from deepseek.monitor.sink import StoreSink
from deepseek.monitor.store import RunStore
from deepseek.recipes.control import Controller
from deepseek.recipes.observe import Observer
from deepseek.recipes.plan import preset
from deepseek.recipes.pretrain import PretrainConfig, pretrain, resume_run
from deepseek.recipes.respond import Responder
from deepseek.recipes.siblings import find_siblings
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
    pretrain(watched(corpus, {"every": 3, "detect": False}), tmp_path / "run", sinks=[sink])
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


def warnings_of(sink: MemorySink) -> list[str]:
    return [e.values["text"] for e in sink.events if e.name == "warning"]


def test_a_broken_store_and_a_broken_probe_are_told_once_and_end_nothing(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken()
    monkeypatch.setattr("deepseek.recipes.observe.StoreSink", lambda run, watch: broken)
    monkeypatch.setattr(StepProbe, "__call__", lambda self, result: 1 / 0)
    sink = MemorySink()
    done = pretrain(watched(corpus, {"every": 2}), tmp_path / "run", sinks=[sink])
    assert done.finished
    assert broken.heard == 1
    assert broken.closed
    assert len(warnings_of(sink)) == 2
    assert any("No space left" in text for text in warnings_of(sink))
    assert any("division by zero" in text for text in warnings_of(sink))


def test_a_store_that_cannot_be_opened_is_told_once_and_ends_nothing(tmp_path: Path, corpus: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "monitor").write_text("a file where the store should be")
    sink = MemorySink()
    assert pretrain(watched(corpus, {"every": 2}), run, sinks=[sink]).finished
    assert [t for t in warnings_of(sink) if "monitor" in t]
    assert len(warnings_of(sink)) <= 3  # the series, the run's history, and what may be asked of it
    assert series(sink)  # the probes go on


class FakeWatch:
    """Finds one incident, at step ``at``, in what the sink shows it."""

    def __init__(self, raises: bool = False, at: int = 5) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.raises, self.at, self.found = raises, at, 0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": len(self.rows)}

    def update(self, step: int, row: dict[str, float], time: float) -> list[Any]:
        self.rows.setdefault(step, {}).update(row)
        if self.raises:
            raise RuntimeError("a detector with a fault")
        if step != self.at or self.found:
            return []
        self.found = 1
        return [FakeIncident()]


class FakeIncident:
    def to_dict(self) -> dict[str, Any]:
        return {
            "id": "spike-5", "step": 5, "first_step": 4, "kind": "loss_spike", "severity": "critical", "samples": [],
        }  # fmt: skip


def test_an_incident_names_its_documents_and_the_run_rolls_back_and_skips(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = FakeWatch()
    monkeypatch.setattr("deepseek.recipes.observe.Watch", lambda config: watch)
    monkeypatch.setattr("deepseek.recipes.control.EVERY", 0.0)
    monkeypatch.setattr(
        "deepseek.recipes.observe.StoreSink", lambda run, watch: StoreSink(run, watch, every=1)
    )
    sink = MemorySink()

    class Patient(Controller):
        """At step 10 the run waits for the thread that watches it, however slow that is."""

        def __call__(self, step: int, result: StepResult) -> None:
            end = time.monotonic() + 60
            while step == 10 and "incident" not in {e.name for e in sink.events} and time.monotonic() < end:
                time.sleep(0.01)
            super().__call__(step, result)

    monkeypatch.setattr("deepseek.recipes.pretrain.Controller", Patient)
    options = {"every": 2, "on_incident": "rollback_skip", "samples": 5}
    config = watched(corpus, options, train={"steps": 20}, checkpoint={"every": 2, "asynchronous": False})
    assert pretrain(config, tmp_path / "run", sinks=[sink]).finished
    assert warnings_of(sink) == []
    with RunStore(tmp_path / "run") as store:
        (incident,) = store.incidents()
        names = store.series.names()
    assert len(incident["samples"]) == 5
    assert all(s["path"] and s["loss"] > 0 and s["text"] for s in incident["samples"])
    (back,) = [e for e in sink.events if e.name == "rollback"]
    assert tuple(back.values["steps"]) == (4, 5)
    assert {
        "train/loss",
        "layer/0/grad_norm",
        "attention/1/1/gate",
        "rank/0/step_seconds",
        "memory/rss",
    } <= set(names)
    assert watch.rows[4]["layer/1/activation_rms"] > 0


def test_a_detector_with_a_fault_is_told_once_and_ends_nothing(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek.recipes.observe.Watch", lambda config: FakeWatch(raises=True))
    sink = MemorySink()
    assert pretrain(watched(corpus, {}), tmp_path / "run", sinks=[sink]).finished
    assert len(warnings_of(sink)) == 1
    assert "a detector with a fault" in warnings_of(sink)[0]
    with RunStore(tmp_path / "run") as store:
        steps, _ = store.series.raw("train/loss", 0, 100)
    assert steps.tolist() == list(range(1, 9))  # the series go on


def test_what_is_found_in_the_last_step_is_told_to_the_log_and_to_people(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found as the sinks close: whoever hears of incidents must close after the store does."""
    monkeypatch.setattr("deepseek.recipes.observe.Watch", lambda config: FakeWatch(at=8))
    write = "import os, sys; open(sys.argv[1], 'wb').write(sys.stdin.buffer.read()); os.rename(*sys.argv[1:])"
    command = shlex.join([sys.executable, "-c", write, str(tmp_path / "part"), str(tmp_path / "alert.json")])
    sink = MemorySink()
    assert pretrain(watched(corpus, {"command": command}), tmp_path / "run", sinks=[sink]).finished
    assert warnings_of(sink) == []
    assert [e["id"] for e in events(tmp_path / "run") if e["event"] == "incident"] == ["spike-5"]
    end = (
        time.monotonic() + 60
    )  # a run waits a few seconds for what is on its way, which here is a new process
    while not (tmp_path / "alert.json").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert json.loads((tmp_path / "alert.json").read_text())["id"] == "spike-5"


def test_runs_with_the_same_data_are_siblings_and_a_watch_remembers(tmp_path: Path, corpus: Path) -> None:
    first = watched(corpus, {"every": 4}, checkpoint={"every": 4})
    pretrain(first, tmp_path / "a")
    pretrain(replace(first, optim=replace(first.optim, lr=0.003)), tmp_path / "b")
    pretrain(replace(first, data=replace(first.data, seed=1)), tmp_path / "other")
    (tmp_path / "broken" / "monitor").mkdir(parents=True)
    (tmp_path / "broken" / "monitor" / "monitor.db").write_text("no database")
    with RunStore(tmp_path / "a") as a, RunStore(tmp_path / "other") as other:
        order = a.meta("data_order")
        assert order != other.meta("data_order")
        remembered = a.meta("watch")
    (sibling,) = find_siblings(tmp_path / "b", order)
    assert sibling.path.name == "a"
    steps, values = sibling.series.raw("train/loss", 0, 100)
    assert steps.tolist() == list(range(1, 9))
    assert {int(s): pytest.approx(float(v), rel=1e-6) for s, v in zip(steps, values)} == losses(
        tmp_path / "a"
    )
    seen: list[Any] = []
    kept = Watch.load_state_dict

    def load(self: Watch, state: Any) -> None:
        seen.append(state["step"])
        kept(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "load_state_dict", load)
        longer = replace(first, train=replace(first.train, steps=12))
        assert resume_run(tmp_path / "a", longer).finished
    assert seen == [remembered["step"]] == [8]


def test_automatic_actions_end_after_some_that_did_not_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        "deepseek.recipes.respond.request",
        lambda run, action, arguments, by: asked.append((action, arguments)),
    )
    responder = Responder(MonitorConfig(on_incident="pause", explain=False), tmp_path)
    sink = MemorySink()
    with attached(sink, responder):
        for step in range(10, 20):
            incident = {"id": step, "kind": "slow", "severity": "warning" if step == 10 else "critical"}
            emit("incident", step, **incident)
            emit("incident", step, **incident)  # told again
            emit("incident", step, **{**incident, "id": -step})  # one action at a time
            responder.respond()
            emit("action", step, action="pause", status="done")
    assert asked == [("pause", {"incident": step}) for step in (11, 12, 13)]
    assert responder.wanted == 0
    assert len(warnings_of(sink)) == 1
    assert "did not help" in warnings_of(sink)[0]


def test_the_default_model_tells_more_than_three_hundred_series(tmp_path: Path, corpus: Path) -> None:
    config = watched(
        corpus, {"every": 2}, train={"steps": 5}, model={"vocab_size": 320}, data={"vocab_size": 320}
    )
    whole = preset("tiny")
    config = replace(config, model=replace(whole.model, vocab_size=320, hidden=32))
    pretrain(config, tmp_path / "run")
    with RunStore(tmp_path / "run") as store:
        names = store.series.names()
    assert len(names) >= 300
    described = [name for name in names if describe(name)]
    assert described == names  # each has a unit and a meaning


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
