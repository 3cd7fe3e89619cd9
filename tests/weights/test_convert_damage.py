"""What cannot be read, expressed or written is one line that names it; no target is ever half-written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek.config import replace
from deepseek.errors import WeightsError
from deepseek.models import ModelConfig, Transformer
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.weights import convert
from deepseek.weights.convert import load_hf, read_config, save_hf

DENSE = ModelConfig(
    vocab_size=61, hidden=32, layers=2, ffn=48, pattern="F", tie_embeddings=False,
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8),
)  # fmt: skip
SPARSE = replace(DENSE, moe=MoEConfig(experts=4, top_k=2, expert_ffn=16))


@pytest.fixture
def directory(tmp_path):
    save_hf(Transformer(DENSE), tmp_path / "model")
    return tmp_path / "model"


def refused(directory, *words, read=load_hf):
    with pytest.raises(WeightsError) as caught:
        read(directory)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def change(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_truncated_at_many_places(directory):
    whole = (directory / "model.safetensors").read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        (directory / "model.safetensors").write_bytes(whole[:size])
        refused(directory, "model.safetensors is not a readable safetensors file")


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\x00" * 8, (10).to_bytes(8, "little") + b"not json!!"])
def test_bad_header(directory, header):
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(header + whole[len(header) :])
    refused(directory, "not a readable safetensors file")


def test_wrong_shape(directory):
    rewrite(directory, lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    refused(directory, "model.norm.weight", "[31]", "[32]")


def test_missing_tensors(directory):
    rewrite(directory, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    refused(directory, "1 missing", "model.layers.1.self_attn.k_proj.weight")


def test_left_over_tensors(directory):
    rewrite(directory, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    refused(directory, "1 without a place", "q_norm")


def test_integer_tensor(directory):
    rewrite(directory, lambda t: t.update({"lm_head.weight": torch.ones(61, 32, dtype=torch.int8)}))
    refused(directory, "lm_head.weight", "int8", "dequantise")


def test_nan_is_allowed(directory):
    rewrite(directory, lambda t: t["model.norm.weight"].fill_(float("nan")))
    assert load_hf(directory).norm.weight.isnan().all()


def test_old_llama_constant_is_ignored(directory):
    rewrite(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_hf(directory)


def test_tied_config_with_a_head(tmp_path):
    save_hf(Transformer(replace(DENSE, tie_embeddings=True)), tmp_path / "m")
    embedding = load_file(tmp_path / "m/model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path / "m", lambda t: t.update({"lm_head.weight": embedding.clone()}))
    assert load_hf(tmp_path / "m").head is None
    rewrite(tmp_path / "m", lambda t: t.update({"lm_head.weight": embedding + 1}))
    refused(tmp_path / "m", "tie_word_embeddings", "lm_head.weight")


def test_directories_that_are_no_model(tmp_path):
    refused(tmp_path / "nowhere", "not there")
    refused(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "cannot read")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "list")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtrall"}))
    refused(tmp_path, "mixtrall", "did you mean 'mixtral'", "deepseek_hybrid")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 3}))
    refused(tmp_path, "model_type None")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 3}))
    refused(tmp_path, "lacks hidden_size, intermediate_size")
    refused(tmp_path / "config.json", "not a directory")


def test_no_weights(directory):
    (directory / "model.safetensors").unlink()
    refused(directory, "no model.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    refused(directory, "pytorch_model.bin is a pickle")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("rope_parameters", "yes"),
        ("rope_scaling", {"type": "longrope", "factor": 2.0}),
        ("partial_rotary_factor", 0.25),
        ("is_causal", False),
        ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "fp8"}),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", True),
        ("rms_norm_eps", 0),
        ("attention_bias", "no"),
        ("head_dim", -8),
        ("num_key_value_heads", 3),
        ("rope_theta", None),
        ("initializer_range", "x"),
        ("tie_word_embeddings", 1),
    ],
)
def test_unsupported_options_are_named(directory, key, value):
    if key in ("rope_scaling", "rope_theta"):
        change(directory, rope_parameters=None)
    change(directory, **{key: value})
    shown = "kv_heads=3" if key == "num_key_value_heads" else key
    refused(directory, shown, read=read_config)


JUNK = (None, -1, 0, 1, 1.5, 10**40, float("inf"), float("nan"), "", "x", [], [1], {}, {"a": []}, True, False)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "qwen3_moe", "deepseek_hybrid"])
def test_any_value_of_any_key_loads_or_is_refused(family, tmp_path):
    changed = {
        "qwen3": {"attention": replace(DENSE.attention, qk_norm=True)},
        "mixtral": {"moe": SPARSE.moe},
        "qwen3_moe": {"moe": SPARSE.moe, "attention": replace(DENSE.attention, qk_norm=True)},
    }
    save_hf(Transformer(replace(DENSE, **changed.get(family, {}))), tmp_path / "m", family=family)
    path = tmp_path / "m/config.json"
    good = json.loads(path.read_text())
    extra = ("rope_scaling", "quantization_config", "architectures", "layer_types", "max_window_layers")
    outcomes = []
    for key in (*good, *extra):
        for value in JUNK:
            path.write_text(json.dumps({**good, key: value}))
            try:
                load_hf(tmp_path / "m")
                outcomes.append("")
            except WeightsError as error:
                outcomes.append(str(error))
    assert "" in outcomes
    assert any(outcomes)
    assert not any("\n" in outcome for outcome in outcomes)


def test_layer_types(tmp_path):
    qwen = replace(DENSE, attention=replace(DENSE.attention, qk_norm=True))
    save_hf(Transformer(qwen), tmp_path / "m")
    change(tmp_path / "m", layer_types=["full_attention", "chunked_attention"])
    refused(tmp_path / "m", "layer_types", "chunked_attention", read=read_config)
    change(tmp_path / "m", layer_types=["full_attention", "sliding_attention"], use_sliding_window=False)
    refused(tmp_path / "m", "sliding_window is off", read=read_config)


def test_contradicting_expert_counts(tmp_path):
    save_hf(Transformer(SPARSE), tmp_path / "m")
    change(tmp_path / "m", num_experts=7)
    refused(tmp_path / "m", "disagree", "7", read=read_config)


class TestIndex:
    @pytest.fixture
    def sharded(self, tmp_path):
        save_hf(Transformer(DENSE), tmp_path / "model", max_shard_bytes=20_000)
        return tmp_path / "model"

    def edit(self, sharded, change):
        path = sharded / "model.safetensors.index.json"
        values = json.loads(path.read_text())
        change(values["weight_map"])
        path.write_text(json.dumps(values))

    def test_escaping_the_directory(self, sharded):
        outside = sharded.parent / "x.safetensors"
        shutil.copy(next(sharded.glob("model-00001*")), outside)
        for name in ("../x.safetensors", str(outside), "..\\x.safetensors", 3):
            self.edit(sharded, lambda m, name=name: m.update({"model.norm.weight": name}))
            refused(sharded, "model.norm.weight", "no file name of this directory")

    def test_missing_shard(self, sharded):
        gone = next(sharded.glob("model-00002*"))
        gone.unlink()
        refused(sharded, gone.name)

    def test_disagreement(self, sharded):
        self.edit(sharded, lambda m: m.pop("model.norm.weight"))
        refused(sharded, "disagree", "model.norm.weight")

    def test_no_map(self, sharded):
        (sharded / "model.safetensors.index.json").write_text("{}")
        refused(sharded, "weight_map")


def test_damaged_config_of_our_own(tmp_path):
    save_hf(Transformer(DENSE), tmp_path / "m", family="deepseek_hybrid")
    shape = json.loads((tmp_path / "m/config.json").read_text())["model"]
    change(tmp_path / "m", model={**shape, "experts": 3})
    refused(tmp_path / "m", "unknown key 'experts'")
    change(tmp_path / "m", model=None)
    refused(tmp_path / "m", "lacks 'model'")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pattern": "FH"}, "hybrid attention"),
        ({"moe": replace(SPARSE.moe, shared_experts=1)}, "shared experts"),
        ({"attention": replace(DENSE.attention, output_bias=True)}, "biases"),
        ({"ffn_bias": True, "attention": replace(DENSE.attention, qk_norm=True)}, "feed-forward bias"),
        ({"pattern": "FL", "moe": SPARSE.moe}, "sliding window"),
        ({"moe": replace(SPARSE.moe, normalise_gates=False)}, "normalises the gates"),
    ],
)
def test_what_no_family_expresses_is_ours(changes, reason, tmp_path):
    model = Transformer(replace(DENSE, **changes))
    exported = save_hf(model, tmp_path / "m")
    assert exported.model_type == "deepseek_hybrid"
    assert reason in exported.reason
    assert read_config(tmp_path / "m") == model.config
    with pytest.raises(WeightsError, match="family 'llama' cannot hold"):
        save_hf(model, tmp_path / "n", family="llama")
    assert not (tmp_path / "n").exists()


def test_a_selection_bias_keeps_the_model_ours(tmp_path):
    model = Transformer(SPARSE)
    assert save_hf(model, tmp_path / "m").model_type == "mixtral"
    model.moe_layers()[1].router.bias[0] = 0.01
    exported = save_hf(model, tmp_path / "m")
    assert exported.model_type == "deepseek_hybrid"
    assert "selection bias is not zero in layers 1" in exported.reason
    with pytest.raises(WeightsError, match="selection bias"):
        save_hf(model, tmp_path / "m", family="mixtral")
    assert load_hf(tmp_path / "m").moe_layers()[1].router.bias[0] == pytest.approx(0.01)


def test_unknown_family(tmp_path):
    with pytest.raises(WeightsError, match="family 'gpt' is unknown; choose auto"):
        save_hf(Transformer(DENSE), tmp_path / "m", family="gpt")


def test_statistics_stay_fp32(tmp_path):
    model = Transformer(SPARSE)
    model.moe_layers()[0].router.bias.normal_()
    save_hf(model, tmp_path / "m", dtype=torch.bfloat16)
    loaded = load_hf(tmp_path / "m", dtype=torch.float16)
    assert torch.equal(loaded.moe_layers()[0].router.bias, model.moe_layers()[0].router.bias)
    assert loaded.moe_layers()[0].default_EC.dtype == torch.float32
    assert loaded.embedding.weight.dtype == torch.float16


class TestTarget:
    def test_an_earlier_export_is_replaced(self, directory):
        save_hf(Transformer(SPARSE), directory, max_shard_bytes=20_000)
        assert not (directory / "model.safetensors").exists()
        assert read_config(directory).moe.experts == 4
        save_hf(Transformer(DENSE), directory)
        assert sorted(p.name for p in directory.iterdir()) == [
            "config.json", "generation_config.json", "model.safetensors",
        ]  # fmt: skip

    def test_other_directories_are_left_alone(self, tmp_path):
        (tmp_path / "home").mkdir()
        (tmp_path / "home/thesis.txt").write_text("years of work")
        with pytest.raises(WeightsError, match=r"not an earlier export: it holds thesis\.txt"):
            save_hf(Transformer(DENSE), tmp_path / "home")
        with pytest.raises(WeightsError, match="is a file"):
            save_hf(Transformer(DENSE), tmp_path / "home/thesis.txt")
        assert (tmp_path / "home/thesis.txt").read_text() == "years of work"

    def test_full_disk_leaves_the_earlier_export(self, directory, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        before = {p.name: p.read_bytes() for p in directory.iterdir()}
        monkeypatch.setattr(convert, "write_weights", full)
        with pytest.raises(WeightsError, match="No space left"):
            save_hf(Transformer(SPARSE), directory)
        assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
        assert [p.name for p in directory.parent.iterdir() if not p.name.startswith(".lock")] == ["model"]

    def test_a_model_without_weights(self, tmp_path):
        with torch.device("meta"):
            model = Transformer(DENSE)
        with pytest.raises(WeightsError, match="meta"):
            save_hf(model, tmp_path / "m")
        assert not (tmp_path / "m").exists()
