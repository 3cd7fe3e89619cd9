"""Norm, rotation and feed-forward against torch and transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek.nn.layers import RMSNorm, SwiGLU
from deepseek.nn.rope import rope_table, rotate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_norm_equals_torch(dtype: torch.dtype) -> None:
    ours, theirs = RMSNorm(12, 1e-5).to(dtype), nn.RMSNorm(12, 1e-5).to(dtype)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 12, dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_rms_norm_computes_bf16_in_fp32() -> None:
    norm, x = RMSNorm(512), 30 * torch.randn(4, 512)
    want = norm(x.bfloat16().float()).bfloat16()
    assert norm.bfloat16()(x.bfloat16()).equal(want)


@pytest.mark.parametrize("theta", [10_000.0, 1e6])
def test_rotation_equals_transformers(theta: float) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=9000,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )  # fmt: skip
    positions = torch.tensor([[0, 1, 2, 77, 4095, 8191], [5, 6, 7, 8, 9, 10]])
    q, k = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions)
    want_q, want_k = llama.apply_rotary_pos_emb(q, k, cos, sin)
    table = tuple(x[:, None] for x in rope_table(positions, 16, theta))
    torch.testing.assert_close(rotate(q, table), want_q, rtol=0, atol=1e-6)
    torch.testing.assert_close(rotate(k, table), want_k, rtol=0, atol=1e-6)


def test_rotated_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        a, b = (rotate(x, rope_table(torch.tensor([p]), 8, 100.0)) for x, p in ((q, i), (k, j)))
        return (a * b).sum()

    torch.testing.assert_close(score(9, 4), score(25, 20), rtol=0, atol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_autocast_converts_what_a_network_reads_once() -> None:
    ffn, x, converted = SwiGLU(6, 10), torch.randn(4, 6), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and args[0].shape == x.shape:
                converted.append(kwargs["dtype"])
            return func(*args, **(kwargs or {}))

    with Watch(), torch.autocast("cpu", torch.bfloat16):
        ffn(x)
    assert converted == [torch.bfloat16]


def test_swiglu_is_its_formula() -> None:
    ffn, x = SwiGLU(6, 10, bias=True), torch.randn(4, 6)
    gate, up = ffn.gate_up.weight.chunk(2)
    gate_bias, up_bias = ffn.gate_up.bias.chunk(2)
    a = x @ gate.T + gate_bias
    want = (a / (1 + (-a).exp()) * (x @ up.T + up_bias)) @ ffn.down.weight.T + ffn.down.bias
    torch.testing.assert_close(ffn(x), want)
