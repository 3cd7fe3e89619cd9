"""What a run tells ends up in its store: compared with ``events.jsonl``, which another sink writes."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek.config import replace
from deepseek.data import DataConfig, SourceConfig
from deepseek.events import Event, MemorySink, attached, emit, read_jsonl
from deepseek.models.config import tiny
from deepseek.monitor.catalogue import describe, group_of
from deepseek.monitor.series import SeriesReader
from deepseek.monitor.sink import StoreSink
from deepseek.monitor.store import RunStore
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.recipes.pretrain import PretrainConfig, pretrain, resume_run
from deepseek.train import OptimConfig, TrainingConfig
from deepseek.weights.checkpoint import CheckpointConfig


def config(root: Path) -> PretrainConfig:
    """A model with a dense and an expert layer, hybrid attention in the second."""
    corpus, draw = root / "corpus", random.Random(0)
    corpus.mkdir()
    for i in range(30):
        words = draw.choices(
            ["alpha", "beta", "gamma", "delta", "def", "return", "self", "epsilon", "zeta"], k=150
        )
        (corpus / f"{i}.txt").write_text(" ".join(words))
    made = PretrainConfig(
        model=tiny(
            vocab_size=300, hidden=16, layers=2, ffn=24, pattern="LH", ffn_pattern="DE", max_length=64,
            attention=AttentionConfig(heads=2, kv_heads=1, head_dim=8, window=8, block=8, stride=4),
            moe=MoEConfig(experts=4, top_k=2, expert_ffn=8),
        ),
        data=DataConfig(sources=(SourceConfig(kind="text", path=str(corpus)),), vocab_size=300, held_out=0.15),
        optim=OptimConfig(lr=0.01),
        train=TrainingConfig(steps=8, batch_tokens=256, length=32, precision_mode="fp32", device="cpu"),
        checkpoint=CheckpointConfig(every=3, keep_last=0),
    )  # fmt: skip
    return replace(made, monitor=replace(made.monitor, enabled=False))


def told(run: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in read_jsonl(run / "events.jsonl") if e["event"] == name]


def check_against_events(run: Path, until: int) -> None:
    reader = SeriesReader(run / "monitor")
    latest = {e["step"]: e for e in told(run, "train")}  # of a step done twice the later
    assert sorted(latest) == list(range(1, until + 1))
    for name in (
        "loss",
        "grad_norm",
        "lr",
        "bits_per_byte",
        "tokens",
        "tokens_per_second",
        "max_vio",
        "clipped",
    ):
        steps, values = reader.raw(f"train/{name}")
        assert steps.tolist() == sorted(latest)
        np.testing.assert_array_equal(values, np.float32([float(latest[s][name]) for s in steps.tolist()]))
    for expert in range(4):  # the expert layer is block 1
        values = reader.raw(f"expert/1/{expert}/load")[1]
        np.testing.assert_array_equal(
            values, np.float32([latest[s]["load"][0][expert] for s in sorted(latest)])
        )
    for head in range(2):
        values = reader.raw(f"attention/1/{head}/gate")[1]
        np.testing.assert_array_equal(
            values, np.float32([latest[s]["gates"]["1"][head] for s in sorted(latest)])
        )
    whole = [sum(latest[s]["seconds"].values()) for s in sorted(latest)]
    np.testing.assert_allclose(reader.raw("time/step")[1], whole, rtol=1e-6)
    assert reader.damaged == 0


@pytest.mark.slow
def test_a_run_and_its_continuation_are_in_the_store(tmp_path: Path) -> None:
    run, asked = tmp_path / "run", config(tmp_path)
    pretrain(replace(asked, train=replace(asked.train, steps=8)), run, sinks=[StoreSink(run)])
    check_against_events(run, 8)
    longer = replace(asked, train=replace(asked.train, steps=10))
    resume_run(run, longer, step=6, sinks=[StoreSink(run)])  # goes back from 8 to 6
    check_against_events(run, 10)
    with RunStore(run) as store:
        kinds = [line["kind"] for line in store.lineage()]
        assert kinds.count("run") == 2
        assert {"resume", "checkpoint", "done"} <= set(kinds)
        evaluated = {e["step"]: e["loss"] for e in told(run, "evaluate")}
        steps, values = store.series.raw("eval/loss")
        np.testing.assert_array_equal(values, np.float32([evaluated[s] for s in steps.tolist()]))


def test_a_run_that_watches_itself_emits_nothing_the_catalogue_lacks(tmp_path: Path) -> None:
    made = config(tmp_path)
    made = replace(
        made, monitor=replace(made.monitor, enabled=True, every=2), train=replace(made.train, steps=4)
    )
    pretrain(made, tmp_path / "run")
    reader = SeriesReader(tmp_path / "run" / "monitor")
    names = reader.names()
    assert [name for name in names if describe(name) is None] == []
    groups = {group_of(name) for name in names}
    assert {"train", "eval", "time", "memory", "layer", "attention", "router", "expert"} <= groups
    assert reader.raw("train/loss")[0].tolist() == [1, 2, 3, 4]


@dataclass
class Found:
    step: int

    def to_dict(self) -> dict[str, Any]:
        return {"id": f"i{self.step}", "step": self.step, "kind": "loss_spike", "status": "open"}


class Recorder:
    """A watch that keeps what it is shown and finds something at step 3."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float], float]] = []
        self.ticks = 0

    def update(self, step: int, row: Mapping[str, float], time: float) -> list[Found]:
        self.seen.append((step, dict(row), time))
        return [Found(step)] if step == 3 else []

    def tick(self, time: float) -> list[Found]:
        self.ticks += 1
        return []


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_every_event_becomes_series_and_rows_are_whole_for_the_watch(tmp_path: Path) -> None:
    watch, memory = Recorder(), MemorySink()
    with attached(
        sink := StoreSink(tmp_path, watch, seconds=600.0), memory
    ):  # no row is cut by a pause of ours
        emit("run", 0, expert_layers=[2])
        for step in range(1, 5):
            emit(
                "train", step, loss=torch.tensor(2.0 / step), skipped=torch.tensor(False), tokens=100,
                seconds={"data": 0.25, "step": 0.5}, load=[torch.tensor([0.25, 0.75])], gates={}, note="text",
            )  # fmt: skip
            emit("probe", step, series={"precision/nonfinite": torch.zeros(()), "layer/0/grad_norm": 1.5})
            emit("probe", step, names=("a", "b"), values=torch.tensor([1.0, math.nan], dtype=torch.bfloat16))
            emit("ranks", step - 1, seconds=[0.5, 0.75], data=[0.0, 0.0], memory=[1e9, 2e9])
        emit("data", 4, sources={"web/a": {"loss": torch.tensor(3.0), "share": 0.5}})
        emit("evaluate", 4, loss=2.5, bits_per_byte=1.0)
        emit("warning", 4, text="nothing to keep")
        sink._seconds = 0.05
        assert sink.flush()
        until(lambda: watch.ticks > 0)
    reader = SeriesReader(tmp_path / "monitor")
    assert reader.raw("train/loss")[1].tolist() == [2.0, 1.0, np.float32(2 / 3), 0.5]
    last = reader.last()
    expected = {
        "train/tokens": 100, "train/skipped": 0, "time/data": 0.25, "time/compute": 0.5, "time/step": 0.75,
        "expert/2/0/load": 0.25, "expert/2/1/load": 0.75, "precision/nonfinite": 0, "layer/0/grad_norm": 1.5, "a": 1,
        "data/web_a/loss": 3, "data/web_a/share": 0.5, "eval/loss": 2.5, "eval/bits_per_byte": 1,
        "rank/0/step_seconds": 0.5, "rank/1/step_seconds": 0.75, "rank/1/memory": 2e9,
    }  # fmt: skip
    assert {k: last[k] for k in expected} == expected
    assert math.isnan(last["b"])
    assert not [name for name in reader.names() if "note" in name]
    assert reader.raw("rank/1/step_seconds")[0].tolist() == [
        0,
        1,
        2,
        3,
    ]  # where they belong, though they came late
    assert [step for step, _, _ in watch.seen] == [1, 2, 3, 4]
    for _, row, when in watch.seen:
        assert {"train/loss", "layer/0/grad_norm", "a", "rank/0/step_seconds"} <= row.keys()
        assert abs(when - time.time()) < 60
    assert [(e.step, e.values["id"]) for e in memory.events if e.name == "incident"] == [(3, "i3")]
    with RunStore(tmp_path) as store:
        assert [i["id"] for i in store.incidents()] == ["i3"]


