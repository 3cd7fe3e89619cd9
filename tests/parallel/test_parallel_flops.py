"""Counted FLOPs against products done by hand."""

import pytest
import torch
import torch.nn.functional as F

from deepseek.parallel.flops import flop_counter


@pytest.mark.parametrize("kv", [8, 2])
def test_attention_counts_as_its_products_do(kv: int) -> None:
    """Heads of keys shared by several of queries do all the same work (torch 2.11 knows no such attention)."""
    make = lambda heads: torch.randn(2, heads, 64, 32, requires_grad=True)  # noqa: E731
    q, k, v = make(8), make(kv), make(kv)
    with flop_counter() as fused:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv < 8).sum().backward()
    with flop_counter() as products:
        wide = [x.repeat_interleave(8 // kv, 1) for x in (k, v)]
        ((q @ wide[0].mT).softmax(-1) @ wide[1]).square().sum().backward()
    again = 2 * 2 * 8 * 64 * 64 * 32  # what is kept here, a fused kernel computes anew: the scores
    assert fused.get_total_flops() == products.get_total_flops() + again
