"""Rows that are odd as a whole though no series alone is: a multivariate model, on demand.

A layer's gradient norm that stays at 0.3 is fine while the learning rate is high, and odd when everything around it has
fallen. ``MultivariateDetector`` learns which values go together, by an isolation forest (Liu, Ting and Zhou 2008) or by
a robust covariance (minimum covariance determinant, Rousseeuw and Van Driessen 1999), scores rows, and names the
series that make a row odd. Both models are scikit-learn's (``pip install 'deepseek-framework[detect]'``).

Shape letters: N rows, S series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from deepseek.errors import ConfigError, DataError, MissingExtraError
from deepseek.monitor.baseline import MAD, trait_of

Method = Literal["isolation_forest", "robust_covariance"]
Floats = NDArray[np.float64]
LEAST = 32  #: rows to learn from


class Series(Protocol):
    """What reads a run's series; see ``series.SeriesReader``."""

    def names(self) -> list[str]: ...

    def raw(self, name: str, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]: ...


@dataclass(frozen=True)
class OddRow:
    """A row that does not go together. ``series``: name and share of the oddity, the largest first."""

    step: int
    score: float
    series: list[tuple[str, float]]


class MultivariateDetector:
    """Learns rows ``[N, S]``, then scores others: the higher, the odder.

    Args:
        method: the covariance needs several times as many rows as series; the forest does not.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ConfigError: the method is unknown.
    """

    def __init__(self, method: Method = "isolation_forest", seed: int = 0) -> None:
        if method not in ("isolation_forest", "robust_covariance"):
            raise ConfigError(f"unknown method {method!r}; one of isolation_forest, robust_covariance")
        try:
            from sklearn.covariance import MinCovDet
            from sklearn.ensemble import IsolationForest
        except ImportError as error:
            raise MissingExtraError("scikit-learn", "detect", "the multivariate detector") from error
        self.method = method
        self._model: Any = (
            IsolationForest(n_estimators=200, random_state=seed)
            if method == "isolation_forest"
            else MinCovDet(random_state=seed)
        )
        self.middle = self.scale = np.zeros(0)

    def fit(self, rows_NS: Floats) -> MultivariateDetector:
        """Learn what goes together; odd rows among them do little harm.

        Raises:
            DataError: too few rows, or values that are not finite.
        """
        rows = np.asarray(rows_NS, np.float64)
        if rows.ndim != 2 or len(rows) < LEAST or not np.isfinite(rows).all():
            raise DataError(f"rows of shape {rows.shape}: at least {LEAST} rows of finite values are needed")
        if self.method == "robust_covariance" and len(rows) < 3 * rows.shape[1]:
            raise DataError(
                f"{len(rows)} rows are too few for the covariance of {rows.shape[1]} series: give at least "
                f"{3 * rows.shape[1]}, fewer series, or use isolation_forest"
            )
        self.middle = np.median(rows, axis=0)
        self.scale = np.maximum(np.median(np.abs(rows - self.middle), axis=0) * MAD, 1e-12)
        self._model.fit(self._scaled(rows))
        return self

    def score(self, rows_NS: Floats) -> Floats:
        """``[N]``: the isolation forest's score (0.5 usual, 1 odd), or the squared Mahalanobis distance."""
        scaled = self._scaled(np.asarray(rows_NS, np.float64))
        if self.method == "isolation_forest":
            return np.asarray(-self._model.score_samples(scaled), np.float64)
        return np.asarray(self._model.mahalanobis(scaled), np.float64)

    def explain(self, row_S: Floats) -> Floats:
        """``[S]``: each series' share of the row's oddity, summing to one; zeros if nothing is odd.

        For the covariance, the terms of the distance. For the forest, how much the score falls when a series alone is
        put back to its usual value, or added alone to a usual row.
        """
        row = np.asarray(row_S, np.float64)
        if self.method == "robust_covariance":
            x = self._scaled(row[None])[0] - self._model.location_
            parts = x * (self._model.get_precision() @ x)
        else:
            size = len(row)
            without, alone = np.tile(row, (size, 1)), np.tile(self.middle, (size, 1))
            at = np.arange(size)
            without[at, at], alone[at, at] = self.middle, row
            whole, usual = self.score(row[None])[0], self.score(self.middle[None])[0]
            parts = np.maximum(whole - self.score(without), 0) + np.maximum(self.score(alone) - usual, 0)
        parts = np.maximum(parts, 0.0)
        total = parts.sum()
        return np.asarray(parts / total if total > 0 else parts, np.float64)

    def _scaled(self, rows_NS: Floats) -> Floats:
        return np.asarray((rows_NS - self.middle) / self.scale, np.float64)


def odd_rows(
    series: Series,
    start: int,
    stop: int,
    *,
    names: Sequence[str] = (),
    method: Method = "isolation_forest",
    most: int = 10,
    seed: int = 0,
) -> list[OddRow]:
    """The oddest rows of a run between two steps, the oddest first.

    Args:
        names: of the series to look at; all that were logged at nearly every step, if none are given. most: rows given
            back, at most.

    Every series is taken as its difference from a running median (of its logarithm where it varies by factors), so that
    the course of the training itself is not odd.

    Raises:
        DataError: too few steps or series.
        MissingExtraError: scikit-learn is not installed.
    """
    detector = MultivariateDetector(method, seed)
    kept, steps, rows = _matrix(series, list(names) or series.names(), start, stop)
    scores = detector.fit(rows).score(rows)
    best = np.argsort(-scores)[:most]
    found = []
    for k in best.tolist():
        shares = detector.explain(rows[k])
        order = np.argsort(-shares)[:8]
        found.append(OddRow(int(steps[k]), float(scores[k]), [(kept[j], float(shares[j])) for j in order]))
    return found


def _matrix(
    series: Series, names: list[str], start: int, stop: int
) -> tuple[list[str], NDArray[np.int64], Floats]:
    """Names, steps and values ``[N, S]`` of the series that have a finite value at nearly every step."""
    columns = dict[str, tuple[NDArray[Any], NDArray[Any]]]()
    for name in names:
        steps, values = series.raw(name, start, stop)
        good = np.isfinite(values)
        columns[name] = np.asarray(steps)[good], np.asarray(values, np.float64)[good]
    longest = max((len(s) for s, _ in columns.values()), default=0)
    kept = [n for n, (s, _) in columns.items() if len(s) >= max(0.95 * longest, LEAST)]
    if not kept:
        raise DataError(
            f"no series has {LEAST} values between steps {start} and {stop} (the longest has {longest}): take a longer "
            "stretch"
        )
    common = columns[kept[0]][0]
    for name in kept[1:]:
        common = np.intersect1d(common, columns[name][0])
    if len(common) < LEAST:
        raise DataError(f"the {len(kept)} series share {len(common)} steps; at least {LEAST} are needed")
    matrix = np.stack([columns[n][1][np.searchsorted(columns[n][0], common)] for n in kept], axis=1)
    for k, name in enumerate(kept):
        if trait_of(name).log:
            matrix[:, k] = np.log(np.maximum(matrix[:, k], 1e-30))
    return kept, common.astype(np.int64), matrix - _running_median(matrix)


def _running_median(matrix_NS: Floats, width: int = 31) -> Floats:
    half = min(width, len(matrix_NS)) // 2
    padded = np.pad(matrix_NS, ((half, half), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1, axis=0)
    return np.asarray(np.median(windows, axis=-1), np.float64)
