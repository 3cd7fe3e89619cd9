"""Counts from a config against the real model: parameters, executed FLOPs, saved bytes, cache bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deepseek.config import replace
from deepseek.errors import ConfigError
from deepseek.models import PRESETS, ModelConfig, Transformer
from deepseek.models.count import activation_bytes, cache_bytes, flops, memory, mfu, parameters, visible_pairs
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.ops import experts
from deepseek.ops.attention import causal_mask
from deepseek.ops.hybrid_attention import pooled_mask


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def small(pattern: str = "F", ffn_pattern: str = "D", **moe: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=96, hidden=48, layers=3, ffn=80, pattern=pattern, ffn_pattern=ffn_pattern,
        attention=AttentionConfig(
            heads=6, kv_heads=2, head_dim=16, qk_norm=True, window=16, block=8, stride=4
        ),
        moe=MoEConfig(**{
            "experts": 8, "top_k": 2, "expert_ffn": 32, "shared_experts": 1,
            "token_floor": 0.0, "backend": "loop", **moe,
        }),
    )  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_every_preset(name: str) -> None:
    config = PRESETS[name]()
    count = parameters(config)
    assert count.total == sum(p.numel() for p in on_meta(config).parameters())
    assert count.total == sum(count.by_part.values())
    assert 0 < count.active <= count.total


def test_published_sizes() -> None:
    """As their authors give them: Llama 3.1 8.03B, Qwen3-MoE 30.5B, Mixtral 46.7B, 12.9B with embedding."""
    assert round(parameters(PRESETS["llama"]()).total / 1e9, 2) == 8.03
    assert round(parameters(PRESETS["qwen3_moe"]()).total / 1e9, 1) == 30.5
    mixtral = parameters(PRESETS["mixtral"]())
    assert round(mixtral.total / 1e9, 1) == 46.7
    assert round((mixtral.active + mixtral.by_part["embedding"]) / 1e9, 1) == 12.9
    sparse = parameters(PRESETS["moe_64x2"]())
    assert (round(sparse.total / 1e9, 2), round(sparse.active / 1e6)) == (2.53, 152)


@settings(max_examples=40, deadline=None)
@given(
    pattern=st.text("FLH", min_size=1, max_size=4),
    ffn_pattern=st.text("DE", max_size=3),
    layers=st.integers(1, 5),
    kv=st.sampled_from([(4, 1), (4, 4), (6, 3)]),
    flags=st.lists(st.booleans(), min_size=6, max_size=6),
    shared=st.integers(0, 2),
)
def test_parameters_of_random_shapes(
    pattern: str, ffn_pattern: str, layers: int, kv: tuple[int, int], flags: list[bool], shared: int
) -> None:
    config = ModelConfig(
        vocab_size=31, hidden=14, layers=layers, ffn=9, pattern=pattern, ffn_pattern=ffn_pattern,
        tie_embeddings=flags[0], ffn_bias=flags[1],
        attention=AttentionConfig(
            heads=kv[0], kv_heads=kv[1], head_dim=6, qk_norm=flags[2], bias=flags[3], output_bias=flags[4],
            gate="static" if flags[5] else "token",
        ),
        moe=MoEConfig(experts=5, top_k=2, expert_ffn=7, shared_experts=shared),
    )  # fmt: skip
    model = on_meta(config)
    count = parameters(config)
    assert count.total == sum(p.numel() for p in model.parameters())
    idle = sum(m.gate_up[0].numel() + m.down[0].numel() for m in model.moe_layers().values()) * 3
    idle += 0 if config.tie_embeddings else model.embedding.weight.numel()
    assert count.active == count.total - idle


@contextmanager
def in_the_open() -> Iterator[None]:
    """Router and experts as the functions they are made of, differentiated by autograd: a custom operation hides its
    products, and its own formula would be no independent count."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_router", "_experts"):
            patch.setattr(experts, name, getattr(experts, name)._init_fn)
        yield


def counted(config: ModelConfig, length: int, rows: int = 2, backward: bool = True) -> int:
    """What ``FlopCounterMode`` sees of the real model; the CPU's fused attention kernel hides from it."""
    torch.manual_seed(0)
    model = Transformer(config)
    with sdpa_kernel(SDPBackend.MATH), in_the_open(), FlopCounterMode(display=False) as counter:
        loss = model.logits(model(torch.randint(0, 96, (rows, length))).hidden).sum()
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [7, 64, 67])
@pytest.mark.parametrize(
    ("pattern", "ffn_pattern"), [("F", "D"), ("L", "D"), ("H", "D"), ("F", "E"), ("LLH", "DE"), ("H", "E")]
)
def test_executed_flops_equal_the_flop_counter(pattern: str, ffn_pattern: str, length: int) -> None:
    config = small(pattern, ffn_pattern)
    count = flops(config, length, executed=True)
    assert counted(config, length) == 2 * count.row
    assert counted(config, length, backward=False) == 2 * count.forward_row


@pytest.mark.parametrize("changes", [{"default_decay": 0.0}, {"shared_experts": 0}, {"top_k": 5}])
def test_executed_flops_follow_the_moe_options(changes: dict[str, Any]) -> None:
    config = small("F", "E", **changes)
    assert counted(config, 32) == 2 * flops(config, 32, executed=True).row


def test_a_static_gate_costs_nothing() -> None:
    config = small("H")
    config = replace(config, attention=replace(config.attention, gate="static"))
    assert counted(config, 40) == 2 * flops(config, 40, executed=True).row


