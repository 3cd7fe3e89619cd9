"""The monitor of any loop: quiet on what is usual, loud on what is planted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek.errors import ConfigError
from deepseek.monitor.store import RunStore
from deepseek.monitor.training_monitor import (
    Alert,
    MovingAverage,
    MultiGPUAggregator,
    RateCounter,
    TrainingMonitor,
)

CURVES = Path(__file__).parents[2].parent / "shared" / "data" / "curves" / "losses.npz"


def curve(count: int, seed: int = 0) -> np.ndarray:
    """A loss that falls, with noise of a tenth."""
    steps = np.arange(count)
    return 2.0 + 3.0 * np.exp(-steps / 150) + np.random.default_rng(seed).normal(0, 0.1, count)


def flagged(keeper: MovingAverage, values: np.ndarray) -> list[int]:
    found = []
    for i, value in enumerate(values):
        keeper.update(value)
        if keeper.is_anomalous():
            found.append(i)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_curve_is_quiet_and_a_planted_spike_is_not(seed: int) -> None:
    values = curve(1000, seed)
    assert flagged(MovingAverage(bad="up"), values) == []
    values[600] = 8.0
    assert flagged(MovingAverage(bad="up"), values) == [600]
    values[601:700] += 1.0  # it does not come back
    assert {602, 603, 604} <= set(flagged(MovingAverage(bad="up"), values))
    assert set(flagged(MovingAverage(bad="up"), values)) <= set(range(600, 660))  # and becomes usual


def test_the_moving_average_is_the_mean_of_its_window() -> None:
    keeper, values = MovingAverage(window=20), curve(90)
    for value in values:
        keeper.update(torch.tensor(value))
    assert keeper.mean == pytest.approx(values[-20:].mean(), rel=1e-6)
    assert keeper.value == pytest.approx(values[-1], rel=1e-6)


def test_nan_is_unusual_at_once_and_forgotten_at_once() -> None:
    keeper = MovingAverage()
    keeper.update(math.nan)
    assert keeper.is_anomalous()
    values = curve(300)
    values[[100, 101, 250]] = [math.inf, -math.inf, math.nan]
    assert flagged(MovingAverage(bad="up"), values) == [100, 101, 250]


def test_only_the_bad_way_counts() -> None:
    values = curve(500)
    values[400:420] -= 1.5
    assert flagged(MovingAverage(bad="up"), values) == []
    assert 405 in flagged(MovingAverage(bad="down"), values)
    assert 405 in flagged(MovingAverage(bad="both"), values)


def test_a_constant_tolerates_what_is_within_its_least_spread() -> None:
    assert flagged(MovingAverage(relative=0.01), np.array([100.0] * 50 + [105.0] * 50)) == []
    assert 52 in flagged(MovingAverage(relative=0.01), np.array([100.0] * 50 + [107.0] * 50))


@pytest.mark.skipif(not CURVES.exists(), reason="the public loss curves are not in shared/data")
def test_public_curves_give_few_alerts() -> None:
    """At most 5 in 100k steps (the usual mean + 6 sigma rule: about 200)."""
    steps = alerts = 0
    with np.load(CURVES) as curves:
        for name in sorted(curves.files)[::6]:
            values = curves[name][:4000]
            found = flagged(MovingAverage(bad="up"), values)
            alerts += sum(1 for i, at in enumerate(found) if i == 0 or at > found[i - 1] + 1)
            steps += len(values)
    assert steps > 10_000
    assert alerts <= 5e-5 * steps + 1


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_counts_amounts_by_time() -> None:
    clock = Clock()
    keeper, total = RateCounter(clock=clock), RateCounter(cumulative=True, clock=clock)
    found = []
    for i in range(100):
        clock.now += 0.5 if i < 60 else 2.0  # four times slower
        keeper.update(1000)
        total.update(1000 * (i + 1))
        if keeper.is_anomalous():
            found.append(i)
        if i == 50:
            assert (keeper.value, keeper.mean, total.value) == (2000.0, 2000.0, 2000.0)
    assert found[0] == 62
    assert (total.total, keeper.total, total.value) == (100_000, 100_000, 500.0)
    assert not math.isfinite(RateCounter().value)


def test_a_faster_rate_is_no_fault() -> None:
    clock, keeper = Clock(), RateCounter()
    keeper.clock = clock
    for i in range(60):
        clock.now += 0.5 if i < 30 else 0.1
        keeper.update(10)
        assert not keeper.is_anomalous()


def test_a_device_that_leaves_the_others_is_named() -> None:
    keeper = MultiGPUAggregator()
    for i in range(40):
        keeper.update([90.0 + i % 3, 92.0, 91.0, 40.0 if i >= 30 else 93.0])
        assert keeper.is_anomalous() == (i >= 32)
    assert keeper.outliers == ["3"]
    assert keeper.value == pytest.approx((90.0 + 39 % 3 + 92 + 91 + 40) / 4)
    assert keeper.figures("gpu")["gpu/3"] == 40.0
    keeper.update({"a": 1.0, "b": math.nan})
    assert keeper.outliers == ["b"]
    keeper.update(torch.tensor([5.0, 5.1]))
    assert keeper.value == pytest.approx(5.05)


def test_all_devices_together_can_be_unusual() -> None:
    keeper = MultiGPUAggregator()
    seen = []
    for i in range(60):
        keeper.update([90.0, 91.0] if i < 40 else [20.0, 21.0])
        seen.append(keeper.is_anomalous())
    assert not any(seen[:40])
    assert seen[45]


def test_the_source_documents_loop(tmp_path: Path) -> None:
    """``update`` with a dictionary, ``is_anomalous`` for each, ``trigger_alert`` by name."""
    heard: list[Alert] = []
    values = curve(200)
    values[150] = 9.0
    values[170] = math.nan
    with TrainingMonitor(tmp_path, on_alert=heard.append) as monitor:
        assert isinstance(monitor.metrics["loss"], MovingAverage)
        assert isinstance(monitor.metrics["throughput"], RateCounter)
        assert isinstance(monitor.metrics["gpu_util"], MultiGPUAggregator)
        for i, loss in enumerate(values):
            monitor.update(
                {"loss": loss, "gpu_util": [90, 91, 92 if i < 100 else 30], "queue": 3 + i % 2}, step=i
            )
    assert [(a.name, a.step) for a in heard] == [("gpu_util", 102), ("loss", 150), ("loss", 170)]
    assert heard[0].detail == "device 2 at 30"
    assert "9 where" in heard[1].text
    with RunStore(tmp_path) as store:
        assert [(a["name"], a["step"], a["severity"]) for a in store.alerts()] == [
            ("gpu_util", 102, "warning"), ("loss", 150, "warning"), ("loss", 170, "critical"),
        ]  # fmt: skip
        np.testing.assert_array_equal(store.series.raw("loss")[1], np.float32(values))
        assert store.series.last()["gpu_util/2"] == 30
        assert store.series.steps() == (0, 199)


def test_trigger_alert_can_be_another(tmp_path: Path) -> None:
    class Mine(TrainingMonitor):
        def trigger_alert(self, name: str) -> None:
            calls.append((name, self.step))

    calls: list[tuple[str, int]] = []
    monitor = Mine(metrics={"x": MovingAverage(8, warmup=4)})
    for value in [1.0] * 10 + [5.0] * 3:
        monitor.update({"x": value})
    assert calls == [("x", 11), ("x", 12), ("x", 13)]
    with pytest.raises((TypeError, ValueError)):
        monitor.update({"x": "no number"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: MovingAverage(4), lambda: MovingAverage(warmup=200), lambda: MovingAverage(threshold=0),
        lambda: MovingAverage(threshold=6, spike=2), lambda: RateCounter(drop=1.5), lambda: MultiGPUAggregator(apart=0),
    ],
)  # fmt: skip
def test_nonsense_is_refused(make) -> None:
    with pytest.raises(ConfigError):
        make()
