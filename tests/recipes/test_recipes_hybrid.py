"""Hybrid against full attention at equal steps, on the source of the Python standard library."""

from pathlib import Path

import pytest

from deepseek.config import replace
from deepseek.models.config import tiny
from deepseek.recipes.pretrain import PretrainConfig, preset, pretrain


def config(pattern: str, corpora: Path) -> PretrainConfig:
    base = preset("tiny")
    model = tiny(hidden=64, layers=2, pattern=pattern, vocab_size=1024)
    model = replace(
        model,
        attention=replace(model.attention, heads=2, kv_heads=1),
        moe=replace(model.moe, experts=4, expert_ffn=64),
    )
    return replace(
        base,
        model=model,
        data=replace(base.data, vocab_size=1024, train_bytes=1_000_000, cache=str(corpora)),
        train=replace(base.train, steps=120, device="cpu", precision_mode="fp32"),
        evaluate=replace(base.evaluate, length=256),
    )


@pytest.mark.slow
def test_hybrid_is_within_two_percent_of_full_attention(tmp_path: Path) -> None:
    loss = {}
    for pattern in ("F", "LH"):
        result = pretrain(config(pattern, tmp_path / "corpora"), tmp_path / pattern)
        assert result.evaluation is not None
        loss[pattern] = result.evaluation.loss
    assert loss["LH"] <= 1.02 * loss["F"], loss
    assert loss["F"] < 6.0  # both have learnt something: a uniform guess is ln 1024 = 6.93