@pytest.mark.parametrize(("pause", "after"), [("busy", "evaluate"), ("done", "run"), ("interrupted", "run")])
def test_nobody_waits_for_steps_while_none_is_due(tmp_path: Path, pause: str, after: str) -> None:
    watch = Recorder()
    with attached(sink := StoreSink(tmp_path, watch, seconds=0.02)):
        emit("train", 1, loss=1.0)
        emit(pause, 1)
        assert sink.flush()
        before = watch.ticks
        time.sleep(0.3)
        assert watch.ticks == before
        emit(after, 1, loss=1.0)
        assert sink.flush()
        until(lambda: watch.ticks > before)


def test_the_newest_row_is_shown_though_nothing_follows(tmp_path: Path) -> None:
    watch = Recorder()
    with attached(StoreSink(tmp_path, watch, seconds=0.02)):
        emit("train", 1, loss=1.0)
        until(lambda: bool(watch.seen))
        assert [step for step, _, _ in watch.seen] == [1]
        assert SeriesReader(tmp_path / "monitor").last() == {"train/loss": 1.0}


def test_a_run_that_rolls_back_or_begins_again_hides_what_is_void(tmp_path: Path) -> None:
    watch = Recorder()
    with attached(StoreSink(tmp_path, watch)):
        for step in range(1, 11):
            emit("train", step, loss=1.0)
        emit("rollback", 4, from_step=10)
        for step in range(5, 7):
            emit("train", step, loss=2.0)
    reader = SeriesReader(tmp_path / "monitor")
    assert reader.raw("train/loss")[1].tolist() == [1.0] * 4 + [2.0] * 2
    assert [s for s, _, _ in watch.seen] == [*range(1, 11), 5, 6]
    with attached(StoreSink(tmp_path)):
        emit("run", 0)
        emit("train", 1, loss=3.0)
    reader.refresh()
    assert reader.raw("train/loss")[1].tolist() == [3.0]


