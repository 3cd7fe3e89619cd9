"""Strict configuration: frozen typed dataclasses, read from TOML and ``--a.b=c``, printed back as used.

``@configclass`` makes a frozen dataclass that refuses what it does not know and names the nearest thing it
does:

    ConfigError: unknown key 'expert' in model.moe (did you mean 'experts'?)

A config class lives beside the class that reads it; this file only knows how to read, check and print them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import tomli_w
from typing_extensions import dataclass_transform

from deepseek.errors import ConfigError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

C = TypeVar("C")

_HINTS: dict[type[Any], dict[str, Any]] = {}
NONE = "none"  #: how TOML, which has no null, says that an optional value is absent


@dataclass_transform(frozen_default=True, kw_only_default=True)
def configclass(cls: type[C]) -> type[C]:
    """A frozen, keyword-only dataclass whose constructor rejects unknown and missing options by name.

    A ``check(self)`` method, if there is one, runs after construction and raises ``ConfigError``.
    """
    made: Any = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    init = made.__init__
    names = [f.name for f in dataclasses.fields(made)]
    unset = dataclasses.MISSING
    needed = [
        f.name
        for f in dataclasses.fields(made)
        if f.init and f.default is unset and f.default_factory is unset
    ]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **values: Any) -> None:
        if args:
            raise ConfigError(f"{cls.__name__} takes options by name: {cls.__name__}({names[0]}=…)")
        for name in values:
            if name not in names:
                near, has = did_you_mean(name, names), ", ".join(names)
                raise ConfigError(f"{cls.__name__} has no option '{name}'{near}; it has: {has}")
        if missing := [name for name in needed if name not in values]:
            raise ConfigError(f"{cls.__name__} needs a value for {', '.join(missing)}")
        hints = _hints(cls)
        init(self, **{name: _coerce(hints[name], value, name) for name, value in values.items()})
        if hasattr(self, "check"):
            self.check()

    made.__init__ = checked
    return made


def from_dict(cls: type[C], values: dict[str, Any], where: str = "") -> C:
    """``values`` (as TOML gives them) as a ``cls``; unknown keys and wrong types raise ``ConfigError``."""
    hints = _hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            place = where or "the top level"
            raise ConfigError(f"unknown key '{key}' in {place}{did_you_mean(key, names)}")
    read = {k: _coerce(hints[k], v, f"{where}.{k}" if where else k) for k, v in values.items()}
    try:
        return cls(**read)
    except ConfigError as error:
        raise ConfigError(
            f"{where}: {error}" if where and not str(error).startswith(where) else str(error)
        ) from None


def to_dict(config: Any) -> dict[str, Any]:
    """``config`` as nested plain values: what TOML and JSON can hold.

    ``None`` is left out where it is the default, and the string ``"none"`` elsewhere.
    """
    plain: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if value is None:
            if f.default is not None:
                plain[f.name] = NONE
            continue
        plain[f.name] = _plain(value)
    return plain


def load_toml(path: Path | str) -> dict[str, Any]:
    """The tables of a TOML file. Raises ``ConfigError`` for a missing file or bad syntax."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.toml")])
        raise ConfigError(f"no config file {path}{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config file {path}: {error}") from None
    except (ValueError, RecursionError) as error:  # ValueError: TOMLDecodeError, and numbers too long to read
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def to_toml(config: Any) -> str:
    """``config`` as TOML text that ``load_toml`` and ``from_dict`` read back to an equal config."""
    return tomli_w.dumps(to_dict(config))


def replace(config: C, **changes: Any) -> C:
    """A copy with some fields changed; unknown names raise ``ConfigError``."""
    names = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    for name in changes:
        if name not in names:
            raise ConfigError(f"{type(config).__name__} has no option '{name}'{did_you_mean(name, names)}")
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _hints(cls: type[Any]) -> dict[str, Any]:
    """Types of the fields. Working them out takes a millisecond, and a server makes configs for every request."""
    found = _HINTS.get(cls)
    if found is None:
        found = _HINTS[cls] = typing.get_type_hints(cls)
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """``value`` as ``hint`` asks, or a ``ConfigError`` that says what ``where`` should be."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = [a for a in get_args(hint) if a is not type(None)]
        if (value is None or value == NONE) and len(options) < len(get_args(hint)):
            return None
        for option in options[:-1]:
            try:
                return _coerce(option, value, where)
            except ConfigError:
                continue
        return _coerce(options[-1], value, where)
    if origin is Literal:
        if any(value == a and type(value) is type(a) for a in get_args(hint)):
            return value
        choices = [str(a) for a in get_args(hint)]
        raise ConfigError(
            f"{where} is {value!r}; choose one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
        )
    if dataclasses.is_dataclass(hint):
        if isinstance(hint, type) and isinstance(value, hint):
            return value
        if isinstance(value, dict):
            return from_dict(typing.cast("type[Any]", hint), value, where)
        raise ConfigError(f"{where} must be a table of options, not {value!r}")
    if origin in (tuple, list):
        return _coerce_list(origin, get_args(hint), value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a table, not {value!r}")
        return {k: _coerce(get_args(hint)[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is Any:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{where} must be a finite number, not {value!r}")
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} must be {getattr(hint, '__name__', hint)}, not {value!r}")


def _coerce_list(origin: Any, hints: tuple[Any, ...], value: Any, where: str) -> Any:
    """A list as ``list[T]``, ``tuple[T, ...]`` or a tuple of fixed length such as ``tuple[float, float]``."""
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} must be a list, not {value!r}")
    if origin is list or (len(hints) == 2 and hints[1] is ...):
        hints = hints[:1] * len(value)
    if len(value) != len(hints):
        raise ConfigError(f"{where} must have {len(hints)} values, not {len(value)}: {value!r}")
    return origin(_coerce(hint, v, f"{where}[{i}]") for i, (hint, v) in enumerate(zip(hints, value)))
