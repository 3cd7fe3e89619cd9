"""`config.json` of models that people have, as published: what we make of them, and `transformers`' frequencies."""

import importlib
import json

import pytest
import torch

pytest.importorskip("transformers")
import transformers

from deepseek.nn.rope import RopeScaling, inverse_frequencies
from deepseek.weights.convert import read_config


def config(model_type, architecture, vocab, hidden, ffn, layers, heads, kv_heads, length, theta, **more):
    return {
        "model_type": model_type, "architectures": [f"{architecture}ForCausalLM"], "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": length, "rope_theta": theta,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "transformers_version": "4.43.0", **more,
    }  # fmt: skip


def llama3(factor):
    return {
        "factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }  # fmt: skip


LLAMA = {
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "eos_token_id": [128001, 128008, 128009],
}
WINDOW_OFF = {"use_sliding_window": False, "sliding_window": 32768}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
OURS = RopeScaling(type="yarn", factor=4.0, original_length=32768)
#: what was published; its scaling; its attention letters; head size
PUBLISHED = {
    "Llama 3.1 8B": (
        config("llama", "Llama", 128256, 4096, 14336, 32, 32, 8, 131072, 5e5, rope_scaling=llama3(8.0), **LLAMA),
        RopeScaling(type="llama3", factor=8.0, original_length=8192), "F", 128,
    ),
    "Llama 3.2 1B": (
        config("llama", "Llama", 128256, 2048, 8192, 16, 32, 8, 131072, 5e5, rope_scaling=llama3(32.0), head_dim=64,
               tie_word_embeddings=True, **LLAMA),
        RopeScaling(type="llama3", factor=32.0, original_length=8192), "F", 64,
    ),
    "Qwen2.5 7B with YaRN": (
        config("qwen2", "Qwen2", 152064, 3584, 18944, 28, 28, 4, 32768, 1e6, rope_scaling={"type": "yarn", **YARN},
               max_window_layers=28, **WINDOW_OFF),
        OURS, "F", 128,
    ),
    "Qwen3 8B with YaRN": (
        config("qwen3", "Qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, 1e6, rope_scaling={"rope_type": "yarn", **YARN},
               head_dim=128, attention_bias=False, max_window_layers=36, use_sliding_window=False, sliding_window=None),
        OURS, "F", 128,
    ),
    "Qwen3 30B A3B": (
        config("qwen3_moe", "Qwen3Moe", 151936, 2048, 6144, 48, 32, 4, 40960, 1e6, head_dim=128, num_experts=128,
               num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1,
               mlp_only_layers=[], rope_scaling=None, use_sliding_window=False, sliding_window=None),
        RopeScaling(), "F", 128,
    ),
    "Mistral 7B v0.1": (
        config("mistral", "Mistral", 32000, 4096, 14336, 32, 32, 8, 32768, 1e4, sliding_window=4096),
        RopeScaling(), "L", 128,
    ),
    "Mistral Nemo": (
        config("mistral", "Mistral", 131072, 5120, 14336, 40, 32, 8, 131072, 1e6, head_dim=128, sliding_window=None),
        RopeScaling(), "F", 128,
    ),
    "Mixtral 8x7B": (
        config("mixtral", "Mixtral", 32000, 4096, 14336, 32, 32, 8, 32768, 1e6, num_local_experts=8,
               num_experts_per_tok=2, sliding_window=None, router_aux_loss_coef=0.02),
        RopeScaling(), "F", 128,
    ),
    "SmolLM3 3B": (
        config("smollm3", "SmolLM3", 128256, 2048, 11008, 36, 16, 4, 65536, 5e6, rope_scaling=None,
               no_rope_layers=[1, 1, 1, 0] * 9, no_rope_layer_interval=4, layer_types=["full_attention"] * 36,
               use_sliding_window=False, sliding_window=None, attention_bias=False, mlp_bias=False),
        RopeScaling(), "F", 128,
    ),
    "Phi-3 mini 4k": (
        config("phi3", "Phi3", 32064, 3072, 8192, 32, 32, 32, 4096, 1e4, original_max_position_embeddings=4096,
               rope_scaling=None, sliding_window=2047, resid_pdrop=0.0, embd_pdrop=0.0),
        RopeScaling(), "L", 96,
    ),
    "an older Llama, linear": (
        config("llama", "Llama", 32000, 4096, 11008, 32, 32, 32, 16384, 1e4,
               rope_scaling={"type": "linear", "factor": 4.0}),
        RopeScaling(type="linear", factor=4.0), "F", 128,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name, tmp_path):
    values, scaling, pattern, head_dim = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours, theirs = read_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    a = ours.attention
    assert (a.rope_scaling, ours.pattern, a.head_dim) == (scaling, pattern, head_dim)
    assert (a.heads, a.kv_heads, a.rope_theta) == (
        values["num_attention_heads"], values["num_key_value_heads"], values["rope_theta"],
    )  # fmt: skip
    assert ours.rope_pattern == ("RRRN" if name.startswith("SmolLM3") else "")
    assert ours.max_length == (131072 if "YaRN" in name else values["max_position_embeddings"])
    module = importlib.import_module(f"transformers.models.{theirs.model_type}.modeling_{theirs.model_type}")
    rotary = next(getattr(module, n) for n in dir(module) if n.endswith("RotaryEmbedding"))(theirs)
    found = inverse_frequencies(a.head_dim, a.rope_theta, a.rope_scaling)
    torch.testing.assert_close(found, rotary.inv_freq, rtol=3e-7, atol=0)
    assert a.rope_scaling.magnitude == pytest.approx(rotary.attention_scaling, rel=1e-12)
