"""Options of `config.json` that change what a layer computes, each against `transformers` and the serving engine.

Sequences are longer than every window, and each model also goes out to a directory and back into `transformers`.
"""

import json

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from hf_models import MIXTRAL, QWEN_MOE, compare, make, tokens

from deepseek.errors import WeightsError
from deepseek.models import ModelConfig, Transformer
from deepseek.nn.attention import AttentionConfig
from deepseek.weights.convert import load_hf, read_config, save_hf
from deepseek.weights.families import UNLIKE

SLIDING, FULL = "sliding_attention", "full_attention"
ON = {"use_sliding_window": True, "sliding_window": 7}
LAYERS = {"num_hidden_layers": 3}
NOPE = {"num_hidden_layers": 5, "use_sliding_window": False}
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
    "smollm3": ("smollm3", NOPE, "FFFFF"),
    "smollm3 untied": ("smollm3", {**NOPE, "tie_word_embeddings": False}, "FFFFF"),
    "smollm3 every second": ("smollm3", {**NOPE, "no_rope_layer_interval": 2}, "FFFFF"),
    "smollm3 listed": ("smollm3", {**NOPE, "no_rope_layers": [0, 1, 1, 0, 0]}, "FFFFF"),
    "smollm3 none": ("smollm3", {**NOPE, "no_rope_layers": [0] * 5}, "FFFFF"),
    "smollm3 all": ("smollm3", {**NOPE, "no_rope_layers": [1] * 5}, "FFFFF"),
    "smollm3 biases": ("smollm3", {**NOPE, **BIASES, "mlp_bias": True}, "FFFFF"),
    "smollm3 yarn": ("smollm3", {**NOPE, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 5e6, "factor": 4.0, "original_max_position_embeddings": 16}}, "FFFFF"),
    "smollm3 windows": ("smollm3", {
        "num_hidden_layers": 4, **ON, "layer_types": [SLIDING, SLIDING, FULL, FULL]}, "LLFF"),
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


REFUSED = {
    "windows without rotary embedding": ({**NOPE, **ON}, "gives layer 3 no rotary embedding"),
    "too few": ({**NOPE, "no_rope_layers": [1, 0]}, "must hold 0 or 1 for each of 5 layers"),
    "no list": ({**NOPE, "no_rope_layers": 3}, "no_rope_layers 3 must hold"),
    "interval": ({**NOPE, "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_smollm3_refused(name, tmp_path):
    options, words = REFUSED[name]
    make("smollm3", **NOPE).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["no_rope_layers"], values["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps({**values, **options}))
    with pytest.raises(WeightsError) as caught:
        read_config(tmp_path)
    assert words in str(caught.value)


def test_a_model_of_ours_with_windows_and_plain_full_layers_goes_out_as_smollm3(tmp_path):
    """``full_rope = false`` with windows in between: position from the windows alone."""
    torch.manual_seed(0)
    heads = AttentionConfig(heads=4, kv_heads=2, head_dim=8, window=7, full_rope=False)
    ours = Transformer(
        ModelConfig(vocab_size=61, hidden=32, layers=4, ffn=48, pattern="LLLF", attention=heads)
    )
    for parameter in ours.eval().parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert save_hf(ours, tmp_path / "out").model_type == "smollm3"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    compare(tmp_path / "out", theirs, length=40, generated=6)


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"sliding_window": None}, "llama"),
        ({"sliding_window": 7}, "mistral"),
        ({"sliding_window": None, "num_key_value_heads": 1, "tie_word_embeddings": True}, "llama"),
    ],
)
def test_phi3_is_read_and_goes_out_as_what_it_is(options, written, tmp_path):
    """Query, key and value in one tensor; a directory that is written has them apart."""
    reference = make("phi3", head_dim=8, **options)
    reference.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert any("qkv_proj" in name for name, _ in reference.named_parameters())
    compare(tmp_path / "hf", reference, length=40, generated=6)
    ours, ids = load_hf(tmp_path / "hf"), tokens(1, 40)
    assert save_hf(ours, tmp_path / "out").model_type == written
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, reference(ids).logits, rtol=0, atol=1e-4)
    with pytest.raises(WeightsError, match="phi3 is read, not written"):
        save_hf(ours, tmp_path / "again", family="phi3")


def test_phi3_refused(tmp_path):
    reference = make("phi3", head_dim=8)
    reference.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())

    def refused(words, **changes):
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(WeightsError) as caught:
            load_hf(tmp_path)
        assert words in str(caught.value)

    refused("qkv_proj.weight is [64, 32] in the file; its config asks for 48 rows", num_key_value_heads=1)
    refused("gate_up_proj.weight is [96, 32] in the file; its config asks for 80 rows", intermediate_size=40)
    longrope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    refused("rope_scaling of the type 'longrope' is not supported", rope_scaling=longrope)
    refused("it means 'longrope' there", rope_scaling={"type": "yarn", "factor": 2.0})
    refused("rotate whole heads", partial_rotary_factor=0.75)


def test_known_families_that_are_not_like_ours_say_why(tmp_path):
    for model_type, why in UNLIKE.items():
        assert model_type in transformers.CONFIG_MAPPING
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(WeightsError) as caught:
            read_config(tmp_path)
        assert f"{model_type!r} is not one we can convert: {why}; we have: llama" in str(caught.value)
