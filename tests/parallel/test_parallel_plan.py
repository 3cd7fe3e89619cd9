"""Layouts that do not fit are refused with the numbers that would."""

from __future__ import annotations

import pytest

from deepseek.config import replace
from deepseek.errors import ConfigError
from deepseek.models.config import tiny
from deepseek.nn.attention import AttentionConfig
from deepseek.parallel.plan import ParallelConfig, check_layout

MODEL = replace(tiny(layers=6), attention=AttentionConfig(heads=12, kv_heads=4, head_dim=8))


def test_data_parallelism_alone_is_always_fine() -> None:
    for world in (1, 2, 64):
        check_layout(ParallelConfig(), MODEL, world)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tp": 5}, r"parallel\.tp=5 does not divide 12 attention heads; try 2, 3, 4, 6 or 12"),
        ({"tp": 3}, r"parallel\.tp=3 does not divide 4 key/value heads; try 2 or 4"),
        ({"pp": 4}, r"parallel\.pp=4 does not divide 6 layers; try 2, 3 or 6"),
        ({"ep": 3}, r"parallel\.ep=3 does not divide 16 experts; try 2, 4, 8 or 16"),
        ({"tp": 2, "pp": 2}, r"=4: only data parallelism exists so far.*--nproc-per-node 4"),
        ({"tp": 0}, r"parallel\.tp=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(parallel: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(ParallelConfig(**parallel), MODEL, 1)


def test_a_dense_model_has_no_experts_to_share_out() -> None:
    dense = replace(MODEL, moe=replace(MODEL.moe, experts=0))
    with pytest.raises(ConfigError, match="does not divide 1 experts"):
        check_layout(ParallelConfig(ep=2), dense, 2)
