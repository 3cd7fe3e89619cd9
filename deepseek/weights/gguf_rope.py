"""Rotary embedding in a GGUF file → ``rope_theta`` and ``RopeScaling``.

    rope.freq_base                              θ
    rope.scaling.type                           none, linear, yarn, longrope; linear where it is not said
                .factor                         or rope.scale_linear, its old name
                .original_context_length
                .attn_factor                    multiplies cosines and sines
                .yarn_ext_factor                1: all of YaRN's blend
                .yarn_attn_factor, .yarn_beta_fast, .yarn_beta_slow
                .yarn_log_multiplier            mscale_all_dim of a config.json; its mscale is taken for 1
    rope_freqs.weight                           what each pair's frequency is divided by

The tensor is how llama.cpp's converter writes the scaling of Llama 3.1 and later, for which there are no keys. Where
its numbers are those that Llama 3.1's rule gives for a training length of 8192, it becomes that rule again (and goes
out to Hugging Face as such); other numbers are kept as they are. ``yarn_attn_factor`` is what the converter takes from
``attention_factor``, and means that here; llama.cpp itself reads it for few architectures.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from deepseek.errors import ConfigError, WeightsError
from deepseek.nn.rope import RopeScaling, inverse_frequencies, yarn_magnitude
from deepseek.weights.gguf_parts import GGUFParts

FREQUENCIES = "rope_freqs.weight"
LONG = ("rope_factors_long.weight", "rope_factors_short.weight")
LLAMA3_LENGTH = 8192  #: positions that Llama 3 was trained on before its scaling


class Keys(Protocol):
    """``gguf_model.Keys``."""

    file: GGUFParts

    def __getitem__(self, key: str) -> Any: ...
    def whole(self, key: str, default: int | None = None) -> int: ...
    def number(self, key: str, default: float | None = None) -> float: ...
    def error(self, key: str, why: str) -> WeightsError: ...


def rope_from_gguf(keys: Keys, head_dim: int) -> tuple[float, RopeScaling]:
    """The rotary base and its scaling. Raises ``WeightsError`` for what we do not know, with the key and its value."""
    theta = keys.number("rope.freq_base", 10_000.0)
    kind = keys["rope.scaling.type"] or "linear"
    if kind == "longrope" or any(name in keys.file.places for name in LONG):
        raise WeightsError(
            f"{keys.file.path} has the rotary scaling 'longrope', which is not supported: it changes all frequencies "
            "when the text passes the original length, so keys already in a cache would be wrong"
        )
    if kind not in ("none", "linear", "yarn"):
        raise keys.error("rope.scaling.type", "we know none, linear and yarn")
    try:
        scaling = _yarn(keys) if kind == "yarn" else _linear(keys, kind)
    except ConfigError as error:
        raise WeightsError(f"{keys.file.path}: {error}") from None
    listed = _listed(keys, head_dim, theta)
    if listed.type != "none" and scaling.type != "none":
        raise WeightsError(
            f"{keys.file.path} has both {FREQUENCIES} and rope.scaling.factor={scaling.factor}; we take one of them"
        )
    return theta, scaling if listed.type == "none" else listed


def _linear(keys: Keys, kind: str) -> RopeScaling:
    if keys["rope.scaling.attn_factor"] not in (None, 1.0):
        raise keys.error("rope.scaling.attn_factor", f"with rope.scaling.type {kind!r} our layers have none")
    factor = 1.0 if kind == "none" else _factor(keys)
    return RopeScaling(type="linear", factor=factor) if factor != 1 else RopeScaling()


def _yarn(keys: Keys) -> RopeScaling:
    if keys["rope.scaling.yarn_ext_factor"] not in (None, 1.0, -1.0):
        raise keys.error("rope.scaling.yarn_ext_factor", "our YaRN blends in full, which is 1")
    factor, attention = _factor(keys), None
    if keys["rope.scaling.yarn_attn_factor"] is not None:
        attention = keys.number("rope.scaling.yarn_attn_factor")
    elif keys["rope.scaling.yarn_log_multiplier"] not in (None, 0.0):
        slope = keys.number("rope.scaling.yarn_log_multiplier")
        attention = yarn_magnitude(factor) / yarn_magnitude(factor, slope)
    if keys["rope.scaling.attn_factor"] not in (None, 1.0):
        usual = yarn_magnitude(factor) if attention is None else attention
        attention = keys.number("rope.scaling.attn_factor") * usual
    return RopeScaling(
        type="yarn",
        factor=factor,
        original_length=keys.whole("rope.scaling.original_context_length", keys.whole("context_length")),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=attention,
    )


def _factor(keys: Keys) -> float:
    """1 where it is not said, or said with 0."""
    key = "rope.scaling.factor" if keys["rope.scaling.factor"] is not None else "rope.scale_linear"
    return 1.0 if keys[key] == 0 else keys.number(key, 1.0)


def _listed(keys: Keys, head_dim: int, theta: float) -> RopeScaling:
    """What ``rope_freqs.weight`` says; no scaling where there is none or where all are 1."""
    if FREQUENCIES not in keys.file.places:
        return RopeScaling()
    found = keys.file.get(FREQUENCIES).float()
    if found.shape != (head_dim // 2,) or not bool(found.isfinite().all()) or not bool((found > 0).all()):
        raise WeightsError(
            f"{keys.file.path}: {FREQUENCIES} is {list(found.shape)}, from {found.min():g} to {found.max():g}; "
            f"heads of {head_dim} need {head_dim // 2} positive numbers"
        )
    if bool((found == 1).all()):
        return RopeScaling()
    if found.max() > 1:
        rule = RopeScaling(type="llama3", factor=float(f"{found.max():.6g}"), original_length=LLAMA3_LENGTH)
        by_rule = inverse_frequencies(head_dim, theta) / inverse_frequencies(head_dim, theta, rule)
        if torch.allclose(found, by_rule, rtol=1e-5, atol=0):
            return rule
    digits = [
        f"{factor:.9g}" for factor in found.tolist()
    ]  # as many as tell an fp32 number from its neighbours
    return RopeScaling(type="factors", factors=tuple(float(d) for d in digits))
