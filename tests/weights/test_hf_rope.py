"""Scaled rotary embeddings of `transformers` models: in, through the serving engine, and out again."""

import json

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from hf_models import MIXTRAL, QWEN_MOE, compare, make, tokens

from deepseek.config import replace
from deepseek.errors import WeightsError
from deepseek.models import Transformer
from deepseek.nn.rope import RopeScaling, rope_table
from deepseek.weights.convert import load_hf, read_config, save_hf

ORIGINAL = {"original_max_position_embeddings": 24}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
YARN = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
LINEAR = {"rope_type": "linear", "factor": 4.0}
#: family, its options, the rope table, our attention factor
CASES = {
    "llama llama3": ("llama", {}, {**LLAMA3, "rope_theta": 5e2}),
    "llama llama3 tied": ("llama", {"tie_word_embeddings": True}, {**LLAMA3, "rope_theta": 1e4, "factor": 32.0}),
    "llama linear": ("llama", {}, {**LINEAR, "rope_theta": 1e4}),
    "llama yarn": ("llama", {}, {**YARN, "rope_theta": 1e4}),
    "mistral yarn": ("mistral", {"sliding_window": None}, {**YARN, "rope_theta": 1e3, "attention_factor": 1.3}),
    "mistral window": ("mistral", {"sliding_window": 20}, {**YARN, "rope_theta": 1e3}),
    "ministral yarn": (
        "ministral", {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
        {**YARN, "rope_theta": 1e4},
    ),
    "qwen2 yarn": ("qwen2", {"head_dim": 8}, {**YARN, "rope_theta": 1e6}),
    "qwen3 yarn": ("qwen3", {}, {**YARN, "rope_theta": 1e6, "beta_fast": 8, "beta_slow": 2}),
    "qwen3 yarn untruncated": ("qwen3", {}, {**YARN, "rope_theta": 1e2, "truncate": False, "beta_fast": 3.0}),
    "qwen3_moe yarn": ("qwen3_moe", {**QWEN_MOE, "norm_topk_prob": True}, {**YARN, "rope_theta": 1e6}),
    "mixtral yarn mscale": ("mixtral", MIXTRAL, {**YARN, "rope_theta": 1e4, "mscale": 0.9, "mscale_all_dim": 0.4}),
    "mixtral linear": ("mixtral", MIXTRAL, {**LINEAR, "rope_theta": 1e6}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_beyond_the_original_length(name, tmp_path):
    """80 tokens where the model had 24: logits, the engine's greedy tokens, and both again after an export."""
    family, options, rope = CASES[name]
    reference = make(family, **options, rope_parameters=rope)
    reference.save_pretrained(tmp_path / "hf")
    compare(tmp_path / "hf", reference)
    ours = load_hf(tmp_path / "hf")
    assert save_hf(ours, tmp_path / "back", family=family).reason == ""
    assert read_config(tmp_path / "back") == ours.config
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    ids = tokens(2, 80)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, reference(ids).logits, rtol=0, atol=1e-4)
        ours = Transformer(plain(ours.config))
        ours.load_state_dict(load_hf(tmp_path / "hf").state_dict())
        assert (ours.logits(ours(ids).hidden) - reference(ids).logits).abs().max() > 0.1, (
            "scaling does something"
        )


def plain(config):
    return replace(config, attention=replace(config.attention, rope_scaling=RopeScaling()))


def rewrite(directory, **changes):
    """``config.json`` with keys changed, or taken out where ``None``."""
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def spelled(scaling, **beside):
    """As `transformers` 4 and hand-edited files write it."""
    return {"rope_parameters": None, "rope_scaling": scaling, "rope_theta": 5e4, **beside}


SPELLINGS = {
    "rope_scaling": spelled(LLAMA3),
    "type": spelled({"type": "linear", "factor": 2.0}),
    "both types": spelled({"type": "yarn", "rope_type": "yarn", "factor": 4.0, **ORIGINAL}),
    "yarn without original length": spelled({"type": "yarn", "factor": 4.0}),
    "original length beside the table": spelled({"type": "yarn", "factor": 2.0}, **ORIGINAL),
    "both tables": {
        "rope_scaling": LINEAR, "rope_theta": 3e4, "rope_parameters": {**LLAMA3, "rope_theta": 1e4},
    },
    "rope_scaling null": {"rope_scaling": None, "rope_parameters": {**LINEAR, "rope_theta": 7e3}},
    "yarn mscale alone": spelled({"type": "yarn", "factor": 4.0, "mscale": 0.5, **ORIGINAL}),
    "yarn betas null": spelled({"rope_type": "yarn", "factor": 4.0, "beta_fast": None, **ORIGINAL}),
    "no type": spelled({"rope_theta": 2e3}),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_means_what_transformers_takes_it_for(name, tmp_path):
    make("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, **SPELLINGS[name])
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    compare(tmp_path, reference, generated=0)


def test_an_export_is_read_by_transformers_4_as_well(tmp_path):
    """Version 4 knows `rope_theta` and `rope_scaling` only; to it `rope_parameters` is not there."""
    reference = make("llama", rope_parameters={**LLAMA3, "rope_theta": 5e2})
    reference.save_pretrained(tmp_path / "hf")
    save_hf(load_hf(tmp_path / "hf"), tmp_path / "out")
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["rope_theta"] == 5e2
    assert values["rope_scaling"] == LLAMA3
    assert values["rope_parameters"] == {**LLAMA3, "rope_theta": 5e2}
    rewrite(tmp_path / "out", rope_parameters=None)
    compare(tmp_path / "out", reference, generated=0)


REFUSED = {
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, "exact up to max_position_embeddings=96"),
    "longrope": ({"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "passes the original length"),
    "su": ({"type": "su", "short_factor": [1.0], "long_factor": [2.0]}, "passes the original length"),
    "mrope": ({"type": "mrope", "mrope_section": [2, 3, 3]}, "we know default, linear, llama3, yarn"),
    "a number": ({"rope_type": 3}, "rope_scaling of the type 3"),
    "an unknown key": ({**LINEAR, "alpha": 2.0}, "the type 'linear' has no 'alpha'"),
    "layer types": ({"sliding_attention": LINEAR, "full_attention": LINEAR}, "has no 'full_attention'"),
    "no factor": ({"rope_type": "linear"}, "rope_scaling.factor is None"),
    "a small factor": ({"rope_type": "linear", "factor": 0.5}, "rope_scaling.factor=0.5 must be at least 1"),
    "no bound": ({k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}, "low_freq_factor is None"),
    "bounds": ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor=4.0 must be positive and less than"),
    "length": ({**YARN, "original_max_position_embeddings": 2.5}, "must be a positive whole number"),
    "attention": ({**YARN, "attention_factor": 0}, "attention_factor is 0; it must be a positive number"),
    "truncate": ({**YARN, "truncate": "no"}, "truncate is 'no'; it must be true or false"),
    "part": ({**YARN, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "no table": ("yarn", "rope_scaling is 'yarn'; it must be a table"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    scaling, words = REFUSED[name]
    make("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, **spelled(scaling))
    with pytest.raises(WeightsError) as caught:
        read_config(tmp_path)
    assert words in str(caught.value)


JUNK = (None, -1, 0, 1, 1.5, 10**40, 1e-300, float("inf"), float("nan"), "", "x", [], [1], {}, True, False)


@pytest.mark.parametrize("table", [LLAMA3, {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, LINEAR])
def test_any_value_of_any_key_is_read_or_refused(table, tmp_path):
    """Nothing but a `WeightsError` comes out; what is read makes finite tables."""
    make("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, **spelled(table))
    path, outcomes = tmp_path / "config.json", []
    good = json.loads(path.read_text())
    for key in (*table, "rope_theta", "attention_factor", "truncate", "beta_fast", "partial_rotary_factor"):
        for value in JUNK:
            path.write_text(json.dumps({**good, "rope_scaling": {**table, key: value}}))
            try:
                a = read_config(tmp_path).attention
            except WeightsError as error:
                outcomes.append(str(error))
            else:
                outcomes.append("")
                tables = rope_table(torch.arange(96), a.head_dim, a.rope_theta, a.rope_scaling)
                assert all(bool(t.isfinite().all()) for t in tables), (key, value)
    assert "" in outcomes
    assert any(outcomes)
    assert not any("\n" in outcome for outcome in outcomes)


def test_listed_factors_go_out_as_our_own_architecture(tmp_path):
    make("llama").save_pretrained(tmp_path / "hf")
    config = read_config(tmp_path / "hf")
    listed = RopeScaling(type="factors", factors=(1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 4.0, 4.0))
    config = replace(config, attention=replace(config.attention, rope_scaling=listed))
    ours = Transformer(config).eval()
    exported = save_hf(ours, tmp_path / "out")
    assert exported.model_type == "deepseek_hybrid"
    assert "its rotary frequencies are divided by a list of factors" in exported.reason
    assert load_hf(tmp_path / "out").config == config
