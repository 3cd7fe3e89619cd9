"""The model in a GGUF file: metadata → ``ModelConfig``, tensor names → ``Slot``.

Architectures: ``llama`` (Llama 1 to 3, SmolLM2, Mistral; Mixtral, which has experts), ``smollm3``, ``phi3``,
``qwen2``, ``qwen3``, ``qwen3moe``. What a file says by its tensors (biases, experts, a tied head) is read from their
names.

``llama`` files hold the rows of query and key in another order: their reader turns neighbouring pairs
(2i, 2i+1) of a head, we and Hugging Face turn (i, i + head_dim/2). ``GGUFTensors`` puts the rows back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek.config import replace
from deepseek.errors import ConfigError, WeightsError
from deepseek.models import ModelConfig
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.weights.families import Slot
from deepseek.weights.family_config import NO_BALANCE
from deepseek.weights.gguf_parts import GGUFParts
from deepseek.weights.gguf_rope import FREQUENCIES, rope_from_gguf
from deepseek.weights.hf_files import listed


class Architecture(NamedTuple):
    """How an architecture differs from the plain one.

    Attributes:
        paired: the rows of query and key are in the order of neighbouring pairs.
        experts_in: the key with the inner size of an expert.
        fused: query, key and value share a tensor, and gate and up.
        rope_pattern: of ``ModelConfig``; no key says which layers have no rotary embedding.
    """

    paired: bool = False
    qk_norm: bool = False
    experts_in: str = "expert_feed_forward_length"
    fused: bool = False
    rope_pattern: str = ""


ARCHITECTURES = {
    "llama": Architecture(paired=True, experts_in="feed_forward_length"),
    "smollm3": Architecture(paired=True, rope_pattern="RRRN"),
    "phi3": Architecture(fused=True),
    "qwen2": Architecture(),
    "qwen3": Architecture(qk_norm=True),
    "qwen3moe": Architecture(qk_norm=True),
}
#: Keys whose mere use (any value but these) means what our layers do not do.
PLAIN: dict[str, tuple[Any, ...]] = {
    "rope.scaling.alpha": (1.0, 0.0),
    "rope.dimension_sections": (),
    "rope.freq_base_swa": (),
    "use_parallel_residual": (False,),
    "logit_scale": (1.0, 0.0),
    "embedding_scale": (1.0, 0.0),
    "residual_scale": (1.0, 0.0),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.causal": (True,),
    "attention.sliding_window_pattern": (),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_scale": (1.0, 0.0),
    "expert_gating_func": (1,),
    "expert_group_count": (0, 1),
    "leading_dense_block_count": (0,),
    "moe_every_n_layers": (0, 1),
}


class Keys:
    """The metadata of one architecture; wrong types raise ``WeightsError`` with the key and its value."""

    def __init__(self, file: GGUFParts) -> None:
        self.file = file
        name = file.metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise WeightsError(
                f"{file.path}: general.architecture {name!r} is not one we can convert; we have: {known}"
            )
        self.name = str(name)

    def __getitem__(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.name}.{key}")

    def error(self, key: str, why: str) -> WeightsError:
        return WeightsError(f"{self.file.path}: {self.name}.{key} is {self[key]!r}; {why}")

    def whole(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """A positive number; an array that says the same for every layer counts as one."""
        value = default if self[key] is None else self[key]
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if isinstance(value, list):
            raise self.error(key, "our layers are all alike")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.error(key, f"it must be a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = default if self[key] is None else self[key]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.error(key, "it must be a positive number")
        # Written as fp32; the number that was meant has few digits: 1e-5, not 9.999999747378752e-06.
        return float(f"{value:.7g}")


def gguf_config(file: GGUFParts) -> ModelConfig:
    """The shape of the model in ``file``.

    Raises:
        WeightsError: an architecture, or a key with a value, that our layers cannot express.
    """
    keys = Keys(file)
    _refuse_unsupported(keys)
    places, layers = file.places, keys.whole("block_count", most=10_000)
    if "token_embd.weight" not in places:
        raise WeightsError(f"{file.path} has no tensor token_embd.weight: it holds no whole model")
    kinds = "".join("E" if f"blk.{i}.ffn_gate_inp.weight" in places else "D" for i in range(layers))
    window = keys["attention.sliding_window"]
    try:
        attention = _attention(keys)
        return ModelConfig(
            vocab_size=places["token_embd.weight"].shape[0],
            hidden=keys.whole("embedding_length"),
            layers=layers,
            ffn=keys.whole("feed_forward_length"),
            pattern="L" if window else "F",
            ffn_pattern=kinds if len(set(kinds)) > 1 else "",
            rope_pattern=ARCHITECTURES[keys.name].rope_pattern if layers > 3 else "",
            max_length=max(keys.whole("context_length"), attention.rope_scaling.reach),
            norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
            tie_embeddings="output.weight" not in places,
            ffn_bias="blk.0.ffn_up.bias" in places,
            attention=attention,
            moe=_moe(keys) if "E" in kinds else MoEConfig(),
        )
    except ConfigError as error:
        raise WeightsError(f"{file.path}: {error}") from None


def _refuse_unsupported(keys: Keys) -> None:
    if keys.name == "phi3" and keys["attention.sliding_window"] is None:
        raise keys.error(
            "attention.sliding_window",
            "files of phi3 from before it was written leave the window open: take a newer one",
        )
    for key, plain in PLAIN.items():
        if keys[key] is not None and keys[key] not in plain:
            raise keys.error(key, "our layers cannot express that")


def _attention(keys: Keys) -> AttentionConfig:
    heads, hidden = keys.whole("attention.head_count"), keys.whole("embedding_length")
    given = keys["attention.key_length"]
    if given is None and hidden % heads:
        raise keys.error("attention.head_count", f"it does not divide embedding_length={hidden}")
    size = hidden // heads if given is None else keys.whole("attention.key_length")
    for key, why in (
        ("attention.value_length", "values as wide as keys"),
        ("rope.dimension_count", "RoPE on whole heads"),
    ):
        if keys[key] is not None and keys.whole(key) != size:
            raise keys.error(key, f"heads are {size} wide, and our layers have {why}")
    window, places = keys["attention.sliding_window"], keys.file.places
    theta, scaling = rope_from_gguf(keys, size)
    return AttentionConfig(
        heads=heads,
        kv_heads=keys.whole("attention.head_count_kv", heads),
        head_dim=size,
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=ARCHITECTURES[keys.name].qk_norm,
        bias="blk.0.attn_q.bias" in places,
        output_bias="blk.0.attn_output.bias" in places,
        window=keys.whole("attention.sliding_window") if window else AttentionConfig().window,
    )


def _moe(keys: Keys) -> MoEConfig:
    return replace(
        NO_BALANCE,
        experts=keys.whole("expert_count", most=10_000),
        top_k=keys.whole("expert_used_count"),
        expert_ffn=keys.whole(ARCHITECTURES[keys.name].experts_in),
        normalise_gates=keys["expert_weights_norm"] is not False,  # every reader of these files does
    )


def gguf_slots(config: ModelConfig, present: set[str]) -> dict[str, Slot]:
    """Every tensor of a file and which part of ours it is; ``present`` tells how experts are spelled."""
    names = {"token_embd.weight": Slot("embedding.weight"), "output_norm.weight": Slot("norm.weight")}
    if not config.tie_embeddings:
        names["output.weight"] = Slot("head.weight")
    for i, kind in enumerate(config.ffn_kinds):
        layer = _attention_slots(config.attention)
        if kind == "D":
            layer |= _dense_slots(config)
        else:
            layer |= _expert_slots(config.moe, apart=f"blk.{i}.ffn_gate.0.weight" in present)
        for name, slot in layer.items():
            names[f"blk.{i}.{name}"] = slot._replace(name=f"blocks.{i}.{slot.name}")
    return names


def _attention_slots(attention: AttentionConfig) -> dict[str, Slot]:
    names = {
        "attn_norm.weight": Slot("attention_norm.weight"),
        "ffn_norm.weight": Slot("ffn_norm.weight"),
        "attn_output.weight": Slot("attention.output.weight"),
    }
    for letter, ours in (("q", "query"), ("k", "key"), ("v", "value")):
        names[f"attn_{letter}.weight"] = Slot(f"attention.{ours}.weight")
        if attention.bias:
            names[f"attn_{letter}.bias"] = Slot(f"attention.{ours}.bias")
        if attention.qk_norm and letter != "v":
            names[f"attn_{letter}_norm.weight"] = Slot(f"attention.{ours}_norm.weight")
    if attention.output_bias:
        names["attn_output.bias"] = Slot("attention.output.bias")
    return names


def _dense_slots(config: ModelConfig) -> dict[str, Slot]:
    names = {}
    for kind in ("weight", "bias") if config.ffn_bias else ("weight",):
        names[f"ffn_gate.{kind}"] = Slot(f"ffn.gate_up.{kind}", (slice(None, config.ffn),))
        names[f"ffn_up.{kind}"] = Slot(f"ffn.gate_up.{kind}", (slice(config.ffn, None),))
        names[f"ffn_down.{kind}"] = Slot(f"ffn.down.{kind}")
    return names


def _expert_slots(moe: MoEConfig, apart: bool) -> dict[str, Slot]:
    """All experts in one tensor; ``apart``: each in its own, as files of 2023 have them."""
    every, gate, up = slice(None), slice(None, moe.expert_ffn), slice(moe.expert_ffn, None)
    names = {"ffn_gate_inp.weight": Slot("ffn.router.weight")}
    for suffix, e in [(f".{e}", e) for e in range(moe.experts)] if apart else [("_exps", every)]:
        names[f"ffn_gate{suffix}.weight"] = Slot("ffn.gate_up", (e, every, gate), transposed=True)
        names[f"ffn_up{suffix}.weight"] = Slot("ffn.gate_up", (e, every, up), transposed=True)
        names[f"ffn_down{suffix}.weight"] = Slot("ffn.down", (e,), transposed=True)
    return names


class GGUFTensors:
    """The tensors of a model with their rows in our order; as ``hf_files.TensorFiles``, a context manager.

    Attributes:
        fused: query, key and value share a tensor, and gate and up: ``unfused`` takes them apart.
    """

    copies = True

    def __init__(self, path: Path) -> None:
        self.file = GGUFParts(path)
        try:
            self.config = gguf_config(self.file)
        except BaseException:
            self.file.__exit__()
            raise
        architecture = ARCHITECTURES[self.file.metadata["general.architecture"]]
        self._paired, self.fused = architecture.paired, architecture.fused

    def __enter__(self) -> GGUFTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.__exit__()

    @property
    def names(self) -> list[str]:
        return [name for name in self.file.names if name != FREQUENCIES]

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of a tensor as ``get`` gives it."""
        place = self.file.places[name]
        return place.format.dtype, place.shape

    def get(self, name: str) -> Tensor:
        """One tensor, a copy."""
        tensor = self.file.get(name)
        attention = self.config.attention
        heads = {"attn_q": attention.heads, "attn_k": attention.kv_heads}.get(
            name.split(".")[-2] if name.count(".") > 1 else ""
        )
        if not self._paired or heads is None or tensor.shape[0] != heads * attention.head_dim:
            return tensor
        return unpair(tensor, heads)


def checked_slots(config: ModelConfig, names: list[str], where: str) -> dict[str, Slot]:
    """Where each tensor belongs. Raises ``WeightsError`` when some are missing or left over."""
    held = set(names)
    found = gguf_slots(config, held)
    missing, extra = sorted(found.keys() - held), sorted(held - found.keys())
    if missing or extra:
        parts = [f"{len(missing)} missing ({listed(missing)})"] if missing else []
        parts += [f"{len(extra)} without a place ({listed(extra)})"] if extra else []
        raise WeightsError(f"{where}: tensors and metadata do not match: {'; '.join(parts)}")
    return found


def unpair(rows: Tensor, heads: int) -> Tensor:
    """Rows in the order of pairs (2i, 2i+1) within each head, in the order of halves (i, i + size/2)."""
    halves = rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2)
    return halves.reshape(rows.shape)
