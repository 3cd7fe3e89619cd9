"""Scaled rotary embeddings in GGUF files against `transformers`: keys, and the tensor that Llama 3.1 files carry."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_models import make, write_model
from hf_models import compare

from deepseek.errors import WeightsError
from deepseek.nn.rope import RopeScaling, rope_table
from deepseek.weights.convert import load_hf, open_gguf, save_hf

LONG = {"max_position_embeddings": 96, "vocab_size": 61}
ORIGINAL = {"original_max_position_embeddings": 24}
BASE = {"rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    **ORIGINAL,
    **BASE,
}
YARN = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL, **BASE}


def keys(model):
    """What llama.cpp's converter writes for the model's rope table; for llama3 it is the tensor."""

    def fill(writer):
        rope = model.config.rope_parameters
        kind = gguf.RopeScalingType(rope["rope_type"])
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == gguf.RopeScalingType.YARN:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            for name in ("attn_factor", "beta_fast", "beta_slow"):
                value = rope.get({"attn_factor": "attention_factor"}.get(name, name))
                if value is not None:
                    getattr(writer, f"add_rope_scaling_yarn_{name}")(value)

    return fill


def factors(model):
    """The tensor, from the frequencies that `transformers` turns by."""
    size, theta = model.config.head_dim, model.config.rope_parameters["rope_theta"]
    own = 1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / size)
    values = (own / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    return lambda writer: writer.add_tensor("rope_freqs.weight", values)


def scaling(path) -> RopeScaling:
    with open_gguf(path) as found:
        return found.config.attention.rope_scaling


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [
        ("llama", {"rope_type": "linear", "factor": 4.0, **BASE}),
        ("llama", YARN),
        ("qwen2", {**YARN, "rope_theta": 1e6}),
        ("qwen3", {**YARN, "attention_factor": 1.25, "beta_fast": 8.0, "beta_slow": 2.0}),
    ],
)
def test_keys(model_type, rope, tmp_path):
    model = make(model_type, **LONG, rope_parameters=rope)
    compare(write_model(tmp_path / "m.gguf", model, keys(model)), model)


def test_the_tensor_of_another_training_length(tmp_path):
    model = make("llama", **LONG, rope_parameters=LLAMA3)
    path = write_model(tmp_path / "m.gguf", model, factors(model))
    compare(path, model)
    found = scaling(path)
    assert (found.type, len(found.factors), max(found.factors)) == ("factors", 8, 4.0)


@pytest.mark.parametrize(("size", "factor"), [(128, 8.0), (64, 32.0)])
def test_the_tensor_of_llama_3_is_its_rule_again(size, factor, tmp_path):
    """Llama 3.1's and 3.2's numbers: back to Hugging Face they go as the table they came from."""
    rope = {**LLAMA3, "rope_theta": 5e5, "factor": factor, "original_max_position_embeddings": 8192}
    model = make("llama", **LONG, head_dim=size, rope_parameters=rope)
    path = write_model(tmp_path / "m.gguf", model, factors(model))
    compare(path, model)
    model.save_pretrained(tmp_path / "hf")
    with open_gguf(path) as found:
        assert found.config.attention == load_hf(tmp_path / "hf").config.attention
        assert save_hf(found.load(), tmp_path / "out").model_type == "llama"
    again = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert again.rope_parameters == rope


def test_what_means_no_scaling(tmp_path):
    model = make("llama")
    for name, fill in {
        "none": lambda w: (
            w.add_rope_scaling_type(gguf.RopeScalingType.NONE),
            w.add_rope_scaling_factor(4.0),
        ),
        "factor 1": lambda w: w.add_rope_scaling_factor(1.0),
        "factor 0": lambda w: w.add_rope_scaling_factor(0.0),
        "ones": lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
        "old name": lambda w: w.add_float32("llama.rope.scale_linear", 1.0),
    }.items():
        assert scaling(write_model(tmp_path / "m.gguf", model, fill)) == RopeScaling(), name


def test_keys_alone(tmp_path):
    """A factor without a type is linear; YaRN's attention factor may be given in three ways."""
    model = make("llama")

    def found(*entries):
        fill = lambda w: [w.add_float32(f"llama.rope.{k}", v) for k, v in entries]  # noqa: E731
        yarn = lambda w: (w.add_rope_scaling_type(gguf.RopeScalingType.YARN), fill(w))  # noqa: E731
        return scaling(write_model(tmp_path / "m.gguf", model, yarn if len(entries) > 1 else fill))

    assert found(("scaling.factor", 2.0)) == RopeScaling(type="linear", factor=2.0)
    assert found(("scale_linear", 2.0)) == RopeScaling(type="linear", factor=2.0)
    plain = found(("scaling.factor", 4.0), ("scaling.yarn_ext_factor", 1.0))
    assert plain == RopeScaling(type="yarn", factor=4.0, original_length=64)
    assert plain.magnitude == pytest.approx(1 + 0.1 * np.log(4))
    assert found(("scaling.factor", 4.0), ("scaling.attn_factor", 0.5)).magnitude == pytest.approx(
        plain.magnitude / 2
    )
    assert found(("scaling.factor", 4.0), ("scaling.yarn_log_multiplier", 1.0)).magnitude == 1
    assert found(("scaling.factor", 4.0), ("scaling.yarn_attn_factor", 1.5)).magnitude == 1.5


