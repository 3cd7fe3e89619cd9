"""Models in GGUF files against `transformers`: small ones of every architecture, and SmolLM2 as it is shipped."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_models import make, smollm2, tensors, write, write_model

from deepseek import assemble
from deepseek.errors import WeightsError
from deepseek.weights.convert import load_hf, save_hf
from deepseek.weights.gguf import GGUFFile

MIXTRAL = {"num_experts_per_tok": 2, "num_local_experts": 4}
QWEN = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True}
CASES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama all kv heads": ("llama", {"num_key_value_heads": 4}),
    "mistral, wide heads": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "mixtral": ("mixtral", MIXTRAL),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", QWEN),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3 window": ("phi3", {"sliding_window": 6, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "smollm3 untied, three layers": ("smollm3", {"num_hidden_layers": 3, "tie_word_embeddings": False}),
}
IDS = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))


def logits(path) -> torch.Tensor:
    model = assemble.load(path).model
    with torch.no_grad():
        return model.logits(model(IDS).hidden)


def reference_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


def refused(path, *words):
    with pytest.raises(WeightsError) as caught:
        assemble.load(path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, tmp_path):
    model_type, options = CASES[name]
    model = make(model_type, **options)
    close(logits(write_model(tmp_path / "m.gguf", model)), reference_logits(model))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised(kind, tmp_path):
    """Equal to the same model with its matrices rounded through the package `gguf`."""
    model, number = make("llama", hidden_size=64), gguf.GGMLQuantizationType[kind]
    path = write_model(tmp_path / "m.gguf", model, kind=number)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            rounded = gguf.dequantize(gguf.quantize(parameter.detach().numpy(), number), number)
            parameter.data = torch.from_numpy(np.ascontiguousarray(rounded))
    close(logits(path), reference_logits(model))
    kept = assemble.load(path, dtype="kept").model.embedding.weight.dtype
    assert kept == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert assemble.load(path, dtype=torch.bfloat16).model.embedding.weight.dtype == torch.bfloat16


def test_experts_in_tensors_of_their_own(tmp_path):
    """As files of 2023 have them."""
    model = make("mixtral", **MIXTRAL)
    weights = {}
    for name, value in tensors(model).items():
        if "_exps" in name:
            weights |= {name.replace("_exps", f".{e}"): part for e, part in enumerate(value)}
        else:
            weights[name] = value
    whole = write_model(tmp_path / "whole.gguf", model)
    with GGUFFile(whole) as file:
        meta = {k: v for k, v in file.metadata.items() if k.startswith("llama.")}

    def fill(writer):
        for key, value in meta.items():
            writer.add_float32(key, value) if isinstance(value, float) else writer.add_uint32(key, value)

    apart = write(tmp_path / "apart.gguf", "llama", weights, fill)
    assert torch.equal(logits(apart), logits(whole))


REFUSED = {
    "rope.scaling.type": ("dynamic", "we know none, linear and yarn"),
    "rope.scaling.factor": (-4.0, "it must be a positive number"),
    "rope.scaling.alpha": (4.0, "our layers cannot express that"),
    "rope.dimension_count": (8, "RoPE on whole heads"),
    "attention.value_length": (8, "values as wide as keys"),
    "attention.head_count_kv": ([2, 1], "our layers are all alike"),
    "block_count": ("two", "whole number from 1 to 10000"),
    "context_length": (0, "whole number"),
    "attention.layer_norm_rms_epsilon": (-1.0, "positive number"),
    "expert_shared_count": (2, "our layers cannot express that"),
    "logit_scale": (0.5, "our layers cannot express that"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_our_layers_cannot_express_is_named(key, tmp_path):
    value, words = REFUSED[key]
    model = make("llama")
    whole = write_model(tmp_path / "whole.gguf", model)
    with GGUFFile(whole) as file:
        meta = {k: v for k, v in file.metadata.items() if k.startswith("llama.")} | {f"llama.{key}": value}

    def fill(writer):
        for name, v in meta.items():
            kinds = {float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            kinds.get(type(v), writer.add_uint32)(name, v)

    refused(write(tmp_path / "m.gguf", "llama", tensors(model), fill), f"llama.{key} is {value!r}", words)


def test_names_and_shapes(tmp_path):
    model = make("llama")
    whole = tensors(model)

    def file(change):
        path = write_model(tmp_path / "m.gguf", model)
        changed = dict(whole)
        change(changed)
        with GGUFFile(path) as held:
            meta = {k: v for k, v in held.metadata.items() if k.startswith("llama.")}
        fill = lambda w: [  # noqa: E731
            w.add_float32(k, v) if isinstance(v, float) else w.add_uint32(k, v) for k, v in meta.items()
        ]
        return write(tmp_path / "changed.gguf", "llama", changed, fill)

    refused(file(lambda t: t.pop("blk.1.attn_q.weight")), "1 missing (blk.1.attn_q.weight)")
    refused(file(lambda t: t.pop("token_embd.weight")), "no tensor token_embd.weight")
    refused(file(lambda t: t.update(odd=np.ones(3, np.float32))), "1 without a place (odd)")
    refused(
        file(lambda t: t.update({"blk.0.attn_k.weight": np.ones((3, 64), np.float32)})),
        "blk.0.attn_k.weight is [3, 64] in the file", "asks for [32, 64]",
    )  # fmt: skip


def test_other_architectures(tmp_path):
    refused(write(tmp_path / "a.gguf", "gemma2", {"x": np.ones(4, np.float32)}), "'gemma2'", "qwen3moe")


def test_phi3_refused(tmp_path):
    model = make("phi3", sliding_window=None)
    path = write_model(
        tmp_path / "m.gguf", model, lambda w: w.kv_data[0].pop("phi3.attention.sliding_window")
    )
    refused(path, "phi3.attention.sliding_window is None", "take a newer one")
    path = write_model(tmp_path / "m.gguf", model, lambda w: w.add_head_count_kv(4))
    refused(path, "blk.0.attn_qkv.weight is [128, 64] in the file; its config asks for 192 rows")


def test_a_directory_with_one_file_and_with_two(tmp_path):
    model = make("llama")
    write_model(tmp_path / "one.gguf", model)
    close(logits(tmp_path), reference_logits(model))
    write_model(tmp_path / "two.gguf", model)
    refused(tmp_path, "holds 2 GGUF files; name one: one.gguf, two.gguf")


def test_a_gguf_model_goes_out_as_a_hugging_face_directory(tmp_path):
    model = make("mixtral", **MIXTRAL)
    loaded = assemble.load(write_model(tmp_path / "m.gguf", model))
    assert save_hf(loaded.model, tmp_path / "hf").model_type == "mixtral"
    close(
        reference_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")),
        reference_logits(model),
    )
    assert load_hf(tmp_path / "hf").config == loaded.model.config


@pytest.mark.slow
def test_smollm2_equals_transformers_own_reading():
    """Logits in fp32, and 16 greedy tokens, of the real file read by `transformers`' GGUF code."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = smollm2()
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    theirs = transformers.LlamaForCausalLM(config).eval()
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)
    theirs.load_state_dict(read["tensors"], strict=False)
    theirs.tie_weights()
    loaded = assemble.load(path)
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([loaded.tokenizer.encode(text, special=True)])
    with torch.no_grad():
        close(loaded.model.logits(loaded.model(ids).hidden), theirs(ids).logits)
        expected = theirs.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
        grown = ids
        for _ in expected:
            best = loaded.model.logits(loaded.model(grown).hidden[:, -1:]).argmax(-1)
            grown = torch.cat([grown, best], 1)
    assert grown[0, ids.shape[1] :].tolist() == expected
    assert loaded.tokenizer.decode(expected).startswith("The capital of France is Paris.")
