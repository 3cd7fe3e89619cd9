"""Drift: ADWIN and Page-Hinkley beside River's, PSI and KS beside SciPy's and a count by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from deepseek.errors import ConfigError, DataError, MissingExtraError
from deepseek.monitor.drift import Adwin, drift_detector, ks, psi


def stream(seed: int, shift: float) -> list[float]:
    random = np.random.default_rng(seed)
    return [*random.normal(0.3, 0.1, 700).tolist(), *random.normal(0.3 + shift, 0.1, 500).tolist()]


def alarms(method: str, backend: str, values: list[float], **options: float) -> list[int]:
    detector = drift_detector(method, backend, **options)  # type: ignore[arg-type]
    return [i for i, value in enumerate(values) if detector.update(value)]


@pytest.mark.parametrize("seed", range(3))
def test_adwin_and_page_hinkley_answer_as_rivers_do(seed: int) -> None:
    pytest.importorskip("river")
    values = stream(seed, 0.2)
    assert alarms("adwin", "own", values) == alarms("adwin", "river", values)
    options = {"delta": 0.05, "threshold": 20.0}
    ours, theirs = (alarms("page_hinkley", b, values, **options) for b in ("own", "river"))
    assert len(ours) == len(theirs) == 1
    assert abs(ours[0] - theirs[0]) <= 10


def test_no_shift_no_alarm_and_the_window_forgets() -> None:
    assert alarms("adwin", "own", stream(0, 0.0)) == []
    adwin = Adwin()
    for value in stream(1, 0.3):
        adwin.update(value)
    assert adwin.mean == pytest.approx(0.6, abs=0.03)
    assert adwin.width < 600
    assert len(adwin.rows) < 12


def test_ks_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    for shift in (0.0, 0.3, 1.0):
        a, b = random.normal(0, 1, 80), random.normal(shift, 1, 60)
        expected = stats.ks_2samp(a, b, method="asymp")
        distance, chance = ks(a, b)
        assert distance == pytest.approx(expected.statistic, abs=1e-12)
        assert chance == pytest.approx(expected.pvalue, abs=0.03)


def test_psi_tells_a_shift_from_none() -> None:
    random = np.random.default_rng(0)
    reference = random.normal(0, 1, 3000)
    assert psi(reference, random.normal(0, 1, 3000)) < 0.03
    assert psi(reference, random.normal(1, 1, 3000)) > 0.25
    with pytest.raises(DataError, match="1 of them not finite"):
        psi(reference, [1.0, float("nan")])


def test_what_is_missing_or_unknown_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "river", None)
    assert isinstance(drift_detector(), Adwin)
    with pytest.raises(MissingExtraError, match=r"\[detect\]"):
        drift_detector("adwin", "river")
    with pytest.raises(ConfigError, match="adwin"):
        drift_detector("ddm")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="probability"):
        Adwin(delta=2.0)
