"""Detectors beside a loop of one's own: what they find is told in the loop's names, and the loop never minds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import deepseek.monitor as wandb
from deepseek.files import claimed
from deepseek.monitor.session_watch import SessionWatch
from deepseek.monitor.store import RunStore


def rows(spike: int | None, steps: int = 300) -> Iterator[dict[str, float]]:
    """A healthy loss and gradient norm, with one bad batch."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        bad = step == spike
        yield {
            "train_loss": 2 + 3 / (1 + step) ** 0.5 + 0.02 * rng.standard_normal() + 6 * bad,
            "grad_norm": float(np.exp(0.1 * rng.standard_normal())) * (40 if bad else 1),
            "other": rng.standard_normal(),
        }


def train(root: Path, spike: int | None, **options: bool) -> list[dict[str, object]]:
    with wandb.init(name="mine", dir=root, **options) as run:
        for row in rows(spike):
            run.log(row)
    with RunStore(root / "mine") as store:
        return store.incidents()


def test_a_spike_is_found_and_told_in_the_loops_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        (found,) = train(tmp_path, 200)
    assert (found["step"], found["kind"]) == (200, "loss_spike")
    text = str(found)
    assert "'train_loss'" in text
    assert "'grad_norm'" in text
    assert "train/loss" not in text.replace("train_loss", "")
    assert [r.message for r in caplog.records if "Loss spike at step 200" in r.message]


def test_a_healthy_loop_has_no_incident_and_one_that_wants_none_gets_none(tmp_path: Path) -> None:
    assert train(tmp_path / "a", None) == []
    assert train(tmp_path / "b", 200, detect=False) == []


def test_of_several_processes_one_watches(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with claimed(tmp_path / "run" / ".watching"):
        second = SessionWatch(tmp_path / "run", seconds=0.01)
        second._thread.join(120)
        assert not second._thread.is_alive()


def test_a_detector_that_fails_ends_watching_and_not_the_loop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ArithmeticError("no")

    monkeypatch.setattr("deepseek.monitor.detect.Watch.update", fail)
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path, 200) == []
    assert "ArithmeticError: no; this run is not watched" in caplog.text
