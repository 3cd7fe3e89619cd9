"""Model shapes. A preset is a function that returns a ``ModelConfig``; keyword arguments change it.

``pattern`` gives each layer its attention, one letter a layer, repeated to the depth: ``F`` full, ``L`` local
window, ``H`` hybrid (window + pooled blocks + gate). ``"LLLF"`` makes every fourth layer full: close to full
attention everywhere for less than half of its attention FLOPs (LOG.md). ``ffn_pattern`` does the same for the
feed-forward: ``D`` dense, ``E`` experts; ``rope_pattern`` takes the rotary embedding from some full layers (``N``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepseek.config import configclass, from_dict, replace, to_dict
from deepseek.errors import ConfigError, did_you_mean
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig

MOST_LAYERS = 10_000  #: more is a typing error


@configclass
class ModelConfig:
    """The shape of a decoder-only transformer."""

    vocab_size: int = 4096
    hidden: int = 256
    layers: int = 4
    ffn: int = 704  # inner size of a dense feed-forward layer
    pattern: str = "LLLF"
    ffn_pattern: str = ""  # empty: 'E' when there are experts, else 'D'
    rope_pattern: str = (
        ""  # 'R' rotary embedding, 'N' none (full layers only); empty: as attention.full_rope says
    )
    max_length: int = 2048  # positions the model is meant for; generation stops there
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    ffn_bias: bool = False
    init_std: float = 0.02
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()

    def check(self) -> None:
        for name, letters in (("pattern", "FLH"), ("ffn_pattern", "DE"), ("rope_pattern", "RN")):
            value = getattr(self, name)
            wrong = sorted(set(value) - set(letters))
            if wrong or (name == "pattern" and not value):
                raise ConfigError(f"{name}={value!r} may hold the letters {', '.join(letters)} only")
        if "E" in self.ffn_pattern and not self.moe.experts:
            raise ConfigError(f"ffn_pattern={self.ffn_pattern!r} asks for experts, but moe.experts is 0")
        for name in ("vocab_size", "hidden", "layers", "max_length", "ffn"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.layers > MOST_LAYERS:
            raise ConfigError(f"layers={self.layers} is more than {MOST_LAYERS}")
        if self.norm_eps <= 0 or self.init_std < 0:
            raise ConfigError(
                f"norm_eps={self.norm_eps} must be positive and init_std={self.init_std} not negative"
            )
        self._check_rope()

    def _check_rope(self) -> None:
        if self.rope_pattern and not self.attention.full_rope:
            raise ConfigError(
                f"rope_pattern={self.rope_pattern!r} and attention.full_rope=false both say which layers have rotary "
                "embedding; leave one of them out"
            )
        for index, (kind, rope) in enumerate(zip(self.kinds, self.rope_kinds)):
            if kind != "F" and rope == "N":
                raise ConfigError(
                    f"rope_pattern={self.rope_pattern!r} gives layer {index} no rotary embedding, but pattern="
                    f"{self.pattern!r} makes it {kind!r}: only full layers ('F') can do without"
                )

    @property
    def kinds(self) -> str:
        """The attention letter of every layer."""
        return (self.pattern * self.layers)[: self.layers]

    @property
    def ffn_kinds(self) -> str:
        """The feed-forward letter of every layer."""
        pattern = self.ffn_pattern or ("E" if self.moe.experts else "D")
        return (pattern * self.layers)[: self.layers]

    @property
    def rope_kinds(self) -> str:
        """'R' for every layer with rotary embedding, 'N' for every layer without."""
        if not self.rope_pattern:
            return "".join(
                "N" if kind == "F" and not self.attention.full_rope else "R" for kind in self.kinds
            )
        return (self.rope_pattern * self.layers)[: self.layers]


def tiny(**changes: Any) -> ModelConfig:
    """What the quickstart trains: 3 layers, hybrid attention, 16 experts, top-2; minutes on two cores.

    Small and fast beats large and slow when the budget is two minutes; LOG.md has the study behind each number.
    """
    base = ModelConfig(
        vocab_size=2048, hidden=128, layers=3, ffn=352, pattern="LLH", max_length=1024, tie_embeddings=False,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=32, qk_norm=True, window=32, stride=16),
        moe=MoEConfig(experts=16, top_k=2, expert_ffn=64),
    )  # fmt: skip
    return replace(base, **changes)


def small(**changes: Any) -> ModelConfig:
    """About 165M parameters, 23M active: an evening on one consumer GPU."""
    base = ModelConfig(
        vocab_size=16_384, hidden=512, layers=8, ffn=1408, pattern="LLLF", max_length=4096,
        attention=AttentionConfig(heads=8, kv_heads=2, head_dim=64, qk_norm=True, window=128),
        moe=MoEConfig(experts=32, top_k=2, expert_ffn=384),
    )  # fmt: skip
    return replace(base, **changes)


def dense_856m(**changes: Any) -> ModelConfig:
    """The dense shape of the speed targets: 856M parameters, full attention."""
    base = ModelConfig(
        vocab_size=32_768, hidden=2048, layers=16, ffn=5632, pattern="F", max_length=4096,
        tie_embeddings=False,
        attention=AttentionConfig(heads=16, kv_heads=4, head_dim=128, rope_theta=10_000.0),
    )  # fmt: skip
    return replace(base, **changes)


def moe_64x2(**changes: Any) -> ModelConfig:
    """The sparse shape of the speed targets: 64 experts, top-2; 2.53B parameters, 152M active."""
    base = ModelConfig(
        vocab_size=32_768, hidden=1024, layers=16, pattern="F", max_length=4096, tie_embeddings=False,
        attention=AttentionConfig(heads=16, kv_heads=4, head_dim=64),
        moe=MoEConfig(experts=64, top_k=2, expert_ffn=768),
    )  # fmt: skip
    return replace(base, **changes)


def llama(**changes: Any) -> ModelConfig:
    """The shape of Llama 3.1 8B."""
    base = ModelConfig(
        vocab_size=128_256, hidden=4096, layers=32, ffn=14_336, pattern="F", max_length=8192,
        norm_eps=1e-5, tie_embeddings=False,
        attention=AttentionConfig(heads=32, kv_heads=8, head_dim=128, rope_theta=500_000.0),
    )  # fmt: skip
    return replace(base, **changes)


def qwen3(**changes: Any) -> ModelConfig:
    """The shape of Qwen3 0.6B."""
    base = ModelConfig(
        vocab_size=151_936, hidden=1024, layers=28, ffn=3072, pattern="F", max_length=40_960,
        attention=AttentionConfig(heads=16, kv_heads=8, head_dim=128, rope_theta=1e6, qk_norm=True),
    )  # fmt: skip
    return replace(base, **changes)


def qwen3_moe(**changes: Any) -> ModelConfig:
    """The shape of Qwen3 30B-A3B: 128 experts, top-8."""
    base = ModelConfig(
        vocab_size=151_936, hidden=2048, layers=48, ffn=6144, pattern="F", max_length=40_960,
        tie_embeddings=False,
        attention=AttentionConfig(heads=32, kv_heads=4, head_dim=128, rope_theta=1e6, qk_norm=True),
        moe=MoEConfig(experts=128, top_k=8, expert_ffn=768),
    )  # fmt: skip
    return replace(base, **changes)


def mixtral(**changes: Any) -> ModelConfig:
    """The shape of Mixtral 8x7B: 8 experts, top-2."""
    base = ModelConfig(
        vocab_size=32_000, hidden=4096, layers=32, ffn=14_336, pattern="F", max_length=32_768,
        norm_eps=1e-5, tie_embeddings=False,
        attention=AttentionConfig(heads=32, kv_heads=8, head_dim=128, rope_theta=1e6),
        moe=MoEConfig(experts=8, top_k=2, expert_ffn=14_336),
    )  # fmt: skip
    return replace(base, **changes)


PRESETS: dict[str, Callable[..., ModelConfig]] = {
    f.__name__: f for f in (tiny, small, dense_856m, moe_64x2, llama, qwen3, qwen3_moe, mixtral)
}


def model_config(values: dict[str, Any], where: str = "model") -> ModelConfig:
    """A ``ModelConfig`` from a TOML table, which may start from ``preset = "tiny"`` and change parts."""
    values = dict(values)
    name = values.pop("preset", None)
    if name is None:
        return from_dict(ModelConfig, values, where)
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(
            f"unknown {where}.preset {name!r}{did_you_mean(str(name), PRESETS)}; one of {', '.join(PRESETS)}"
        )
    base = to_dict(PRESETS[name]())
    for key, value in values.items():
        base[key] = (
            {**base[key], **value} if isinstance(base.get(key), dict) and isinstance(value, dict) else value
        )
    return from_dict(ModelConfig, base, where)
