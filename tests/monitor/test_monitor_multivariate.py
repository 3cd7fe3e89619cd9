"""The multivariate model finds a row that no series shows alone, and names the series that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deepseek.errors import ConfigError, DataError
from deepseek.monitor.multivariate import MultivariateDetector, odd_rows

pytest.importorskip("sklearn")


class Kept:
    """Series in memory, with a reader's methods."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self.columns = columns

    def names(self) -> list[str]:
        return list(self.columns)

    def raw(self, name: str, start: int, stop: int) -> tuple[Any, Any]:
        values = self.columns[name][start:stop]
        return np.arange(start, start + len(values)), values.astype(np.float32)


def correlated(n: int = 300) -> np.ndarray:
    random = np.random.default_rng(0)
    common = random.normal(0, 1, n)
    rows = np.stack([common + random.normal(0, 0.1, n) for _ in range(4)], axis=1)
    rows[200] = [1.5, 1.5, -1.5, 1.5]  # each value alone is usual
    return rows


def test_the_covariance_finds_what_no_series_shows() -> None:
    rows = correlated()
    assert np.abs(rows[200]).max() < 2.0
    detector = MultivariateDetector("robust_covariance").fit(rows)
    assert int(detector.score(rows).argmax()) == 200
    shares = detector.explain(rows[200])
    assert int(shares.argmax()) == 2
    assert shares.sum() == pytest.approx(1.0)


def test_the_forest_finds_and_explains_an_outlier() -> None:
    rows = np.random.default_rng(1).normal(0, 1, (300, 6))
    rows[100, 4] = 9.0
    detector = MultivariateDetector("isolation_forest").fit(rows)
    assert int(detector.score(rows).argmax()) == 100
    assert int(detector.explain(rows[100]).argmax()) == 4


def test_a_runs_rows_are_judged_without_their_course() -> None:
    rows = correlated()
    course = 3 + np.exp(-np.arange(300) / 60)
    columns = {f"my/{k}": course + 0.1 * rows[:, k] for k in range(4)}
    columns["rare"] = np.full(300, np.nan)
    found = odd_rows(Kept(columns), 0, 300, method="robust_covariance", most=3)
    assert found[0].step == 200
    assert found[0].series[0][0] == "my/2"
    assert all(name != "rare" for row in found for name, _ in row.series)


def test_too_little_is_said_with_numbers() -> None:
    with pytest.raises(DataError, match=r"\(5, 2\)"):
        MultivariateDetector().fit(np.zeros((5, 2)))
    with pytest.raises(DataError, match="60 series"):
        MultivariateDetector("robust_covariance").fit(np.zeros((100, 60)))
    with pytest.raises(DataError, match="longer"):
        odd_rows(Kept({"a": np.zeros(10)}), 0, 10)
    with pytest.raises(ConfigError, match="isolation_forest"):
        MultivariateDetector("svm")  # type: ignore[arg-type]
