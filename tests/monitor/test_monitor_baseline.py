"""Baselines: against plain statistics of the same numbers, with and without outliers, and through JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from deepseek.errors import ConfigError
from deepseek.monitor.baseline import Baselines, trait_of


def fed(values: np.ndarray, name: str = "train/loss", **options: float) -> Baselines:
    base = Baselines(**options)  # type: ignore[arg-type]
    for step, value in enumerate(values.tolist()):
        base.update(step, {name: value})
    return base


def test_level_and_spread_are_those_of_the_numbers() -> None:
    values = np.random.default_rng(0).normal(2.0, 0.1, 2000)
    base = fed(values)
    assert base.level[0] == pytest.approx(2.0, abs=0.06)
    assert base.spread[0] == pytest.approx(values.std(), rel=0.35)


def test_outliers_do_not_buy_the_scale() -> None:
    random = np.random.default_rng(1)
    values = random.normal(2.0, 0.1, 2000)
    values[random.random(2000) < 0.05] += 8.0
    base = fed(values)
    assert values.std() > 1.0
    assert base.spread[0] < 0.2
    assert base.level[0] == pytest.approx(2.0, abs=0.15)


def test_a_falling_curve_is_followed_without_alarm() -> None:
    steps = np.arange(1, 3001)
    values = 2 + 8 * steps**-0.5 + np.random.default_rng(2).normal(0, 0.02, 3000)
    base = Baselines(rows=512)
    most = 0.0
    for step, value in zip(steps.tolist(), values.tolist()):
        base.update(step, {"train/loss": value})
        most = max(most, float(base.up[0]))
    assert most < 15


def test_a_factor_is_judged_by_its_logarithm() -> None:
    values = np.exp(np.random.default_rng(3).normal(np.log(0.2), 0.1, 500))
    base = fed(values, "train/grad_norm")
    assert base.log[0]
    assert base.expected(0) == pytest.approx(0.2, rel=0.1)
    scores = base.update(500, {"train/grad_norm": 2.0})
    assert scores.z[0] == pytest.approx(np.log(10) / 0.1, rel=0.4)


def test_series_may_come_and_go() -> None:
    base = Baselines()
    for step in range(200):
        base.update(step, {"a": 1.0 + step % 2, **({"b": float(step)} if step % 10 == 0 else {})})
    a, b = base.place["a"], base.place["b"]
    assert base.count[a] == 200
    assert base.count[b] == 20
    assert np.isnan(base.values[(base.seen - 1) % base.rows, b])


def test_nan_teaches_nothing_and_is_told_apart_from_absence() -> None:
    base = fed(np.random.default_rng(4).normal(2, 0.1, 100))
    level = base.level.copy()
    base.update(100, {"train/loss": float("nan"), "other": 1.0})
    slot = (base.seen - 1) % base.rows
    assert base.level[0] == level[0]
    assert base.lost[slot].tolist() == [True, False]


def test_state_goes_through_json_and_goes_on_alike() -> None:
    random = np.random.default_rng(5)
    one = fed(random.normal(2, 0.1, 300), rows=64)
    two = Baselines(rows=64)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for step in range(300, 340):
        row = {"train/loss": float(random.normal(2, 0.1)), "new": float(step)}
        assert np.array_equal(one.update(step, row).z, two.update(step, row).z)
    with pytest.raises(ConfigError, match="64 rows"):
        Baselines(rows=32).load_state_dict(one.state_dict())


def test_a_prior_replaces_the_first_rows() -> None:
    base = Baselines()
    base.prior("train/grad_norm", 0.2, 0.3)
    assert base.update(31214, {"train/grad_norm": 0.2}).z[0] == pytest.approx(0.0, abs=1e-6)
    assert base.update(31215, {"train/grad_norm": 2.0}).z[0] == pytest.approx(np.log(10) / 0.3, rel=0.1)
    with pytest.raises(ConfigError, match="positive"):
        base.prior("train/grad_norm", 0.0, 0.3)


def test_the_catalogued_names_have_traits() -> None:
    assert trait_of("layer/embedding/grad_norm").log
    assert trait_of("rank/3/step_seconds").bad == 1
    assert trait_of("router/2/entropy").bad == -1
    assert not trait_of("my own/metric").log
