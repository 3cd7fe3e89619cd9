"""How fast layers move, from checkpoints and from what was recorded; and histograms that lose nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from deepseek.monitor.inspect.histograms import Histogram, robust_limits
from deepseek.monitor.inspect.updates import layer_of, recorded_updates, update_ratios
from deepseek.monitor.writer import SeriesWriter


def test_recorded_ratios_with_their_variation(tmp_path: Path) -> None:
    with SeriesWriter(tmp_path / "monitor") as writer:
        for step in range(1, 101):
            wave = math.exp(0.5 * (-1) ** step)
            writer.log(
                step, {"layer/0/update_ratio": 1e-3, "layer/1/update_ratio": 1e-3 * wave, "train/loss": 2.0}
            )
    found = recorded_updates(tmp_path)
    assert sorted(found) == ["0", "1"]
    assert found["0"]["step"] == list(range(1, 101))
    assert found["0"]["average"] == pytest.approx(1e-3, rel=1e-5)
    assert found["0"]["variation"] == pytest.approx(0, abs=1e-6)
    assert found["1"]["variation"] == pytest.approx(0.5, rel=0.02)
    assert recorded_updates(tmp_path / "nothing") == {}


def test_ratios_are_norms_over_whole_layers() -> None:
    before = {
        "blocks.0.a": torch.tensor([3.0, 0.0]),
        "blocks.0.b": torch.tensor([4.0]),
        "embedding.weight": torch.ones(4),
    }
    after = {
        "blocks.0.a": torch.tensor([3.0, 3.0]),
        "blocks.0.b": torch.tensor([0.0]),
        "embedding.weight": torch.ones(4),
    }
    assert update_ratios(before, after) == {"0": pytest.approx(1.0), "embedding": 0.0}
    assert [layer_of(n) for n in ("blocks.12.ffn.down", "head.weight", "norm.weight")] == [
        "12",
        "head",
        "norm",
    ]


def test_an_outlier_neither_hides_nor_flattens() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=random)
    values[7], values[8], values[9] = 1e4, float("nan"), float("-inf")
    histogram = Histogram()
    for part in values.split(30_000):
        histogram.add(part)
    found = histogram.to_dict()
    assert (found["max"], found["nonfinite"]) == (1e4, 2)
    assert found["count"] == 99_998 == found["below"] + sum(found["counts"]) + found["above"]
    assert found["above"] >= 1
    assert -5 < found["low"] < -3 < 3 < found["high"] < 5
    middle = found["counts"][len(found["counts"]) // 2]
    assert middle > 3_000  # the bins still resolve what is usual
    good = values[values.isfinite()].double()
    assert found["mean"] == pytest.approx(float(good.mean()), rel=1e-6)
    assert found["std"] == pytest.approx(float(good.std(correction=0)), rel=1e-6)
    kurtosis = float(((good - good.mean()) ** 4).mean() / good.var(correction=0) ** 2)
    assert found["kurtosis"] == pytest.approx(kurtosis, rel=1e-4)


def test_constants_and_nothing_at_all() -> None:
    low, high = robust_limits(torch.full((10,), 2.0))
    assert low < 2 < high
    empty = Histogram()
    empty.add(torch.tensor([float("nan")]))
    assert empty.to_dict()["count"] == 0
    assert empty.to_dict()["min"] is None
