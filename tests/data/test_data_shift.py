"""PSI and KS distance beside plain computations, and limits that healthy samples respect."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.data.shift import QUANTILES, Histogram, ks_distance, natural_limits

values = st.lists(st.integers(-5, 5) | st.floats(-3, 3, width=16), min_size=1, max_size=60)


@given(values, values)
def test_ks_is_the_largest_gap_between_the_two_step_functions(a: list[float], b: list[float]) -> None:
    gaps = [abs(sum(x <= at for x in a) / len(a) - sum(x <= at for x in b) / len(b)) for at in [*a, *b]]
    assert ks_distance(np.sort(a), np.sort(b)) == pytest.approx(max(gaps), abs=1e-12)


@given(values, values)
def test_psi_is_its_sum_over_bins(a: list[float], b: list[float]) -> None:
    ordered = sorted(a)
    edges = sorted({ordered[math.ceil(q * len(a)) - 1] for q in QUANTILES.tolist()})

    def shares(xs: list[float]) -> list[float]:
        # an edge belongs to the bin below it
        counts = [
            sum((i == 0 or x > edges[i - 1]) and (i == len(edges) or x <= edges[i]) for x in xs) + 0.5
            for i in range(len(edges) + 1)
        ]
        return [c / sum(counts) for c in counts]

    want = sum((q - p) * math.log(q / p) for p, q in zip(shares(a), shares(b)))
    assert Histogram(np.sort(a)).psi(np.sort(b)) == pytest.approx(want, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_limits_hold_for_new_samples_and_not_for_a_fifth_of_something_else(seed: int) -> None:
    draw = np.random.default_rng(seed)
    reference = draw.normal(size=(1000, 2))
    limits = natural_limits(reference, np.arange(1000), np.ones(1000), math.inf, 400, draws=60)
    ordered = np.sort(reference, axis=0)
    healthy, spoilt = draw.normal(size=(400, 2)), draw.normal(size=(400, 2))
    spoilt[:80] += 6
    for f in range(2):
        psi = Histogram(ordered[:, f])
        assert psi.psi(np.sort(healthy[:, f])) < 2 * limits.psi[f] < psi.psi(np.sort(spoilt[:, f]))
        assert ks_distance(ordered[:, f], np.sort(healthy[:, f])) < 1.5 * limits.ks[f]
        assert ks_distance(ordered[:, f], np.sort(spoilt[:, f])) > limits.ks[f]


def test_limits_are_those_of_the_stream() -> None:
    """A stream of pools of ten large documents, each much alike within: next to each other samples of one pool are
    close, samples of two are not; and the limits know it, from a sample of one pool."""
    draw = np.random.default_rng(0)

    def pool() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        document = np.repeat(np.arange(10), 200)
        return draw.normal(size=10)[document] + 0.1 * draw.normal(size=2000), document

    same, other = [], []
    for _ in range(10):
        (values, document), (later, _) = pool(), pool()
        order = draw.permutation(2000)
        reference, window = values[order[:600]], np.sort(values[order[600:1000]])
        arguments = (reference[:, None], document[order[:600]], np.full(600, 200))
        near = natural_limits(*arguments, math.inf, 400, draws=50)
        far = natural_limits(*arguments, 2000.0, 400, draws=50)
        ordered = np.sort(reference)
        same.append(ks_distance(ordered, window) < 1.3 * near.ks[0])
        other.append(near.ks[0] < ks_distance(ordered, np.sort(draw.choice(later, 400))) < 1.3 * far.ks[0])
    assert sum(same) >= 9
    assert sum(other) >= 9
