"""Which tokens may be drawn, against transformers' filters; how often they are, against their probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepseek.errors import ConfigError
from deepseek.serve import Sampler, SamplingConfig

LOGITS = torch.randn(6, 200, generator=torch.Generator().manual_seed(0)) * 3


def probabilities(**options: Any) -> torch.Tensor:
    return Sampler(SamplingConfig(**{"temperature": 1.0, "top_p": 1.0, **options})).probabilities(LOGITS)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 199, 200, 500])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_filters_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    pytest.importorskip("transformers")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids, scores = torch.zeros(6, 1, dtype=torch.long), LOGITS
    scores = TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    found = probabilities(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = scores.softmax(-1)
    kept, keepable = scores > -torch.inf, expected > 2**-39 * expected.amax(-1, keepdim=True)
    assert torch.equal((found > 0) & keepable, kept & keepable)  # less likely ones are never drawn
    assert not (found > 0)[~kept].any()
    torch.testing.assert_close(found, expected)


def test_top_p_keeps_the_smallest_set_with_enough_probability() -> None:
    whole, kept = probabilities(), probabilities(top_p=0.7)
    for p, k in zip(whole.double(), kept):
        size = int((k > 0).sum())
        ordered = p.sort(descending=True).values
        assert ordered[:size].sum() >= 0.7 - 1e-6
        assert ordered[: size - 1].sum() < 0.7 + 1e-6
        assert set(p.topk(size).indices.tolist()) == set(k.nonzero()[:, 0].tolist())


def test_draws_follow_the_probabilities() -> None:
    """Pearson's chi-square of 20,000 draws stays below its 99.99% quantile; a wrong temperature exceeds it."""
    logits = LOGITS[:1, :12].repeat(20_000, 1)

    def chi_square(temperature: float) -> float:
        counts = torch.bincount(
            Sampler(SamplingConfig(temperature=temperature, top_p=1.0, seed=1))(logits), minlength=12
        )
        expected = 20_000 * (LOGITS[0, :12].double() / 2.0).softmax(-1)
        return float(((counts - expected) ** 2 / expected).sum())

    assert chi_square(2.0) < 37.4  # 11 degrees of freedom, p = 1e-4
    assert chi_square(1.8) > 37.4


def test_a_seed_repeats_and_draws_go_on() -> None:
    def draws(seed: int | None) -> list[list[int]]:
        sampler = Sampler(SamplingConfig(temperature=1.0, seed=seed))
        torch.rand(1)  # the global generator plays no part
        return [sampler(LOGITS).tolist() for _ in range(4)]

    first = draws(3)
    assert first == draws(3)
    assert first != draws(4)
    assert first[0] != first[1]
    assert draws(None) != draws(None)


def test_temperature_zero_is_greedy_and_cold_is_the_same() -> None:
    greedy = Sampler(SamplingConfig(temperature=0))(LOGITS)
    assert torch.equal(greedy, LOGITS.argmax(-1))
    for cold in (1e-3, 1e-9, 1e-30):
        assert torch.equal(Sampler(SamplingConfig(temperature=cold))(LOGITS), greedy)
    assert torch.equal(Sampler(SamplingConfig(temperature=5.0, top_k=1))(LOGITS), greedy)


def test_half_precision_logits_are_widened() -> None:
    found = Sampler(SamplingConfig()).probabilities(LOGITS.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1), torch.ones(6))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1},
        {"max_tokens": 0}, {"stop": ("a", "")}, {"stop": "END"}, {"topk": 3},
    ],
)  # fmt: skip
def test_options_that_cannot_be_used_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SamplingConfig(**wrong)
