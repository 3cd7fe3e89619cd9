"""PSI and KS distance beside plain computations, and limits that healthy samples respect."""

from __future__ import annotations

import math

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
    limits = natural_limits(reference, np.arange(1000), 400, draws=60)
    ordered = np.sort(reference, axis=0)
    healthy, spoilt = draw.normal(size=(400, 2)), draw.normal(size=(400, 2))
    spoilt[:80] += 6
    for f in range(2):
        psi = Histogram(ordered[:, f])
        assert psi.psi(np.sort(healthy[:, f])) < 2 * limits.psi[f] < psi.psi(np.sort(spoilt[:, f]))
        assert ks_distance(ordered[:, f], np.sort(healthy[:, f])) < 1.5 * limits.ks[f]
        assert ks_distance(ordered[:, f], np.sort(spoilt[:, f])) > limits.ks[f]


def test_values_that_belong_together_widen_the_limits() -> None:
    """The same numbers: alone, and as 20 values each of 50 documents that are much alike within."""
    draw = np.random.default_rng(0)
    document = np.repeat(np.arange(50), 20)
    reference = (draw.normal(size=50)[document] + 0.1 * draw.normal(size=1000))[:, None]
    alone = natural_limits(reference, np.arange(1000), 400)
    together = natural_limits(reference, document, 400)
    other = np.sort(draw.normal(size=20)[np.repeat(np.arange(20), 20)] + 0.1 * draw.normal(size=400))
    figure = ks_distance(np.sort(reference[:, 0]), other)  # twenty other documents: healthy, and far off
    assert alone.ks[0] < figure < together.ks[0]
