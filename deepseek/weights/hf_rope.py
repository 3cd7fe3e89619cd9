"""Rotary embedding in a ``config.json`` ↔ ``rope_theta`` and ``RopeScaling``.

``transformers`` 5 writes one table, ``rope_parameters``; 4 wrote ``rope_theta`` and, for scaled models, a table
``rope_scaling`` whose type was first called ``type``. We read both as version 5 does, where ``rope_scaling`` wins, and
write both.
"""

from __future__ import annotations

from typing import Any, Protocol

from deepseek.errors import ConfigError, WeightsError
from deepseek.nn.rope import RopeScaling, yarn_magnitude

#: Keys of a table by its type, beyond ``KNOWN``.
KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
TYPES: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor",
        "mscale", "mscale_all_dim",
    },
}  # fmt: skip
#: Types that are known and refused, and what to do.
REFUSED = {
    "dynamic": "it changes all frequencies whenever the text grows, so keys already in a cache would be wrong; without "
    "it the model is exact up to max_position_embeddings={length}: set it to null, or choose yarn",
    "longrope": "it changes all frequencies when the text passes the original length, so keys already in a cache would "
    "be wrong",
}


class Keys(Protocol):
    """``family_config.Keys``."""

    def __getitem__(self, key: str) -> Any: ...
    def whole(self, key: str) -> int: ...
    def number(self, key: str) -> float: ...


def rope_from_hf(keys: Keys) -> tuple[float, RopeScaling]:
    """The rotary base and its scaling. Raises ``WeightsError`` for a type or key that we do not know."""
    theta = keys.number("rope_theta")
    name = "rope_scaling" if keys["rope_scaling"] else "rope_parameters"
    if not keys[name]:
        return theta, RopeScaling()
    table = _Table(name, keys[name])
    theta = table.number("rope_theta", theta)
    kind = table.kind(keys)
    if kind == "default":
        return theta, RopeScaling()
    try:
        return theta, _scaling(kind, table, keys)
    except ConfigError as error:
        raise WeightsError(f"config.json: {name}: {error}") from None


def rope_to_hf(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    """The keys of ``config.json`` for anything but ``factors``."""
    if scaling.type == "none":
        return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}, "rope_theta": theta}
    table: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type != "linear":
        table["original_max_position_embeddings"] = scaling.original_length
    if scaling.type == "llama3":
        table |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.type == "yarn":
        table |= {
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        if scaling.attention_factor is not None:
            table["attention_factor"] = scaling.attention_factor
    return {"rope_parameters": {"rope_theta": theta, **table}, "rope_theta": theta, "rope_scaling": table}


def _scaling(kind: str, table: _Table, keys: Keys) -> RopeScaling:
    if kind == "linear":
        return RopeScaling(type="linear", factor=table.number("factor"))
    original = _original_length(table, keys)
    if kind == "llama3":
        return RopeScaling(
            type="llama3",
            factor=table.number("factor"),
            original_length=original,
            low_freq_factor=table.number("low_freq_factor"),
            high_freq_factor=table.number("high_freq_factor"),
        )
    ratio = keys.whole("max_position_embeddings") / original if "factor" in table.values else None
    factor = table.number("factor", ratio)
    given = table.number("attention_factor") if table.values.get("attention_factor") is not None else None
    if given is None and table.values.get("mscale") and table.values.get("mscale_all_dim"):
        slopes = table.number("mscale"), table.number("mscale_all_dim")
        given = yarn_magnitude(factor, slopes[0]) / yarn_magnitude(factor, slopes[1])
    return RopeScaling(
        type="yarn",
        factor=factor,
        original_length=original,
        beta_fast=table.number("beta_fast", 32.0),
        beta_slow=table.number("beta_slow", 1.0),
        truncate=table.flag("truncate", True),
        attention_factor=given,
    )


def _original_length(table: _Table, keys: Keys) -> int:
    """Beside the table first, then in it, else the whole length."""
    if keys["original_max_position_embeddings"] is not None:
        return keys.whole("original_max_position_embeddings")
    return table.whole("original_max_position_embeddings", keys.whole("max_position_embeddings"))


class _Table:
    """``rope_parameters`` or ``rope_scaling``; wrong types raise ``WeightsError`` with the key and its value."""

    def __init__(self, name: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise WeightsError(f"config.json: {name} is {values!r}; it must be a table")
        self.name, self.values = name, values

    def kind(self, keys: Keys) -> str:
        """The type, one that we compute and with keys that it has."""
        kind = self.values.get("rope_type", self.values.get("type", "default"))
        if not isinstance(kind, str) or kind not in TYPES:
            named = kind if isinstance(kind, str) else ""
            why = REFUSED.get({"su": "longrope"}.get(named, named), f"we know {', '.join(TYPES)}")
            why = why.format(length=keys["max_position_embeddings"])
            raise WeightsError(f"config.json: {self.name} of the type {kind!r} is not supported: {why}")
        if extra := sorted(set(self.values) - KNOWN - TYPES[kind]):
            raise WeightsError(
                f"config.json: {self.name} {self.values!r} is not supported: the type {kind!r} has no "
                f"{', '.join(map(repr, extra))}"
            )
        if self.values.get("partial_rotary_factor") not in (None, 1):
            part = self.values["partial_rotary_factor"]
            raise WeightsError(
                f"config.json: {self.name}.partial_rotary_factor {part!r} is not supported; "
                "our layers rotate whole heads"
            )
        return kind

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise WeightsError(f"config.json: {self.name}.{key} is {value!r}; it must be a positive number")
        return float(value)

    def whole(self, key: str, default: int) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise WeightsError(
                f"config.json: {self.name}.{key} is {value!r}; it must be a positive whole number"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise WeightsError(f"config.json: {self.name}.{key} is {value!r}; it must be true or false")
        return value
