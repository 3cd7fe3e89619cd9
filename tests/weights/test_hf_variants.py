"""Options of `config.json` that change what a layer computes, each against `transformers` and the serving engine.

Sequences are longer than every window, and each model also goes out to a directory and back into `transformers`.
"""

import json

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from hf_models import MIXTRAL, QWEN_MOE, compare, make, tokens

from deepseek.weights.convert import load_hf, read_config, save_hf

SLIDING, FULL = "sliding_attention", "full_attention"
ON = {"use_sliding_window": True, "sliding_window": 7}
LAYERS = {"num_hidden_layers": 3}
MIXED = {**LAYERS, "layer_types": [FULL, SLIDING, FULL]}
BIASES = {"attention_bias": True}
#: family, options, our attention letters
CASES = {
    "mistral window": ("mistral", {"sliding_window": 7}, "LL"),
    "mistral no window": ("mistral", {"sliding_window": None}, "FF"),
    "mistral window of two": ("mistral", {"sliding_window": 2}, "LL"),
    "mistral longer window": ("mistral", {"sliding_window": 200}, "LL"),
    "ministral": ("ministral", {"sliding_window": 7, **MIXED}, "FLF"),
    "ministral all windows": ("ministral", {"sliding_window": 7}, "LL"),
    "qwen2 window off": ("qwen2", {"head_dim": 8, "use_sliding_window": False, "sliding_window": 7}, "FF"),
    "qwen2 last layers": ("qwen2", {"head_dim": 8, **LAYERS, **ON, "max_window_layers": 1}, "FLL"),
    "qwen2 every layer": ("qwen2", {"head_dim": 8, **ON, "max_window_layers": 0}, "LL"),
    "qwen2 no layer": ("qwen2", {"head_dim": 8, **ON, "max_window_layers": 2}, "FF"),
    "qwen2 layer types": ("qwen2", {"head_dim": 8, **ON, **MIXED}, "FLF"),
    "qwen2 wide heads": ("qwen2", {"head_dim": 24}, "FF"),
    "qwen3 window off": ("qwen3", {"use_sliding_window": False, "sliding_window": 7}, "FF"),
    "qwen3 last layers": ("qwen3", {**LAYERS, **ON, "max_window_layers": 2}, "FFL"),
    "qwen3 layer types": ("qwen3", {**ON, **MIXED, "max_window_layers": 0}, "FLF"),
    "qwen3_moe window": ("qwen3_moe", {**QWEN_MOE, **ON}, "LL"),
    "qwen3_moe window off": ("qwen3_moe", {**QWEN_MOE, "use_sliding_window": False, "sliding_window": 7}, "FF"),
    "mixtral window": ("mixtral", {**MIXTRAL, "sliding_window": 7}, "LL"),
    **{
        f"{family} {word}": (family, {**options, "tie_word_embeddings": word == "tied"}, "FF")
        for family, options in {
            "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {"head_dim": 8}, "qwen3": {},
            "mixtral": MIXTRAL, "qwen3_moe": QWEN_MOE,
        }.items()
        for word in ("tied", "untied")
    },
    "llama attention bias": ("llama", BIASES, "FF"),
    "llama mlp bias": ("llama", {"mlp_bias": True}, "FF"),
    "llama both biases": ("llama", {**BIASES, "mlp_bias": True}, "FF"),
    "qwen3 attention bias": ("qwen3", BIASES, "FF"),
    "qwen3_moe attention bias": ("qwen3_moe", {**QWEN_MOE, **BIASES}, "FF"),
    "llama wide heads": ("llama", {"head_dim": 24}, "FF"),
    "mistral wide heads": ("mistral", {"head_dim": 24, "sliding_window": None}, "FF"),
    "mixtral narrow heads": ("mixtral", {**MIXTRAL, "head_dim": 4}, "FF"),
    "qwen3 heads that do not divide": ("qwen3", {"num_attention_heads": 6, "head_dim": 12}, "FF"),
    "mistral heads that do not divide": (
        "mistral", {"num_attention_heads": 6, "head_dim": 12, "sliding_window": None}, "FF",
    ),
    "qwen3_moe dense layers": ("qwen3_moe", {**QWEN_MOE, **LAYERS, "mlp_only_layers": [0, 2]}, "FFF"),
    "qwen3_moe sparse step": ("qwen3_moe", {**QWEN_MOE, **LAYERS, "decoder_sparse_step": 2}, "FFF"),
    "qwen3_moe step and layers": (
        "qwen3_moe", {**QWEN_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]}, "FFFF",
    ),
    "qwen3_moe raw gates": ("qwen3_moe", {**QWEN_MOE, "norm_topk_prob": False}, "FF"),
    "qwen3_moe normed gates": ("qwen3_moe", {**QWEN_MOE, "norm_topk_prob": True}, "FF"),
    "qwen3_moe one expert": ("qwen3_moe", {**QWEN_MOE, "num_experts_per_tok": 1, "norm_topk_prob": False}, "FF"),
    "mixtral all experts": ("mixtral", {**MIXTRAL, "num_experts_per_tok": 4}, "FF"),
    "mixtral one expert": ("mixtral", {**MIXTRAL, "num_experts_per_tok": 1}, "FF"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_option(name, tmp_path):
    family, options, kinds = CASES[name]
    reference = make(family, **options)
    reference.save_pretrained(tmp_path / "hf")
    compare(tmp_path / "hf", reference, length=40, generated=6)
    ours = load_hf(tmp_path / "hf")
    assert ours.config.kinds == kinds
    assert save_hf(ours, tmp_path / "out", family=family).reason == ""
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids = tokens(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, reference(ids).logits, rtol=0, atol=1e-4)
    assert read_config(tmp_path / "out") == ours.config


def test_mistral_with_layer_types_is_ministral(tmp_path):
    """As `AutoModelForCausalLM` reads it; `mistral` itself would put a window on every layer."""
    make("ministral", sliding_window=7, **MIXED).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(reference).__name__ == "MinistralForCausalLM"
    compare(tmp_path, reference, length=40, generated=6)
