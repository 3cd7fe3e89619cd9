"""The data watched beside training: figures by source, the reference over a resume, drifts as incidents."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest

from deepseek.data import Corpus, DataConfig, SourceConfig, prepare
from deepseek.data.quality import DriftAlert, QualityConfig, QualityMonitor
from deepseek.events import MemorySink, attached
from deepseek.monitor.config import MonitorConfig
from deepseek.monitor.probe_data import REFERENCE, DataProbe, drift_incident
from deepseek.monitor.store import RunStore
from deepseek.recipes.observe import Observer

QUICK = QualityConfig(reference=4, window=8, least=4, every=2)
FOREIGN = {"source": "b", "path": "x", "offset": 3, "value": 9.0}
ALERT = DriftAlert(7, "b", "surprise", 0.9, 0.5, 0.2, 0.1, "source 'b' has changed", [FOREIGN])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    for name, words in (("a", "alpha beta gamma delta"), ("b", "one two three four")):
        (root / name).mkdir()
        for i in range(30):
            text = " ".join(draw.choices(words.split(), k=draw.randint(40, 120)))
            (root / name / f"{i}.txt").write_text(f"{i} {text}")
    sources = tuple(SourceConfig(kind="text", path=str(root / name), name=name) for name in ("a", "b"))
    return prepare(DataConfig(sources=sources, vocab_size=300, held_out=0.0), root / "cache")


def watch(
    corpus: Corpus, run: Path, steps: int, resumed: bool = False
) -> tuple[MemorySink, list[Any], list[Exception]]:
    sink, drifts, failures = MemorySink(), list[Any](), list[Exception]()
    with corpus.loader(rows=4, length=32) as loader, attached(sink):
        probe = DataProbe(
            loader,
            corpus.tokenizer,
            run,
            lambda *found: drifts.append(found),
            failures.append,
            QUICK,
            resumed,
        )
        for step in range(1, steps + 1):
            next(loader)
            assert loader.last is not None
            probe._queue.put((step, loader.last))  # waits, so that no batch is passed over
        probe.close()
    assert probe.passed_over == 0
    return sink, drifts, failures


def test_every_source_is_told_and_the_reference_is_kept_for_a_resume(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, _, failures = watch(corpus, tmp_path, 40)
    assert failures == []
    told = [e for e in sink.events if e.name == "data"]
    assert [e.step for e in told] == list(range(told[0].step or 0, 41, 2))
    last = told[-1].values["sources"]
    assert set(last) == {"a", "b"}
    assert sum(figures["share"] for figures in last.values()) == pytest.approx(1.0)
    assert all(figures["length"] > 20 and figures["entropy"] > 1 for figures in last.values())
    assert (tmp_path / REFERENCE).is_file()
    loaded: list[Path] = []
    real = QualityMonitor.load
    monkeypatch.setattr(QualityMonitor, "load", lambda self, path: (loaded.append(path), real(self, path))[1])
    again, _, failures = watch(corpus, tmp_path, 4, resumed=True)
    assert (loaded, failures) == ([tmp_path / REFERENCE], [])
    (tmp_path / REFERENCE).write_bytes(b"no archive")
    again, _, failures = watch(corpus, tmp_path, 4, resumed=True)
    assert failures == []
    assert [e.values["text"] for e in again.events if e.name == "warning"]


def test_a_failure_in_the_thread_is_told_once_and_stops_nobody(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QualityMonitor, "update", lambda self, delivery: 1 / 0)
    _, _, failures = watch(corpus, tmp_path, 20)
    assert [type(error) for error in failures] == [ZeroDivisionError]


def test_a_thread_that_is_behind_passes_batches_over(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr(QualityMonitor, "update", lambda self, delivery: go.wait(120) and None)
    with corpus.loader(rows=4, length=32) as loader:
        probe = DataProbe(loader, None, tmp_path, lambda *found: None, lambda error: None, QUICK)
        next(loader)
        assert loader.last is not None
        for step in range(20):
            probe(step, loader.last)
        assert 14 <= probe.passed_over <= 16  # four wait, one is at work
        go.set()
        probe.close()


def test_a_drift_becomes_an_incident_or_part_of_the_one_that_is_open(tmp_path: Path) -> None:
    observer = Observer(MonitorConfig(), tmp_path, rank=1)
    sink = MemorySink()
    with attached(sink):
        observer._drifted(70, ALERT)
        (told,) = [e for e in sink.events if e.name == "incident"]
        assert (told.step, told.values["kind"], told.values["verdict"]) == (70, "data_drift", "DATA")
        with RunStore(tmp_path) as store:
            (kept,) = store.incidents()
            assert kept["samples"] == [{"source": "b", "path": "x", "offset": 3, "foreign": 9.0}]
            store.change_incident(kept["id"], samples=[])
        observer._drifted(80, ALERT)
        with RunStore(tmp_path) as store:
            (kept,) = store.incidents()
        assert len(kept["samples"]) == 1
        assert len([e for e in sink.events if e.name == "incident"]) == 1
    assert drift_incident(70, ALERT).window == [1, 270]