def listed(values):
    return lambda w: w.add_tensor("rope_freqs.weight", np.array(values, np.float32))


REFUSED = {
    "longrope": (
        lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "'longrope', which is not supported",
    ),
    "longrope tensors": (
        lambda w: w.add_tensor("rope_factors_long.weight", np.ones(8, np.float32)), "passes the original length",
    ),
    "type": (lambda w: w.add_string("llama.rope.scaling.type", "ntk"), "llama.rope.scaling.type is 'ntk'"),
    "factor below 1": (lambda w: w.add_rope_scaling_factor(0.5), "rope_scaling.factor=0.5 must be at least 1"),
    "attention": (lambda w: w.add_rope_scaling_attn_factors(2.0), "rope.scaling.attn_factor is 2.0"),
    "blend": (
        lambda w: (w.add_rope_scaling_type(gguf.RopeScalingType.YARN), w.add_rope_scaling_yarn_ext_factor(0.0)),
        "yarn_ext_factor is 0.0",
    ),
    "both": (lambda w: (w.add_rope_scaling_factor(2.0), listed([2] * 8)(w)), "both rope_freqs.weight and"),
    "too few": (listed([2, 2]), "rope_freqs.weight is [2], from 2 to 2; heads of 16 need 8 positive numbers"),
    "not positive": (listed([1] * 7 + [0]), "from 0 to 1"),
    "not finite": (listed([1] * 7 + [np.nan]), "need 8 positive numbers"),
    "sections": (lambda w: w.add_rope_dimension_sections([2, 3, 3, 0]), "dimension_sections is [2, 3, 3, 0]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    fill, words = REFUSED[name]
    path = write_model(tmp_path / "m.gguf", make("llama"), fill)
    with pytest.raises(WeightsError) as caught:
        open_gguf(path)
    assert words in str(caught.value)


def test_listed_factors_are_kept_to_the_last_bit(tmp_path):
    values = (1 + torch.rand(8, generator=torch.Generator().manual_seed(1)) * 7).numpy()
    found = scaling(write_model(tmp_path / "m.gguf", make("llama"), listed(values)))
    assert np.array_equal(np.array(found.factors, np.float32), values)


JUNK = {
    "add_string": ["", "x", "none"], "add_bool": [True, False], "add_uint32": [0, 1, 7], "add_int32": [-1],
    "add_float32": [0.0, -2.0, 1e-30, 3.0, float("inf"), float("nan")], "add_array": [[1.0, 2.0], ["x"], [0, 4]],
}  # fmt: skip
KEYS = (
    "freq_base", "scale_linear", "dimension_count", "scaling.type", "scaling.factor", "scaling.attn_factor",
    "scaling.original_context_length", "scaling.yarn_ext_factor", "scaling.yarn_attn_factor",
    "scaling.yarn_beta_fast", "scaling.yarn_beta_slow", "scaling.yarn_log_multiplier", "scaling.finetuned",
)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_any_value_of_any_key_is_read_or_refused(key, tmp_path):
    """Nothing but a `WeightsError` comes out; what is read makes finite tables."""
    model, path = make("llama", num_hidden_layers=1, vocab_size=8), tmp_path / "m.gguf"
    for add, values in JUNK.items():
        for value in values:

            def fill(writer, add=add, value=value):
                yarn = {"scaling.type": "yarn", "scaling.factor": 4.0}
                for name, usual in yarn.items():
                    if name != key:
                        (writer.add_string if name == "scaling.type" else writer.add_float32)(
                            f"llama.rope.{name}", usual
                        )
                writer.kv_data[0].pop(f"llama.rope.{key}", None)
                getattr(writer, add)(f"llama.rope.{key}", value)

            try:
                with open_gguf(write_model(path, model, fill)) as found:
                    a = found.config.attention
            except WeightsError:
                continue
            tables = rope_table(torch.arange(64), a.head_dim, a.rope_theta, a.rope_scaling)
            assert all(bool(t.isfinite().all()) for t in tables), (key, value)
