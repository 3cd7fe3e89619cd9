"""Model families of the Hugging Face format that our layers express exactly, as rows of one table.

A family is two mappings: ``config.json`` ↔ ``ModelConfig``, and tensor name ↔ ``Slot``, the part of one of
our tensors that the foreign tensor is. A slot is a view, so the same table fills our tensors, reads them out
again, and carries gradients across.

Keys that a ``config.json`` leaves out mean what ``transformers`` makes of them, so every row holds those
defaults. What our layers cannot express is refused with the key and its value.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from deepseek.errors import WeightsError, did_you_mean
from deepseek.models import ModelConfig
from deepseek.nn.moe import MoEConfig


class Slot(NamedTuple):
    """The part of our tensor ``name`` that one foreign tensor is: ``tensor[at]``, transposed or not."""

    name: str
    at: tuple[int | slice, ...] = ()
    transposed: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """A view of ``tensor``, one of ours, in the foreign layout."""
        part = tensor[self.at] if self.at else tensor
        return part.mT if self.transposed else part


class Experts(NamedTuple):
    """How a family spells an expert layer: the router; each expert's three matrices or all experts' two."""

    router: str
    gate: str
    up: str
    down: str
    fused: bool = False


# What transformers 5 calls them in memory; it also reads files written this way.
FUSED = Experts("mlp.gate.weight", "mlp.experts.gate_up_proj", "", "mlp.experts.down_proj", fused=True)
QWEN = Experts(
    "mlp.gate.weight",
    "mlp.experts.{e}.gate_proj.weight",
    "mlp.experts.{e}.up_proj.weight",
    "mlp.experts.{e}.down_proj.weight",
)
MIXTRAL = Experts(
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.{e}.w1.weight",
    "block_sparse_moe.experts.{e}.w3.weight",
    "block_sparse_moe.experts.{e}.w2.weight",
)


@dataclass(frozen=True)
class Family:
    """One architecture of ``transformers``.

    Attributes:
        defaults: what a missing key of ``config.json`` means.
        bias: attention biases: none; query, key and value; or ``attention_bias``: those and output.
        window: sliding windows: none, one for every layer, or by layer.
        nope: ``no_rope_layers`` says which layers have no rotary embedding.
        fused: files share tensors that ``unfused`` takes apart; such a family is read and never written.
        experts: spellings of the expert tensors, the one to write first; empty for a dense family.
        tokenizer: the class ``AutoTokenizer`` takes whatever the directory says, with text rules of its own.
    """

    model_type: str
    architecture: str
    defaults: dict[str, Any] = field(default_factory=dict)
    qk_norm: bool = False
    bias: Literal["none", "qkv", "option"] = "none"
    ffn_bias: bool = False
    window: Literal["none", "all", "layers"] = "none"
    nope: bool = False
    fused: bool = False
    experts: tuple[Experts, ...] = ()
    tokenizer: str = ""


COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "sliding_window": None,
}

FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (
        Family(
            "llama",
            "LlamaForCausalLM",
            {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
            bias="option",
            ffn_bias=True,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
            window="all",
        ),
        Family(
            "ministral",
            "MinistralForCausalLM",
            {
                "max_position_embeddings": 131_072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
                "layer_types": None,
            },
            window="layers",
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            {
                "max_position_embeddings": 32_768,
                "num_key_value_heads": 32,
                "use_sliding_window": False,
                "sliding_window": 4096,
                "max_window_layers": 28,
                "layer_types": None,
            },
            bias="qkv",
            window="layers",
            tokenizer="Qwen2Tokenizer",
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            {
                "max_position_embeddings": 32_768,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "attention_bias": False,
                "use_sliding_window": False,
                "sliding_window": 4096,
                "max_window_layers": 28,
                "layer_types": None,
            },
            qk_norm=True,
            bias="option",
            window="layers",
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            {
                "max_position_embeddings": 32_768,
                "num_key_value_heads": 4,
                "rope_theta": 2e6,
                "tie_word_embeddings": True,
                "attention_bias": False,
                "mlp_bias": False,
                "use_sliding_window": False,
                "no_rope_layers": None,
                "no_rope_layer_interval": 4,
                "layer_types": None,
            },
            bias="option",
            ffn_bias=True,
            window="layers",
            nope=True,
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
            window="all",
            fused=True,
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            {
                "max_position_embeddings": 131_072,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            window="all",
            experts=(MIXTRAL, FUSED),
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            {
                "max_position_embeddings": 32_768,
                "num_key_value_heads": 4,
                "attention_bias": False,
                "use_sliding_window": False,
                "sliding_window": 4096,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
                "decoder_sparse_step": 1,
                "mlp_only_layers": None,
            },
            qk_norm=True,
            bias="option",
            window="all",
            experts=(QWEN, FUSED),
        ),
    )
}


#: Families that people have and our layers do not express: why.
UNLIKE = {
    "qwen2_moe": "its shared expert has a gate of its own",
    "gemma": "its norms multiply by 1 + weight, its embeddings are scaled and its activation is GELU",
    "gemma2": "its scores and logits are soft-capped, and it has norms after each part",
    "gemma3_text": "its windows turn by another rotary base than its full layers, and it has norms after each part",
    "olmo2": "its norms come after attention and feed-forward",
    "gpt_oss": "its attention has sinks without keys, and its experts have biases and another activation",
    "deepseek_v2": "it has multi-head latent attention",
    "deepseek_v3": "it has multi-head latent attention",
    "llama4_text": "its attention is chunked and scaled by position",
    "qwen3_next": "most of its layers are linear attention",
    "granite": "it multiplies embeddings, residuals, scores and logits by constants",
}


def family_of(values: dict[str, Any]) -> Family:
    """The row of the table for a ``config.json``. Raises ``WeightsError`` with the known ones."""
    model_type = values.get("model_type")
    if model_type == "mistral" and "layer_types" in values:
        model_type = "ministral"  # AutoConfig does so too
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join((*FAMILIES, "deepseek_hybrid"))
        unlike = UNLIKE.get(model_type) if isinstance(model_type, str) else None
        why = f": {unlike}" if unlike else did_you_mean(str(model_type), FAMILIES)
        raise WeightsError(
            f"config.json: model_type {model_type!r} is not one we can convert{why}; we have: {known}"
        )
    return FAMILIES[model_type]


def slots(family: Family, config: ModelConfig, present: Container[str] = ()) -> dict[str, Slot]:
    """Every tensor of a ``family`` directory and which part of our tensors it is.

    ``present`` holds the names of a directory about to be read: where a family has several spellings, each
    layer follows them.
    """
    names = {"model.embed_tokens.weight": Slot("embedding.weight"), "model.norm.weight": Slot("norm.weight")}
    if not config.tie_embeddings:
        names["lm_head.weight"] = Slot("head.weight")
    for i, kind in enumerate(config.ffn_kinds):
        layer = _attention_slots(config)
        if kind == "E":
            marked = (s for s in family.experts if f"model.layers.{i}.{s.gate.format(e=0)}" in present)
            spelling = next(marked, family.experts[0])
            layer |= _expert_slots(spelling, config.moe)
        else:
            layer |= _dense_slots(config)
        for name, slot in layer.items():
            names[f"model.layers.{i}.{name}"] = slot._replace(name=f"blocks.{i}.{slot.name}")
    return names


def _attention_slots(config: ModelConfig) -> dict[str, Slot]:
    c = config.attention
    names = {
        "input_layernorm.weight": Slot("attention_norm.weight"),
        "post_attention_layernorm.weight": Slot("ffn_norm.weight"),
        "self_attn.o_proj.weight": Slot("attention.output.weight"),
    }
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
        names[f"self_attn.{theirs}_proj.weight"] = Slot(f"attention.{ours}.weight")
        if c.bias:
            names[f"self_attn.{theirs}_proj.bias"] = Slot(f"attention.{ours}.bias")
    if c.output_bias:
        names["self_attn.o_proj.bias"] = Slot("attention.output.bias")
    if c.qk_norm:
        names["self_attn.q_norm.weight"] = Slot("attention.query_norm.weight")
        names["self_attn.k_norm.weight"] = Slot("attention.key_norm.weight")
    return names


def _dense_slots(config: ModelConfig) -> dict[str, Slot]:
    names = {}
    for kind in ("weight", "bias") if config.ffn_bias else ("weight",):
        names[f"mlp.gate_proj.{kind}"] = Slot(f"ffn.gate_up.{kind}", (slice(None, config.ffn),))
        names[f"mlp.up_proj.{kind}"] = Slot(f"ffn.gate_up.{kind}", (slice(config.ffn, None),))
        names[f"mlp.down_proj.{kind}"] = Slot(f"ffn.down.{kind}")
    return names


def _expert_slots(spelling: Experts, moe: MoEConfig) -> dict[str, Slot]:
    names = {spelling.router: Slot("ffn.router.weight")}
    if spelling.fused:
        names[spelling.gate] = Slot("ffn.gate_up", transposed=True)
        names[spelling.down] = Slot("ffn.down", transposed=True)
        return names
    every = slice(None)
    for e in range(moe.experts):
        gate, up = slice(None, moe.expert_ffn), slice(moe.expert_ffn, None)
        names[spelling.gate.format(e=e)] = Slot("ffn.gate_up", (e, every, gate), transposed=True)
        names[spelling.up.format(e=e)] = Slot("ffn.gate_up", (e, every, up), transposed=True)
        names[spelling.down.format(e=e)] = Slot("ffn.down", (e,), transposed=True)
    return names
