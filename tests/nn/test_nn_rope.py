"""Scaled rotary frequencies against transformers' own functions, against their limits, and what is refused."""

from __future__ import annotations

import pytest
import torch

from deepseek.config import from_dict, load_toml, replace, to_dict, to_toml
from deepseek.errors import ConfigError
from deepseek.models import ModelConfig, Transformer
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.rope import RopeScaling, counted_rope_table, inverse_frequencies, rope_table

LLAMA = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0}
LINEAR = RopeScaling(type="linear", factor=2.5)
#: head size, base, ours, theirs
CASES = {
    "linear": (64, 1e4, LINEAR, {"rope_type": "linear", "factor": 2.5}),
    "llama 3.1": (128, 5e5, RopeScaling(type="llama3", original_length=8192, **LLAMA),
                  {"rope_type": "llama3", "original_max_position_embeddings": 8192, **LLAMA}),
    "llama 3.2": (64, 5e5, RopeScaling(type="llama3", factor=32.0, original_length=8192),
                  {"rope_type": "llama3", "original_max_position_embeddings": 8192, **LLAMA, "factor": 32.0}),
    "llama, other bounds": (32, 1e4, RopeScaling(type="llama3", factor=3.0, original_length=500, low_freq_factor=2.0,
                                                 high_freq_factor=9.0),
                            {"rope_type": "llama3", "original_max_position_embeddings": 500, "factor": 3.0,
                             "low_freq_factor": 2.0, "high_freq_factor": 9.0}),
    "yarn": (128, 1e6, RopeScaling(type="yarn", original_length=32768, **YARN),
             {"rope_type": "yarn", "original_max_position_embeddings": 32768, **YARN}),
    "yarn, attention": (64, 1e4, RopeScaling(type="yarn", original_length=2048, attention_factor=1.25, **YARN),
                        {"rope_type": "yarn", "original_max_position_embeddings": 2048, "attention_factor": 1.25,
                         **YARN}),
    "yarn, betas": (64, 1e4, RopeScaling(type="yarn", original_length=4096, beta_fast=16.0, beta_slow=2.0,
                                         truncate=False, **YARN),
                    {"rope_type": "yarn", "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2,
                     "truncate": False, **YARN}),
    "yarn, one pair": (16, 1e4, RopeScaling(type="yarn", original_length=3, **YARN),
                       {"rope_type": "yarn", "original_max_position_embeddings": 3, **YARN}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_tables_equal_transformers(name: str) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    size, theta, ours, theirs = CASES[name]
    config = LlamaConfig(
        hidden_size=4 * size, num_attention_heads=4, head_dim=size, max_position_embeddings=131_072,
        rope_parameters={"rope_theta": theta, **theirs},
    )  # fmt: skip
    rotary = llama.LlamaRotaryEmbedding(config)
    found = inverse_frequencies(size, theta, ours)
    torch.testing.assert_close(found, rotary.inv_freq, rtol=3e-7, atol=0)
    assert ours.magnitude == pytest.approx(rotary.attention_scaling, rel=1e-12)
    positions = torch.arange(300)
    for got, want in zip(rope_table(positions, size, theta, ours), rotary(torch.ones(1), positions[None])):
        torch.testing.assert_close(got, want[0, :, : size // 2], rtol=0, atol=1e-5)


def test_none_is_the_plain_table_bit_for_bit() -> None:
    half = torch.arange(0, 64, 2, dtype=torch.float32)
    angle = torch.arange(50)[:, None].float() * (1.0 / 1e4 ** (half / 64))
    cos, sin = rope_table(torch.arange(50), 64, 1e4)
    assert torch.equal(cos, angle.cos())
    assert torch.equal(sin, angle.sin())


def test_limits() -> None:
    """Fast pairs keep their frequency exactly, slow ones get all of the factor; factor 1 changes nothing."""
    own = inverse_frequencies(128, 5e5)
    for scaling in (CASES["llama 3.1"][2], RopeScaling(type="yarn", factor=8.0, original_length=8192)):
        found = inverse_frequencies(128, 5e5, scaling)
        assert torch.equal(found[:8], own[:8])
        torch.testing.assert_close(found[-8:], own[-8:] / 8, rtol=1e-7, atol=0)
        assert bool((found.diff() < 0).all())
        torch.testing.assert_close(
            inverse_frequencies(128, 5e5, replace(scaling, factor=1.0)), own, rtol=2e-7, atol=0
        )
    factors = tuple(float(f) for f in own / inverse_frequencies(128, 5e5, CASES["llama 3.1"][2]))
    listed = inverse_frequencies(128, 5e5, RopeScaling(type="factors", factors=factors))
    torch.testing.assert_close(
        listed, inverse_frequencies(128, 5e5, CASES["llama 3.1"][2]), rtol=3e-7, atol=0
    )


def test_kept_tables_are_told_apart() -> None:
    plain = counted_rope_table(9, 64, 1e4, torch.device("cpu"))
    scaled = counted_rope_table(9, 64, 1e4, torch.device("cpu"), LINEAR)
    assert torch.equal(scaled[0], rope_table(torch.arange(9), 64, 1e4, LINEAR)[0])
    assert not torch.equal(scaled[0], plain[0])
    assert counted_rope_table(9, 64, 1e4, torch.device("cpu"), LINEAR) is scaled


REFUSED = {
    "factor=0.5 must be at least 1": {"type": "linear", "factor": 0.5},
    "rope_scaling.factor=4.0 does nothing with type='none'; it belongs to linear, llama3, yarn": {"factor": 4.0},
    "beta_fast=30.0 does nothing with type='llama3'; it belongs to yarn": {
        "type": "llama3", "factor": 8.0, "original_length": 9, "beta_fast": 30.0},
    "original_length=0 must be at least 1 with type='yarn'": {"type": "yarn", "factor": 4.0},
    "low_freq_factor=5.0 must be positive and less than high_freq_factor=4.0": {
        "type": "llama3", "factor": 8.0, "original_length": 9, "low_freq_factor": 5.0},
    "beta_slow=40.0 must be positive and less than beta_fast=32.0": {
        "type": "yarn", "factor": 8.0, "original_length": 9, "beta_slow": 40.0},
    "attention_factor=-1.0 must be positive": {
        "type": "yarn", "factor": 8.0, "original_length": 9, "attention_factor": -1.0},
    "factors has 2 numbers, the least 0.0": {"type": "factors", "factors": (1.0, 0.0)},
    "factors has 0 numbers": {"type": "factors"},
    "choose one of none, linear, llama3, yarn, factors (did you mean 'yarn'?)": {"type": "yarm"},
    "has no option 'fator' (did you mean 'factor'?)": {"type": "linear", "fator": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RopeScaling(**REFUSED[words])
    assert words in str(caught.value)


def test_a_head_must_fit() -> None:
    listed = RopeScaling(type="factors", factors=(1.0, 2.0))
    with pytest.raises(ConfigError, match="factors has 2 numbers; head_dim=8 has 4 pairs"):
        AttentionConfig(head_dim=8, rope_scaling=listed)
    with pytest.raises(ConfigError, match=r"rope_theta=1.0 must be more than 1"):
        AttentionConfig(rope_theta=1.0, rope_scaling=RopeScaling(type="yarn", factor=2.0, original_length=9))


def test_configs_without_the_table_and_with_it(tmp_path) -> None:
    old = to_dict(ModelConfig())
    del old["attention"]["rope_scaling"]
    assert from_dict(ModelConfig, old) == ModelConfig()
    scaled = RopeScaling(type="yarn", factor=4.0, original_length=64, attention_factor=1.5)
    config = ModelConfig(attention=AttentionConfig(rope_scaling=scaled))
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert from_dict(ModelConfig, load_toml(tmp_path / "c.toml")) == config


@pytest.mark.parametrize("pattern", ["F", "L", "H"])
def test_every_kind_of_layer_decodes_with_scaling_as_it_computes_rows(pattern: str) -> None:
    """Training's forward pass and one token at a time with a cache, at positions beyond the original length."""
    torch.manual_seed(1)
    scaling = RopeScaling(type="yarn", factor=4.0, original_length=8)
    attention = AttentionConfig(head_dim=16, window=7, block=4, stride=4, rope_scaling=scaling)
    config = ModelConfig(vocab_size=31, hidden=32, layers=2, ffn=48, pattern=pattern, attention=attention)
    model = Transformer(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain = Transformer(replace(config, attention=replace(attention, rope_scaling=RopeScaling()))).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(31, (1, 30))
    with torch.no_grad():
        whole, cache = model(ids).hidden, model.new_cache()
        steps = torch.cat([model(ids[:, i : i + 1], cache=cache).hidden for i in range(30)], 1)
        torch.testing.assert_close(steps, whole, rtol=0, atol=1e-4)
        assert (plain(ids).hidden - whole).abs().max() > 0.1
