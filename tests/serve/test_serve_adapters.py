"""LoRA per request: against the change merged into the weights, row by row in mixed batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from deepseek.errors import ConfigError, RequestError, WeightsError
from deepseek.models import ModelConfig
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.serve.adapters import NAMES, AdapterBank, load_adapter

CONFIG = ModelConfig(
    vocab_size=64, hidden=48, layers=2, ffn=80, attention=AttentionConfig(heads=4, kv_heads=2, head_dim=16)
)
SIZES = {
    "self_attn.q_proj": (48, 64), "self_attn.k_proj": (48, 32), "self_attn.v_proj": (48, 32),
    "self_attn.o_proj": (64, 48), "mlp.gate_proj": (48, 80), "mlp.up_proj": (48, 80), "mlp.down_proj": (80, 48),
}  # fmt: skip
OURS = {
    "attention.query": (48, 64), "attention.key": (48, 32), "attention.value": (48, 32),
    "attention.output": (64, 48), "ffn.gate_up": (48, 160), "ffn.down": (80, 48),
}  # fmt: skip


def make(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(
    path: Path,
    rank: int = 4,
    seed: int = 0,
    modules: dict[str, tuple[int, int]] = SIZES,
    prefix: str = "base_model.model.model.layers",
    extra: dict[str, Tensor] | None = None,
    **options: Any,
) -> Path:
    """A directory as ``peft`` writes it."""
    tensors = dict(extra or {})
    for layer in range(CONFIG.layers):
        for i, (module, (inputs, outputs)) in enumerate(modules.items()):
            name, number = f"{prefix}.{layer}.{module}", seed + 100 * layer + i
            tensors[f"{name}.lora_A.weight"] = make(number, rank, inputs)
            tensors[f"{name}.lora_B.weight"] = make(number + 50, outputs, rank)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": list(modules), "bias": "none",
        "use_rslora": False, "modules_to_save": None, "init_lora_weights": True, **options,
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def merged(path: Path, layer: int, module: str, scale: float, prefix: str = "model.layers") -> Tensor:
    from safetensors.torch import load_file

    tensors = load_file(path / "adapter_model.safetensors")
    name = f"base_model.model.{prefix}.{layer}.{module}"
    return scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]


def changes(path: Path, layer: int, scale: float) -> dict[str, Tensor]:
    """What to add to each of our weights, from the file itself."""
    of = {m: merged(path, layer, m, scale) for m in SIZES}
    return {
        "query": of["self_attn.q_proj"], "key": of["self_attn.k_proj"], "value": of["self_attn.v_proj"],
        "output": of["self_attn.o_proj"], "gate_up": torch.cat((of["mlp.gate_proj"], of["mlp.up_proj"])),
        "down": of["mlp.down_proj"],
    }  # fmt: skip


@pytest.mark.parametrize("rslora", [False, True])
def test_a_mixed_batch_equals_merged_weights_row_by_row(tmp_path: Path, rslora: bool) -> None:
    paths = [write(tmp_path / "a", 4, use_rslora=rslora), write(tmp_path / "b", 9, seed=7, use_rslora=rslora)]
    bank = AdapterBank({p.name: load_adapter(p, CONFIG) for p in paths}, "fp32", "cpu")
    scales = [16 / 4**0.5, 16 / 9**0.5] if rslora else [16 / 4, 16 / 9]
    rows = bank.rows([-1, 0, 1, 0, -1, 1, 0])
    for layer in range(2):
        wanted = [changes(p, layer, s) for p, s in zip(paths, scales)]
        for name in NAMES:
            outputs, inputs = wanted[0][name].shape
            weight, x = make(1, outputs, inputs), make(2, 7, inputs)
            wide = torch.zeros(7, outputs + 6)
            y = wide[:, 3:-3]  # a part of a wider result, as of one product for query, key and value
            y += F.linear(x, weight)
            plain = y.clone()
            bank.add(layer, name, x, y, rows)
            for n, adapter in enumerate([-1, 0, 1, 0, -1, 1, 0]):
                if adapter < 0:
                    assert y[n].equal(plain[n])
                else:
                    want = F.linear(x[n], weight + wanted[adapter][name])
                    torch.testing.assert_close(y[n], want, rtol=1e-4, atol=1e-3)
            assert not wide[:, :3].any()
            assert not wide[:, -3:].any()


def test_all_rows_of_one_adapter_and_none(tmp_path: Path) -> None:
    adapter = load_adapter(write(tmp_path / "a"), CONFIG)
    assert adapter.rank == 4
    bank = AdapterBank({"a": adapter}, "fp32", "cpu")
    assert not bank.rows([-1, -1])
    assert not bank.rows([])
    x, y = make(0, 3, 48), torch.zeros(3, 64)
    bank.add(1, "query", x, y, bank.rows([0, 0, 0]))
    torch.testing.assert_close(y, x @ changes(tmp_path / "a", 1, 4.0)["query"].T, rtol=1e-4, atol=1e-3)


def test_our_own_names_and_partial_adapters(tmp_path: Path) -> None:
    path = write(tmp_path / "a", modules=OURS, prefix="base_model.model.blocks")
    adapter = load_adapter(path, CONFIG)
    assert set(adapter.deltas) == {(layer, name) for layer in range(2) for name in NAMES}
    (delta,) = adapter.deltas[0, "gate_up"]
    assert delta.up_FR.shape == (160, 4)
    only = write(tmp_path / "b", modules={"self_attn.q_proj": (48, 64)})
    bank = AdapterBank({"b": load_adapter(only, CONFIG)}, "fp32", "cpu")
    y = torch.zeros(1, 48)
    bank.add(0, "output", make(0, 1, 64), y, bank.rows([0]))
    assert not y.any()


def test_patterns_give_a_module_its_own_rank_and_alpha(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a", 4, r=2, lora_alpha=2,
        rank_pattern={".*": 4}, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 12, "k_proj": 6},
    )  # fmt: skip
    deltas = load_adapter(path, CONFIG).deltas
    assert [deltas[layer, "query"][0].scale for layer in range(2)] == [0.5, 3.0]
    assert [deltas[layer, "key"][0].scale for layer in range(2)] == [1.5, 1.5]


@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_exact_rows_do_not_depend_on_the_others(tmp_path: Path, format: str) -> None:
    bank = AdapterBank({"a": load_adapter(write(tmp_path / "a"), CONFIG)}, format, "cpu", exact=True)
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    x, base = make(0, 40, 48).to(dtype), make(1, 40, 64).to(dtype)
    whole = base.clone()
    bank.add(0, "query", x, whole, bank.rows([n % 3 - 1 and 0 for n in range(40)]))
    for n in range(40):
        y = base[n : n + 1].clone()
        bank.add(0, "query", x[n : n + 1], y, bank.rows([n % 3 - 1 and 0]))
        assert y.equal(whole[n : n + 1])


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"peft_type": "IA3"}, "'IA3' is not supported"),
    "bias": ({"bias": "all"}, "bias='all'"),
    "dora": ({"use_dora": True}, "use_dora=True"),
    "saved": ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights"),
    "rank": ({"r": 5}, "has rank 4, adapter_config.json says 5"),
    "alpha": ({"lora_alpha": "x"}, "must be positive numbers"),
    "pattern": ({"alpha_pattern": {"(": 3}}, "alpha_pattern"),
    "patterns": ({"rank_pattern": [4]}, "must be an object"),
    "inputs": ({"modules": {"self_attn.q_proj": (47, 64)}}, r"A \[4, 47\].* of another model"),
    "outputs": ({"modules": {"self_attn.q_proj": (48, 60)}}, r"takes \[rank, 48\] and \[64, rank\]"),
    "unknown": ({"modules": {"self_attn.q_projj": (48, 64)}}, "did you mean 'self_attn.q_proj'"),
    "experts": ({"modules": {"mlp.experts.3.gate_proj": (48, 80)}}, "LoRA on experts and routers is not supported"),
    "head": ({"extra": {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 2),
                        "base_model.model.lm_head.lora_B.weight": torch.ones(2, 2)}}, "lm_head is no linear layer"),
    "embedding": ({"extra": {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 2)}},
                  "not the A or B of a linear layer"),
    "half": ({"extra": {"base_model.model.model.layers.9.x.lora_A.weight": torch.ones(2, 2)}}, "not the other one"),
    "layers": ({"prefix": "base_model.model.model.layers.1"}, "no linear layer"),
    "integers": ({"extra": {"a.lora_A.weight": torch.ones(2, 2, dtype=torch.int32)}}, "finite"),
    "eight bits": ({"extra": {"a.lora_A.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}}, "finite"),
    "infinite": ({"extra": {"a.lora_A.weight": torch.full((2, 2), torch.inf)}}, "finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, case: str) -> None:
    options, message = BROKEN[case]
    with pytest.raises(WeightsError, match=message):
        load_adapter(write(tmp_path / "a", **options), CONFIG)


def test_layers_the_model_does_not_have(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    one = ModelConfig(vocab_size=64, hidden=48, layers=1, ffn=80, attention=CONFIG.attention)
    with pytest.raises(WeightsError, match="this model has 1 layers"):
        load_adapter(path, one)
    sparse = ModelConfig(
        vocab_size=64, hidden=48, layers=2, attention=CONFIG.attention, moe=MoEConfig(experts=4)
    )
    with pytest.raises(WeightsError, match="layer 0 of this model has experts there"):
        load_adapter(path, sparse)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no adapter_config\.json"):
        load_adapter(tmp_path / "nowhere", CONFIG)
    path = write(tmp_path / "a")
    tensors = path / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_adapter(path, CONFIG)
    tensors.rename(path / "adapter_model.bin")
    with pytest.raises(WeightsError, match="is a pickle"):
        load_adapter(path, CONFIG)
    save_file({}, tensors)
    with pytest.raises(WeightsError, match="holds no adapter tensors"):
        load_adapter(path, CONFIG)


def test_names(tmp_path: Path) -> None:
    adapter = load_adapter(write(tmp_path / "a"), CONFIG)
    bank = AdapterBank({"legal": adapter, "medical": adapter}, "fp32", "cpu")
    assert [bank.index(n) for n in (None, "legal", "medical")] == [-1, 0, 1]
    assert len(bank) == 2
    with pytest.raises(RequestError, match="did you mean 'legal'"):
        bank.index("lega")
    with pytest.raises(ConfigError, match="fp32 or bf16"):
        AdapterBank({}, "int8", "cpu")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, called by peft
def test_equals_peft_on_the_directory_it_writes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16,
        )
    )  # fmt: skip
    targets = [module.split(".")[1] for module in SIZES]
    options = {
        "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {"layers.1.mlp.up_proj": 5},
        "use_rslora": True,
    }
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options))
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            p.data.copy_(make(i, *p.shape))
    model.save_pretrained(tmp_path / "a")
    bank = AdapterBank({"a": load_adapter(tmp_path / "a", CONFIG)}, "fp32", "cpu")
    rows = bank.rows([-1, 0, 0])
    for layer in range(2):
        block = model.base_model.model.model.layers[layer]
        for module, (inputs, outputs) in SIZES.items():
            linear, x = block.get_submodule(module), make(layer, 3, inputs)
            name = {"q": "query", "k": "key", "v": "value", "o": "output", "d": "down"}.get(
                module.split(".")[1][0], "gate_up"
            )
            y = torch.zeros(3, 160 if name == "gate_up" else outputs)
            bank.add(layer, name, x, y, rows)
            first = 80 if "up_proj" in module else 0
            with torch.no_grad():
                want = linear(x) - linear.base_layer(x)
            got = y[:, first : first + outputs]
            torch.testing.assert_close(got[1:], want[1:], rtol=1e-4, atol=1e-4)
            assert not got[0].any()
