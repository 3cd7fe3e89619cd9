"""Incidents and verdicts: who moved first, what sibling runs say, and the life of an incident."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from deepseek.errors import RunError
from deepseek.monitor.baseline import Baselines
from deepseek.monitor.detect import Watch
from deepseek.monitor.detectors import Alarm
from deepseek.monitor.incident import Incident, gradient_map, leading_kind, movers, severity_of
from deepseek.monitor.verdict import Case, diagnose, jumped


@dataclass
class Curve:
    """A sibling run that has one series."""

    values: np.ndarray

    @property
    def series(self) -> Curve:
        return self

    def raw(self, name: str, start: int, stop: int) -> tuple[Any, Any]:
        assert name == "train/loss"
        return np.arange(start, min(stop, len(self.values))), self.values[start:stop]


def curve(seed: int, spike: float = 0.0) -> np.ndarray:
    values = 2 + np.random.default_rng(seed).normal(0, 0.05, 300)
    values[200] += spike
    return values


def spike_of(siblings: list[Curve]) -> Incident:
    watch, found = Watch(siblings=siblings), list[Incident]()
    for step, value in enumerate(curve(0, 4.0).tolist()):
        found += watch.update(
            step, {"train/loss": value, "train/grad_norm": 0.3 + 0.01 * (step % 7)}, float(step)
        )
    return found[-1]


def test_the_same_jump_in_a_sibling_means_data_and_none_does_not() -> None:
    same = spike_of([Curve(curve(1, 3.5)), Curve(curve(2))])
    assert same.verdict == "DATA"
    assert same.evidence[0]["text"].startswith("the loss also jumped at step 200 in 1 of 2 sibling runs")
    alone, none = spike_of([Curve(curve(1))]), spike_of([])
    assert any("passed step 200 without a jump" in e["text"] for e in alone.evidence)
    assert alone.confidence < none.confidence < same.confidence


def test_a_jump_is_measured_against_the_siblings_own_noise() -> None:
    found = jumped(Curve(curve(1, 3.5)), 200)
    assert found is not None
    assert found[0] == pytest.approx(70, rel=0.5)
    assert abs(jumped(Curve(curve(1)), 200)[0]) < 5  # type: ignore[index]
    assert jumped(Curve(curve(1)[:100]), 200) is None
    lost = curve(1)
    lost[200] = math.nan
    assert jumped(Curve(lost), 200)[0] == math.inf  # type: ignore[index]


def planted(order: dict[str, int]) -> Baselines:
    """Baselines in which each series of ``order`` leaves its course at its step and stays away."""
    random, base = np.random.default_rng(0), Baselines()
    for step in range(300):
        row = {
            name: math.exp(0.05 * random.normal()) * (5.0 if step >= at else 1.0)
            for name, at in order.items()
        }
        row["layer/9/grad_norm"] = math.exp(0.05 * random.normal())
        base.update(step, row)
    return base


def test_movers_come_in_the_order_in_which_they_moved() -> None:
    order = {"layer/3/grad_norm": 250, "train/grad_norm": 252, "time/step": 256, "layer/1/grad_norm": 260}
    found = movers(planted(order), 256)
    assert [(m.name, m.step) for m in found] == list(order.items())
    assert all(m.before == pytest.approx(1, abs=0.1) and m.after == pytest.approx(5, rel=0.2) for m in found)


def test_the_gradient_map_has_the_rows_it_says() -> None:
    base = planted({"layer/3/grad_norm": 250, "layer/embedding/grad_norm": 999, "layer/head/grad_norm": 999})
    found = gradient_map(base, 240, 259)
    assert found["layers"] == ["embedding", "3", "9", "head"]
    assert found["steps"] == list(range(240, 260))
    values = np.array(found["values"])
    assert values.shape == (4, 20)
    assert values[1, 10:].min() > 3 > values[1, :10].max()
    assert gradient_map(Baselines(), 0, 10) == {}


def test_gradient_first_is_model_and_without_evidence_it_is_unknown() -> None:
    base = planted({"train/grad_norm": 250, "train/loss": 253})
    alarm = Alarm("gradient_spike", "train/grad_norm", 251, 5.0, 30.0, "gradient norm 5")
    verdict = diagnose(Case([alarm], movers(base, 251), base))
    assert (verdict.cause, verdict.confidence) == ("MODEL", 0.6)
    assert "3 steps before the loss" in verdict.findings[0].text
    calm = planted({"train/loss": 999})
    assert (
        diagnose(Case([Alarm("loss_spike", "train/loss", 250, 5.0, 30.0, "loss 5")], [], calm)).cause
        == "UNKNOWN"
    )


def incident() -> Incident:
    return Incident(
        "7-nan-1", 7, 6, "nan", "critical", "MODEL", 0.6, "t", "s", [{"value": math.nan}], [], [0, 207]
    )


def test_an_incident_goes_through_json_and_its_life() -> None:
    one = incident()
    told = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    assert told["evidence"] == [{"value": "nan"}]
    assert Incident.from_dict({**told, "time": 3.0}).id == one.id
    seen = one.moved_to("acknowledged").with_action("rollback_skip", command=3)
    assert (seen.status, seen.actions) == ("acknowledged", [{"action": "rollback_skip", "command": 3}])
    assert seen.moved_to("resolved").moved_to("open").status == "open"
    assert one.status == "open"
    with pytest.raises(RunError, match=r"is resolved and cannot become acknowledged"):
        one.moved_to("resolved").moved_to("acknowledged")


def test_the_most_telling_kind_names_it() -> None:
    spike = Alarm("loss_spike", "train/loss", 1, 1.0, 1.0, "")
    norm = Alarm("gradient_spike", "train/grad_norm", 1, 1.0, 1.0, "")
    assert leading_kind([norm, spike]) == "loss_spike"
    assert severity_of([norm]) == "warning"
    assert severity_of([norm, spike]) == "critical"