def test_rows_added_by_the_floor_are_the_only_difference() -> None:
    config = small("F", "E", token_floor=1.0)
    torch.manual_seed(0)
    model, tokens = Transformer(config), torch.randint(0, 96, (2, 32))
    added = sum(
        int((s.routing.served_E - s.routing.chosen_E).sum()) for s in model(tokens).layers if s.routing
    )
    assert added > 0
    each = 3 * 6 * config.hidden * config.moe.expert_ffn
    assert counted(config, 32) == 2 * flops(config, 32, executed=True).row + added * each


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_model_flops_count_what_the_masks_show(length: int, window: int, block: int, stride: int) -> None:
    stride = min(stride, block)
    config = small()
    config = replace(config, attention=replace(config.attention, window=window, block=block, stride=stride))
    t = torch.arange(length)
    local = int(causal_mask(t, t, window).sum())
    assert visible_pairs(config, "F", length) == int(causal_mask(t, t).sum())
    assert visible_pairs(config, "L", length) == local
    assert visible_pairs(config, "H", length) == local + int(pooled_mask(t, length, block, stride).sum())


def test_training_is_three_forwards_and_parts_add_up() -> None:
    count = flops(PRESETS["tiny"](), 512)
    assert count.per_token == 3 * count.forward_per_token
    assert sum(count.by_part.values()) == pytest.approx(count.per_token)
    assert 0 < count.attention_share < 1
    six_n = 6 * parameters(PRESETS["dense_856m"]()).active
    assert flops(PRESETS["dense_856m"](), 1).per_token == pytest.approx(six_n, rel=1e-3)


@pytest.mark.parametrize("executed", [False, True])
def test_hybrid_attention_saves_42_percent_at_4096(executed: bool) -> None:
    """F11's shape: width 1024, a quarter of the key/value heads, window 32, block 32, stride 16."""
    attention = AttentionConfig(heads=16, kv_heads=4, head_dim=64, window=32, block=32, stride=16)
    config = ModelConfig(vocab_size=96, hidden=1024, layers=1, ffn=8, pattern="F", attention=attention)
    full = flops(config, 4096, executed=executed).attention
    hybrid = flops(replace(config, pattern="H"), 4096, executed=executed).attention
    assert 1 - hybrid / full >= 0.55


@pytest.mark.slow
def test_counted_hybrid_attention_saves_42_percent_at_4096() -> None:
    """On real execution; heads of 16 instead of 64 and width 256: the same ratio of scores to projections."""
    attention = AttentionConfig(heads=16, kv_heads=4, head_dim=16, window=32, block=32, stride=16)
    used = {}
    for pattern in "FH":
        config = ModelConfig(
            vocab_size=96, hidden=256, layers=1, ffn=8, pattern=pattern, max_length=4096, attention=attention
        )
        rest = flops(config, 4096).forward_row - flops(config, 4096).attention
        used[pattern] = counted(config, 4096, rows=1, backward=False) - rest
        assert used[pattern] == flops(config, 4096, executed=True).attention
    assert 1 - used["H"] / used["F"] >= 0.42


def saved_bytes(model: Transformer, tokens: Tensor) -> int:
    """Bytes of the distinct storages autograd keeps, parameters excluded."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(tokens)
    assert output.hidden.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("pattern", ["F", "L", "H", "LLH"])
@pytest.mark.parametrize("ffn_pattern", ["D", "E"])
def test_activation_bytes_are_what_autograd_saves(
    pattern: str, ffn_pattern: str, dtype: torch.dtype, size: int
) -> None:
    config = small(pattern, ffn_pattern, backend="auto")
    model = Transformer(config).to(dtype)
    measured = saved_bytes(model, torch.randint(0, 96, (3, 70)))
    assert activation_bytes(config, 3, 70, compute_bytes=size) == pytest.approx(measured, rel=0.03)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 60), rows=st.integers(1, 3), kind=st.sampled_from("FLH"))
def test_cache_bytes_equal_the_cache(length: int, rows: int, kind: str) -> None:
    config = small(kind)
    model, cache = Transformer(config).eval(), None
    cache = model.new_cache()
    with torch.no_grad():
        model(torch.randint(0, 96, (rows, length)), cache=cache)
        assert cache.nbytes == cache_bytes(config, length, rows, dtype_bytes=4)
        model(torch.randint(0, 96, (rows, 1)), cache=cache)
    assert cache.nbytes == cache_bytes(config, length + 1, rows, dtype_bytes=4)


@pytest.mark.parametrize("length", [4096, 32_768])
def test_hybrid_cache_is_a_quarter_of_full(length: int) -> None:
    config = PRESETS["small"](pattern="F")
    for pattern in ("H", "LLLH"):
        assert 4 * cache_bytes(replace(config, pattern=pattern), length) <= cache_bytes(config, length)


def test_memory_adds_up_and_muon_keeps_less() -> None:
    config = PRESETS["tiny"]()
    adamw, muon = memory(config, 4, 512), memory(config, 4, 512, "muon", loss_positions=256)
    assert adamw["total"] == sum(v for k, v in adamw.items() if k != "total")
    assert adamw["optimizer"] == 8 * parameters(config).total
    assert muon["optimizer"] < adamw["optimizer"]
    assert muon["logits"] < adamw["logits"]
    assert memory(config, 4, 512, compute_bytes=4)["compute_copy"] == 0


def test_mfu_is_a_share_of_the_stated_peak() -> None:
    assert mfu(1000, 2e9, 4e12) == 0.5
    with pytest.raises(ConfigError, match="peak_flops=0"):
        mfu(1, 1, 0)
    with pytest.raises(ConfigError, match="length=0"):
        flops(PRESETS["tiny"](), 0)
