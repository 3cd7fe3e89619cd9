"""Logits and gradients against `transformers`, both directions of conversion, on random small models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek.models import Transformer
from deepseek.weights.convert import load_hf, read_config, save_hf, tensor_slots
from deepseek.weights.families import FAMILIES

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MIXTRAL = {"num_experts_per_tok": 2, "num_local_experts": 5}
QWEN = {"num_experts_per_tok": 2, "num_experts": 5, "moe_intermediate_size": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
TIED = {"tie_word_embeddings": True}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}

CASES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", TIED),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama all kv heads, theta": ("llama", {"num_key_value_heads": 4, **THETA}),
    "llama eps": ("llama", {"rms_norm_eps": 1e-2}),
    "mistral window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2 some windows": ("qwen2", {**WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3 wide heads, tied": ("qwen3", {"head_dim": 16, **TIED}),
    "qwen3 eps": ("qwen3", {"rms_norm_eps": 1e-2}),
    "qwen3 bias": ("qwen3", {"attention_bias": True}),
    "qwen3 windows": ("qwen3", MIXED),
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral tied, one expert each": ("mixtral", {**MIXTRAL, "num_experts_per_tok": 1, **TIED}),
    "mixtral window": ("mixtral", {**MIXTRAL, "sliding_window": 5}),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "norm_topk_prob": True}),
    "qwen3_moe raw gates": ("qwen3_moe", {**QWEN, "norm_topk_prob": False}),
    "qwen3_moe dense layer": ("qwen3_moe", {**QWEN, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen3_moe every second": ("qwen3_moe", {**QWEN, "decoder_sparse_step": 2}),
    "qwen3_moe window, bias": ("qwen3_moe", {**QWEN, **WINDOW, "attention_bias": True}),
}


def make(name, seed=0, **changes):
    """A `transformers` model with weights large enough that no part of it is idle."""
    model_type, options = CASES[name]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **{**SHAPE, **options, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens(seed=0, rows=2, length=13):
    return torch.randint(
        0, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def logits(model: Transformer, ids: Tensor) -> Tensor:
    return model.logits(model(ids).hidden)


def close(ours, theirs, tolerance=1e-5):
    """Equal to ``tolerance`` of the largest value."""
    scale = max(1.0, float(theirs.detach().abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def named_slots(ours: Transformer, reference, model_type: str):
    """What each parameter of the reference, by its name in memory, is of ours."""
    slots = tensor_slots(ours, FAMILIES[model_type], [n for n, _ in reference.named_parameters()])
    return {name: slots[name] for name, _ in reference.named_parameters()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_logits_and_gradients_equal_transformers(name, training, tmp_path):
    seed = sum(map(ord, name)) + training
    reference = make(name, seed).train(training)
    reference.save_pretrained(tmp_path / "hf")
    ours = load_hf(tmp_path / "hf").train(training)
    ids = tokens(seed)
    theirs, mine = reference(ids).logits, logits(ours, ids)
    close(mine, theirs)
    weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(seed))
    (theirs * weight).sum().backward()
    (mine * weight).sum().backward()
    state = dict(ours.named_parameters())
    compared = set()
    for parameter, slot in named_slots(ours, reference, CASES[name][0]).items():
        expected, gradient = reference.get_parameter(parameter).grad, state[slot.name].grad
        assert gradient is not None
        close(
            slot.view(gradient), expected if expected is not None else torch.zeros_like(slot.view(gradient))
        )
        compared.add(slot.name)
    assert compared == set(state), "a parameter of ours was not compared"


@pytest.mark.parametrize("name", CASES)
def test_files_survive_the_round_trip(name, tmp_path):
    reference = make(name, seed=3)
    reference.save_pretrained(tmp_path / "hf")
    ours = load_hf(tmp_path / "hf")
    exported = save_hf(ours, tmp_path / "back")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert read_config(tmp_path / "back") == ours.config
    assert exported.reason == ""
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert type(again) is type(reference) or exported.model_type != CASES[name][0]
    ids = tokens(3)
    torch.testing.assert_close(again(ids).logits, reference(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "qwen3_moe"])
def test_our_model_loads_in_plain_transformers(name, tmp_path):
    ours = load_family_shape(name, tmp_path)
    torch.manual_seed(5)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert save_hf(ours, tmp_path / "out").model_type == name
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tokens(5, length=20)
    close(logits(ours, ids), theirs(ids).logits)


def load_family_shape(name, tmp_path) -> Transformer:
    make(name).save_pretrained(tmp_path / "shape")
    return Transformer(read_config(tmp_path / "shape")).eval()


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_shards_both_ways(name, tmp_path):
    reference = make(name, seed=7)
    reference.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf/model.safetensors.index.json").is_file()
    ours, ids = load_hf(tmp_path / "hf"), tokens(7)
    close(logits(ours, ids), reference(ids).logits)
    save_hf(ours, tmp_path / "back", max_shard_bytes=20_000)
    files = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(len(load_file(f)) == 1 or f.stat().st_size < 25_000 for f in files)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert {n: f.name for f in files for n in load_file(f)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for f in files for t in load_file(f).values()
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(again(ids).logits, reference(ids).logits)


@pytest.mark.parametrize("name", ["llama tied", "mixtral", "qwen3_moe"])
def test_bf16_files(name, tmp_path):
    make(name, seed=8).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = tokens(8)
    wide = load_hf(tmp_path / "hf", dtype=torch.float32)
    close(logits(wide, ids), reference(ids).logits)
    narrow = load_hf(tmp_path / "hf")
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    save_hf(wide, tmp_path / "out", dtype=torch.bfloat16)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "out"))
    assert all(torch.equal(before[key], after[key]) for key in before.keys() | after.keys())
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fused_expert_files(name, tmp_path):
    reference = make(name, seed=9)
    reference.save_pretrained(tmp_path / "hf")
    save_file(dict(reference.state_dict()), tmp_path / "hf/model.safetensors")  # names as they are in memory
    assert any(key.endswith("experts.gate_up_proj") for key in load_file(tmp_path / "hf/model.safetensors"))
    ids = tokens(9)
    close(logits(load_hf(tmp_path / "hf"), ids), reference(ids).logits)


def test_names_of_public_checkpoints(tmp_path):
    """The spelling that Mixtral and Qwen3-MoE were published in, written out by hand."""
    for name, expected in (
        ("mixtral", "model.layers.1.block_sparse_moe.experts.4.w3.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.4.up_proj.weight"),
    ):
        reference = make(name, seed=10)
        reference.save_pretrained(tmp_path / name)
        save_hf(load_hf(tmp_path / name), tmp_path / f"{name}-out")
        written = load_file(tmp_path / f"{name}-out/model.safetensors")
        size = written[expected].shape[0]
        up = reference.state_dict()["model.layers.1.mlp.experts.gate_up_proj"][4, size:]
        assert torch.equal(written[expected], up)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_of_missing_keys_are_those_of_transformers(model_type, tmp_path):
    given = {k: SHAPE[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = 4 if model_type == "qwen3_moe" else 32
    given |= {"model_type": model_type, "num_attention_heads": heads, "hidden_size": 128}
    Path(tmp_path / "config.json").write_text(json.dumps(given))
    ours = read_config(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    head = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.attention.kv_heads, ours.attention.head_dim) == (theirs.num_key_value_heads, head)
    assert ours.attention.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.norm_eps, ours.init_std) == (theirs.rms_norm_eps, theirs.initializer_range)
    assert (ours.max_length, ours.tie_embeddings) == (
        theirs.max_position_embeddings,
        theirs.tie_word_embeddings,
    )
    assert ours.kinds == ("L" if getattr(theirs, "sliding_window", None) else "F") * 2
    if ours.moe.experts:
        assert (ours.moe.experts, ours.moe.top_k) == (theirs.num_local_experts, theirs.num_experts_per_tok)
        assert ours.moe.normalise_gates is getattr(theirs, "norm_topk_prob", True)


def test_transformers_4_spelling(tmp_path):
    """`rope_theta`, `rope_scaling: null` and `torch_dtype`, as files from before version 5 have them."""
    reference = make("llama", seed=11, rope_parameters={"rope_type": "default", "rope_theta": 250.0})
    reference.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"rope_theta": values.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    values["torch_dtype"] = values.pop("dtype", "float32")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path).attention.rope_theta == 250.0
    ids = tokens(11)
    close(logits(load_hf(tmp_path), ids), reference(ids).logits)


def test_long_positions(tmp_path):
    reference = make("llama", seed=12, max_position_embeddings=4096)
    reference.save_pretrained(tmp_path)
    ids = tokens(12, rows=1, length=1500)
    with torch.no_grad():
        close(logits(load_hf(tmp_path), ids), reference(ids).logits)