class Broken:
    def update(self, step: int, row: Mapping[str, float], time: float) -> list[Found]:
        raise ZeroDivisionError("a mistake")


def test_failures_cost_telemetry_and_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MemorySink()
    sink = StoreSink(tmp_path, Broken(), seconds=0.02)
    with attached(sink, memory):
        for step in range(1, 6):
            emit("train", step, loss=1.0)
        assert sink.flush()
        with monkeypatch.context() as patch:
            patch.setattr("deepseek.monitor.writer.Layout.fill", lambda self, values: 1 / 0)
            for step in range(6, 9):
                emit("train", step, loss=1.0)
            assert sink.flush()
        emit("train", 9, loss=1.0)
    assert sink.dropped == 3
    assert SeriesReader(tmp_path / "monitor").raw("train/loss")[0].tolist() == [1, 2, 3, 4, 5, 9]
    texts = [e.values["text"] for e in memory.events if e.name == "warning"]
    assert len(texts) == 2
    assert "a mistake" in texts[0]


def test_closing_waits_for_no_lock(tmp_path: Path) -> None:
    """The thread tells of incidents while the sink is being closed; nobody waits for the other."""

    class Late(Recorder):
        def update(self, step: int, row: Mapping[str, float], time: float) -> list[Found]:
            threading.Event().wait(0.05)
            return [Found(step)]

    memory = MemorySink()
    with attached(memory), attached(StoreSink(tmp_path, Late())):
        for step in range(1, 6):
            emit("train", step, loss=1.0)
    assert [e.step for e in memory.events if e.name == "incident"] == [1, 2, 3, 4, 5]


def test_emitting_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading happens on the sink's thread alone."""
    threads = set()
    from deepseek.monitor import sink as module

    read = module.read_tensors

    def spy(events: list[Event]) -> None:
        threads.add(threading.current_thread().name)
        read(events)

    monkeypatch.setattr(module, "read_tensors", spy)
    with attached(StoreSink(tmp_path)):
        emit("train", 1, loss=torch.tensor(1.0))
    assert threads == {"store"}
