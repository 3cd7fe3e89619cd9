"""``config.json`` of a Hugging Face model family ↔ ``ModelConfig``.

Reading takes what ``transformers`` would take, defaults included, and refuses what our layers cannot express,
with the key and the value. Writing first asks ``obstacle``: a family is used only where it says exactly what
the model does.
"""

from __future__ import annotations

from typing import Any

from deepseek.config import replace
from deepseek.errors import ConfigError, WeightsError
from deepseek.models import ModelConfig
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.weights.families import COMMON, FAMILIES, Family
from deepseek.weights.hf_rope import rope_from_hf, rope_to_hf

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LIMITS = dict.fromkeys(("num_hidden_layers", "num_experts", "num_local_experts"), 10_000)
SLIDING, FULL = "sliding_attention", "full_attention"
#: A foreign expert layer has none of our balancing: trained on here, it computes what it did elsewhere.
NO_BALANCE = MoEConfig(entropy_weight=0.0, bias_rate=0.0, token_floor=0.0, default_decay=0.0)


class Keys:
    """The keys of one ``config.json`` with a family's defaults; wrong types raise ``WeightsError``."""

    def __init__(self, values: dict[str, Any], family: Family) -> None:
        self._given = values
        self._values = {**COMMON, **family.defaults, **values}
        missing = [key for key in REQUIRED if key not in values]
        if missing:
            raise WeightsError(f"config.json of model_type {family.model_type!r} lacks {', '.join(missing)}")

    def __getitem__(self, key: str) -> Any:
        return self._values.get(key)

    def given(self, key: str) -> bool:
        """Whether the file itself has the key."""
        return self._given.get(key) is not None

    def whole(self, key: str) -> int:
        value = self[key]
        most = LIMITS.get(key, 2**31 - 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise WeightsError(f"config.json: {key} is {value!r}; it must be a whole number from 1 to {most}")
        return value

    def number(self, key: str) -> float:
        value = self[key]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise WeightsError(f"config.json: {key} is {value!r}; it must be a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self[key]
        if value is not None and not isinstance(value, bool):
            raise WeightsError(f"config.json: {key} is {value!r}; it must be true or false")
        return bool(value)


def from_hf(values: dict[str, Any], family: Family) -> ModelConfig:
    """The shape ``config.json`` describes. Raises ``WeightsError`` for what our layers do not do."""
    keys = Keys(values, family)
    _refuse_unsupported(values, keys)
    kinds = _kinds(keys, family)
    try:
        attention = _attention(keys, family, kinds)
        return ModelConfig(
            vocab_size=keys.whole("vocab_size"),
            hidden=keys.whole("hidden_size"),
            layers=keys.whole("num_hidden_layers"),
            ffn=keys.whole("intermediate_size"),
            pattern=kinds if len(set(kinds)) > 1 else kinds[0],
            ffn_pattern=_ffn_kinds(keys, family),
            rope_pattern=_rope_pattern(keys, family),
            # YaRN is switched on by a rope_scaling alone, with max_position_embeddings left as it was
            max_length=max(keys.whole("max_position_embeddings"), attention.rope_scaling.reach),
            norm_eps=keys.number("rms_norm_eps"),
            tie_embeddings=keys.flag("tie_word_embeddings"),
            ffn_bias=family.ffn_bias and keys.flag("mlp_bias"),
            init_std=keys.number("initializer_range"),
            attention=attention,
            moe=_moe(keys, family),
        )
    except ConfigError as error:
        raise WeightsError(f"config.json: {error}") from None


def _refuse_unsupported(values: dict[str, Any], keys: Keys) -> None:
    if keys["hidden_act"] not in ("silu", "swish"):
        raise WeightsError(
            f"config.json: hidden_act {keys['hidden_act']!r} is not supported; our layers use 'silu'"
        )
    if values.get("quantization_config"):
        method = values["quantization_config"]
        raise WeightsError(
            f"config.json: quantization_config {method!r} is not supported; dequantise the weights first"
        )
    named = values.get("architectures") or []
    if not isinstance(named, list) or (named and not any(str(a).endswith("ForCausalLM") for a in named)):
        raise WeightsError(
            f"config.json: architectures {named!r} is not a causal language model (…ForCausalLM)"
        )
    if values.get("is_causal") not in (None, True):
        raise WeightsError(
            f"config.json: is_causal {values['is_causal']!r} is not supported; our layers see earlier positions only"
        )
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise WeightsError(
            f"config.json: partial_rotary_factor {values['partial_rotary_factor']!r} is not supported; "
            "our layers rotate whole heads"
        )


def _kinds(keys: Keys, family: Family) -> str:
    """The attention letter of every layer: 'F', or 'L' where a sliding window is on."""
    layers = keys.whole("num_hidden_layers")
    window = keys["sliding_window"]
    if "use_sliding_window" in family.defaults and not keys.flag("use_sliding_window"):
        window = None
    types = keys["layer_types"] if family.window == "layers" else None
    if types is not None:
        if (
            not isinstance(types, list)
            or len(types) != layers
            or any(t not in (SLIDING, FULL) for t in types)
        ):
            raise WeightsError(
                f"config.json: layer_types {types!r} must name {SLIDING!r} or {FULL!r} for {layers} layers"
            )
        if SLIDING in types and window is None:
            raise WeightsError(f"config.json: layer_types asks for {SLIDING!r}, but sliding_window is off")
        return "".join("L" if kind == SLIDING else "F" for kind in types)
    if window is None or family.window == "none":
        return "F" * layers
    if family.nope:  # windows where there is no rotary embedding, which our window layers have
        return "".join("L" if rope == "N" else "F" for rope in _rope_kinds(keys, layers))
    counted = "max_window_layers" in family.defaults and keys["max_window_layers"]
    first = keys.whole("max_window_layers") if counted else 0
    return "".join("L" if i >= first else "F" for i in range(layers))


def _rope_kinds(keys: Keys, layers: int) -> str:
    """'R' or 'N' for every layer, from ``no_rope_layers``, in which 1 means that there *is* rotary embedding."""
    listed = keys["no_rope_layers"]
    if listed is None:
        every = keys.whole("no_rope_layer_interval")
        return "".join("R" if (i + 1) % every else "N" for i in range(layers))
    if not isinstance(listed, list) or len(listed) < layers or any(n not in (0, 1) for n in listed):
        raise WeightsError(
            f"config.json: no_rope_layers {listed!r} must hold 0 or 1 for each of {layers} layers"
        )
    return "".join("R" if n else "N" for n in listed[:layers])


def _rope_pattern(keys: Keys, family: Family) -> str:
    """The shortest pattern that gives every layer its letter; empty where all have rotary embedding."""
    if not family.nope:
        return ""
    layers = keys.whole("num_hidden_layers")
    kinds = _rope_kinds(keys, layers)
    if "N" not in kinds:
        return ""
    return next(kinds[:n] for n in range(1, layers + 1) if (kinds[:n] * layers)[:layers] == kinds)


def _attention(keys: Keys, family: Family, kinds: str) -> AttentionConfig:
    heads = keys.whole("num_attention_heads")
    hidden = keys.whole("hidden_size")
    if keys["head_dim"] is None and hidden % heads:
        raise WeightsError(f"config.json: num_attention_heads={heads} does not divide hidden_size={hidden}")
    biased = family.bias == "option" and keys.flag("attention_bias")
    theta, scaling = rope_from_hf(keys)
    if scaling.type != "none" and family.model_type == "phi3":
        raise WeightsError(
            f"config.json: phi3 with rotary scaling {scaling.type!r} is not supported: it means 'longrope' there"
        )
    made = AttentionConfig(
        heads=heads,
        kv_heads=heads if keys["num_key_value_heads"] is None else keys.whole("num_key_value_heads"),
        head_dim=hidden // heads if keys["head_dim"] is None else keys.whole("head_dim"),
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=family.qk_norm,
        bias=biased or family.bias == "qkv",
        output_bias=biased,
        window=keys.whole("sliding_window") if "L" in kinds else AttentionConfig().window,
    )
    return made


def _moe(keys: Keys, family: Family) -> MoEConfig:
    """The expert layer."""
    if not family.experts:
        return MoEConfig()
    qwen = family.model_type == "qwen3_moe"
    return replace(
        NO_BALANCE,
        experts=_expert_count(keys, family),
        top_k=keys.whole("num_experts_per_tok"),
        expert_ffn=keys.whole("moe_intermediate_size" if qwen else "intermediate_size"),
        normalise_gates=keys.flag("norm_topk_prob") if qwen else True,
    )


def _expert_count(keys: Keys, family: Family) -> int:
    """The number of experts: ``transformers`` writes either key for either family."""
    names = ("num_experts", "num_local_experts")
    given = {name: keys.whole(name) for name in names if keys.given(name)}
    if len(set(given.values())) > 1:
        raise WeightsError(f"config.json: num_experts and num_local_experts disagree: {given}")
    return next(iter(given.values())) if given else keys.whole(next(n for n in names if n in family.defaults))


def _ffn_kinds(keys: Keys, family: Family) -> str:
    """'E' and 'D' by layer for Qwen3-MoE, empty (derived) where all layers are alike."""
    if family.model_type != "qwen3_moe":
        return ""
    dense, step = keys["mlp_only_layers"] or [], keys.whole("decoder_sparse_step")
    if not isinstance(dense, list):
        raise WeightsError(f"config.json: mlp_only_layers is {dense!r}; it must be a list of layer numbers")
    layers = range(keys.whole("num_hidden_layers"))
    kinds = "".join("D" if i in dense or (i + 1) % step else "E" for i in layers)
    return kinds if "D" in kinds else ""


def to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The ``config.json`` of a family for a shape to which it has no ``obstacle``."""
    a, m = config.attention, config.moe
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **rope_to_hf(a.rope_theta, a.rope_scaling),
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if family.bias == "option":
        values["attention_bias"] = a.bias
    if family.ffn_bias:
        values["mlp_bias"] = config.ffn_bias
    values |= _window_keys(config, family)
    if family.nope:
        values["no_rope_layers"] = [int(rope == "R") for rope in config.rope_kinds]
    if family.experts:
        values["num_experts_per_tok"] = m.top_k
        if family.model_type == "mixtral":
            values |= {"num_local_experts": m.experts, "intermediate_size": m.expert_ffn}
        else:
            dense = [i for i, kind in enumerate(config.ffn_kinds) if kind == "D"]
            values |= {"num_experts": m.experts, "moe_intermediate_size": m.expert_ffn}
            values |= {
                "norm_topk_prob": m.normalise_gates,
                "decoder_sparse_step": 1,
                "mlp_only_layers": dense,
            }
    return values


def _window_keys(config: ModelConfig, family: Family) -> dict[str, Any]:
    if family.window == "none":
        return {}
    on = "L" in config.kinds
    values: dict[str, Any] = {"sliding_window": config.attention.window if on else None}
    if "use_sliding_window" in family.defaults:
        values["use_sliding_window"] = on
    if "max_window_layers" in family.defaults:
        values["max_window_layers"] = config.layers if not on else config.kinds.index("L")
    if family.window == "layers":
        values["layer_types"] = [SLIDING if kind == "L" else FULL for kind in config.kinds]
    return values


def obstacle(config: ModelConfig, family: Family) -> str:
    """Why ``family`` cannot say exactly what ``config`` does; empty when it can."""
    a, kinds = config.attention, set(config.kinds)
    if family.fused:
        return f"{family.model_type} is read, not written"
    if "H" in kinds:
        return "it has hybrid attention"
    if "L" in kinds and (family.window == "none" or (family.window == "all" and "F" in kinds)):
        return f"{family.model_type} has no sliding window in {'some' if 'F' in kinds else 'all'} layers"
    if family.model_type == "ministral" and "L" not in kinds:
        return "ministral wants a sliding window in some layer"
    if "N" in config.rope_kinds and not family.nope:
        return f"{family.model_type} has rotary embedding in every layer"
    if a.rope_scaling.type == "factors":
        return "its rotary frequencies are divided by a list of factors"
    if a.qk_norm != family.qk_norm:
        return f"{family.model_type} has {'no ' if a.qk_norm else ''}QK-norm"
    biases = {"none": [(False, False)], "qkv": [(True, False)], "option": [(False, False), (True, True)]}
    if (a.bias, a.output_bias) not in biases[family.bias]:
        return f"{family.model_type} has no attention biases like bias={a.bias}, output_bias={a.output_bias}"
    if config.ffn_bias and "D" in config.ffn_kinds and not family.ffn_bias:
        return f"{family.model_type} has no feed-forward bias"
    if family.model_type == "llama" and config.hidden % a.heads:
        return f"llama wants heads to divide hidden={config.hidden}, not heads={a.heads}"
    return _expert_obstacle(config, family)


def _expert_obstacle(config: ModelConfig, family: Family) -> str:
    if "E" not in config.ffn_kinds:
        return f"{family.model_type} has experts" if family.experts else ""
    if not family.experts:
        return f"{family.model_type} has no experts"
    if config.moe.shared_experts:
        return f"{family.model_type} has no shared experts"
    if family.model_type == "mixtral" and "D" in config.ffn_kinds:
        return "mixtral has experts in every layer"
    if family.model_type == "mixtral" and not config.moe.normalise_gates:
        return "mixtral normalises the gates"
    return ""


def matching_family(config: ModelConfig) -> tuple[Family | None, str]:
    """The first family that says exactly what ``config`` does, or ``None`` and why each does not."""
    reasons = []
    for family in FAMILIES.values():
        if family.fused:
            continue
        reason = obstacle(config, family)
        if not reason:
            return family, ""
        if reason not in reasons:
            reasons.append(reason)
    return None, "; ".join(reasons)
