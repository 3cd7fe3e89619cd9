"""What a JSON value must look like: one description that both checks a request and writes its JSON Schema.

``shape.read(value, at)`` gives the value as the handlers use it, or raises an ``ApiError`` whose ``param`` is the path
of what is wrong. ``shape.schema()`` gives the same rule as JSON Schema (draft 2020-12), for ``/openapi.json``. Nothing
is coerced: ``true`` is no number and ``"1"`` is no integer; ``1.0`` is the integer 1, as JSON Schema says.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepseek.errors import did_you_mean
from deepseek.serve.server.errors import ApiError, shown

DEEPEST = 48  #: nested lists and objects in a free-form value


class Shape(ABC):
    """One kind of JSON value."""

    @abstractmethod
    def read(self, value: Any, at: str) -> Any:
        """``value`` as the handlers use it. Raises ``ApiError``."""

    @abstractmethod
    def schema(self) -> dict[str, Any]:
        """The rule as JSON Schema."""


def wrong(at: str, expected: str, value: Any) -> ApiError:
    return ApiError(f"{at} must be {expected}, not {shown(value)}", param=at)


@dataclass(frozen=True)
class Text(Shape):
    shortest: int = 0
    longest: int | None = None
    choices: tuple[str, ...] = ()

    def read(self, value: Any, at: str) -> str:
        if not isinstance(value, str):
            raise wrong(at, "a string", value)
        if self.choices and value not in self.choices:
            near = did_you_mean(value[:100], self.choices)
            raise ApiError(f"{at} is {shown(value)}; it is one of {', '.join(self.choices)}{near}", param=at)
        if len(value) < self.shortest:
            raise ApiError(f"{at} must have at least {self.shortest} characters", param=at)
        if self.longest is not None and len(value) > self.longest:
            raise ApiError(f"{at} has {len(value):,} characters; at most {self.longest:,} fit", param=at)
        return value

    def schema(self) -> dict[str, Any]:
        if self.choices:
            return {"type": "string", "enum": list(self.choices)}
        sizes = {"minLength": self.shortest or None, "maxLength": self.longest}
        return {"type": "string", **{k: v for k, v in sizes.items() if v is not None}}


@dataclass(frozen=True)
class Flag(Shape):
    def read(self, value: Any, at: str) -> bool:
        if not isinstance(value, bool):
            raise wrong(at, "true or false", value)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Number(Shape):
    """A finite number from ``low`` to ``high``; ``above``: greater than ``low``."""

    low: float | None = None
    high: float | None = None
    above: bool = False
    whole: bool = False

    def read(self, value: Any, at: str) -> Any:
        kind = "an integer" if self.whole else "a number"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise wrong(at, kind, value)
        if self.whole and value != int(value):
            raise wrong(at, kind, value)
        low, high = self.low, self.high
        below = low is not None and (value <= low if self.above else value < low)
        if below or (high is not None and value > high):
            least = f"{'above' if self.above else 'at least'} {low:,}" if low is not None else ""
            most = f"at most {high:,}" if high is not None else ""
            raise wrong(at, " and ".join(part for part in (least, most) if part), value)
        return int(value) if self.whole else float(value)

    def schema(self) -> dict[str, Any]:
        rule: dict[str, Any] = {"type": "integer" if self.whole else "number"}
        if self.low is not None:
            rule["exclusiveMinimum" if self.above else "minimum"] = self.low
        if self.high is not None:
            rule["maximum"] = self.high
        return rule


def Integer(low: int | None = None, high: int | None = None) -> Number:
    """A whole number from ``low`` to ``high``."""
    return Number(low, high, whole=True)


@dataclass(frozen=True)
class ListOf(Shape):
    item: Shape
    fewest: int = 0
    most: int | None = None

    def read(self, value: Any, at: str) -> list[Any]:
        if not isinstance(value, list):
            raise wrong(at, "a list", value)
        if len(value) < self.fewest or (self.most is not None and len(value) > self.most):
            bounds = f"{self.fewest} to {self.most}" if self.most is not None else f"at least {self.fewest}"
            raise ApiError(f"{at} has {len(value):,} items; it takes {bounds}", param=at)
        item = self.item
        if isinstance(item, Number) and item.whole:
            return self._integers(value, item, at)
        return [item.read(v, f"{at}[{i}]") for i, v in enumerate(value)]

    @staticmethod
    def _integers(value: list[Any], item: Number, at: str) -> list[Any]:
        """Token ids come by the ten thousand: types and bounds are looked at all at once, errors one by one."""
        low, high = item.low, item.high
        if set(map(type, value)) <= {int} and (
            not value or ((low is None or min(value) >= low) and (high is None or max(value) <= high))
        ):
            return value
        return [item.read(v, f"{at}[{i}]") for i, v in enumerate(value)]

    def schema(self) -> dict[str, Any]:
        sizes = {"minItems": self.fewest or None, "maxItems": self.most}
        return {
            "type": "array",
            "items": self.item.schema(),
            **{k: v for k, v in sizes.items() if v is not None},
        }


@dataclass(frozen=True)
class MapOf(Shape):
    """An object with keys of a pattern. ``keys`` reads a key; ``pattern`` is the same rule as a regular expression."""

    item: Shape
    keys: Shape = field(default_factory=Text)
    pattern: str = ""
    most: int | None = None

    def read(self, value: Any, at: str) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise wrong(at, "an object", value)
        if self.most is not None and len(value) > self.most:
            raise ApiError(f"{at} has {len(value):,} entries; at most {self.most} fit", param=at)
        return {
            self.keys.read(k, f"a name in {at}"): self.item.read(v, f"{at}.{k[:80]}")
            for k, v in value.items()
        }

    def schema(self) -> dict[str, Any]:
        rule: dict[str, Any] = {"type": "object"}
        if self.pattern:
            rule |= {"patternProperties": {self.pattern: self.item.schema()}, "additionalProperties": False}
        else:
            rule |= {"additionalProperties": self.item.schema()}
        if isinstance(self.keys, Text) and self.keys.longest is not None:
            rule["propertyNames"] = {"maxLength": self.keys.longest}
        return rule | ({"maxProperties": self.most} if self.most is not None else {})


@dataclass(frozen=True)
class Anything(Shape):
    """Any JSON, or any JSON object, of bounded depth."""

    object_only: bool = False

    def read(self, value: Any, at: str) -> Any:
        if self.object_only and not isinstance(value, dict):
            raise wrong(at, "an object", value)
        level = [value]
        for _ in range(DEEPEST):
            level = [
                child
                for v in level
                if isinstance(v, (dict, list))
                for child in (v.values() if isinstance(v, dict) else v)
            ]
            if not level:
                return value
        raise ApiError(f"{at} is nested more than {DEEPEST} deep", param=at)

    def schema(self) -> dict[str, Any]:
        return {"type": "object"} if self.object_only else {}


@dataclass(frozen=True)
class Either(Shape):
    """One of several shapes; the first whose JSON type fits decides, so that its error is the one that is told."""

    options: tuple[Shape, ...]
    expected: str

    def read(self, value: Any, at: str) -> Any:
        for shape in self.options:
            if _fits(shape, value):
                return shape.read(value, at)
        raise wrong(at, self.expected, value)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [shape.schema() for shape in self.options]}


def _fits(shape: Shape, value: Any) -> bool:
    """Whether the JSON type of ``value`` is the one of ``shape``, for a list that of its first item too."""
    if isinstance(shape, ListOf):
        return isinstance(value, list) and (not value or _fits(shape.item, value[0]))
    if isinstance(shape, Either):
        return any(_fits(option, value) for option in shape.options)
    if isinstance(shape, Text):
        return isinstance(value, str) and (not shape.choices or value in shape.choices)
    if isinstance(shape, Flag):
        return isinstance(value, bool)
    if isinstance(shape, Number):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(shape, (Record, MapOf, Variants)) or (isinstance(shape, Anything) and shape.object_only):
        return isinstance(value, dict)
    return True


@dataclass(frozen=True)
class Field:
    """A member of a ``Record``; one that is not required may be ``null``, which means ``default``."""

    shape: Shape
    default: Any = None
    required: bool = False
    about: str = ""


class Record(Shape):
    """An object with known members. Unknown ones are refused by name; members left out have their default."""

    def __init__(self, fields: Mapping[str, Field], about: str = "") -> None:
        self.fields, self.about = dict(fields), about

    def read(self, value: Any, at: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(at or "the body", "an object", value)
        inside = f"{at}." if at else ""
        for key in value:
            if key not in self.fields:
                near = did_you_mean(key[:100], self.fields)
                raise ApiError(
                    f"unknown field {shown(key)}{f' in {at}' if at else ''}{near}",
                    param=f"{inside}{key[:100]}",
                    code="unknown_field",
                )
        found = {}
        for key, member in self.fields.items():
            given = value.get(key)
            if given is not None or (member.required and key in value):
                found[key] = member.shape.read(given, inside + key)
            elif member.required:
                raise ApiError(f"{inside}{key} is missing", param=inside + key, code="missing_field")
            else:
                found[key] = member.default
        return found

    def schema(self) -> dict[str, Any]:
        rule: dict[str, Any] = {
            "type": "object",
            "properties": {key: _member(f) for key, f in self.fields.items()},
            "additionalProperties": False,
        }
        if required := [key for key, f in self.fields.items() if f.required]:
            rule["required"] = required
        return rule | ({"description": self.about} if self.about else {})


def _member(member: Field) -> dict[str, Any]:
    rule = member.shape.schema()
    if not member.required:
        rule = _nullable(rule)
    if member.about:
        rule = {**rule, "description": member.about}
    if member.default is not None and not isinstance(member.default, tuple):
        rule = {**rule, "default": member.default}
    return rule


def _nullable(rule: dict[str, Any]) -> dict[str, Any]:
    if not rule:
        return rule
    if "anyOf" in rule:
        return {**rule, "anyOf": [*rule["anyOf"], {"type": "null"}]}
    if "enum" in rule:
        return {**rule, "type": [rule["type"], "null"], "enum": [*rule["enum"], None]}
    return {**rule, "type": [rule["type"], "null"]} if "type" in rule else {"anyOf": [rule, {"type": "null"}]}


@dataclass(frozen=True)
class Variants(Shape):
    """An object whose member ``tag`` says which of several records it is."""

    tag: str
    records: Mapping[str, Record]

    def read(self, value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(at, "an object", value)
        kind = Text(choices=tuple(self.records)).read(value.get(self.tag), f"{at}.{self.tag}")
        return self.records[kind].read(value, at)

    def schema(self) -> dict[str, Any]:
        return {"oneOf": [record.schema() for record in self.records.values()]}


def tagged(tag: str, records: Mapping[str, Mapping[str, Field]]) -> Variants:
    """``Variants`` of records that each get their tag as a member."""
    made = {name: Record({tag: Field(Text(choices=(name,)), required=True), **fields})
            for name, fields in records.items()}  # fmt: skip
    return Variants(tag, made)


def optional(shape: Shape, default: Any = None, about: str = "") -> Field:
    return Field(shape, default, False, about)


def needed(shape: Shape, about: str = "") -> Field:
    return Field(shape, None, True, about)


def either(expected: str, *options: Shape) -> Either:
    return Either(options, expected)
