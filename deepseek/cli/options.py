"""A run's config from the command line: a file or a preset, and ``--section.name=value`` over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from deepseek.errors import ConfigError, did_you_mean


def as_arguments(command: Any, leave_out: Sequence[str] = ()) -> list[str]:
    """The arguments that make ``command``, a parsed one, again; only what is not its default."""
    found: list[str] = []
    for field in dataclasses.fields(command):
        value, option = getattr(command, field.name), f"--{field.name.replace('_', '-')}"
        if field.name in leave_out or value == field.default:
            continue
        if isinstance(value, bool):
            found.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            found += [option, *value]
        else:
            found += [f"{option}={value}"]
    return found


def named_config(name: str) -> Any:
    """A config file, or a preset's name."""
    from deepseek.models import PRESETS
    from deepseek.recipes.plan import preset, read_config

    if name in PRESETS and not Path(name).exists():
        return preset(name)
    if not name.endswith(".toml") and not Path(name).exists():
        raise ConfigError(
            f"{name!r} is neither a config file nor a preset{did_you_mean(name, PRESETS)}; "
            f"presets: {', '.join(PRESETS)}"
        )
    return read_config(name)


def overridden(config: Any, rest: Sequence[str]) -> Any:
    """``config`` with ``--section.name=value`` applied, checked by tyro and by the config itself."""
    from deepseek.recipes.plan import PretrainConfig

    if not rest:
        return config
    return tyro.cli(
        PretrainConfig, default=config, args=_python_booleans(config, rest), prog="deepseek pretrain CONFIG",
        config=(tyro.conf.FlagConversionOff,),
    )  # fmt: skip


def _python_booleans(config: Any, args: Sequence[str]) -> list[str]:
    """``args`` with TOML's ``true`` and ``false``, where the option is a boolean, as the parser wants them."""
    words, option, found = {"true": "True", "false": "False"}, "", []
    for argument in args:
        name, sign, value = argument.partition("=") if argument.startswith("--") else (option, "", argument)
        if value in words and isinstance(_value_at(config, name), bool):
            argument = name + sign + words[value] if sign else words[value]
        option = argument
        found.append(argument)
    return found


def _value_at(config: Any, option: str) -> Any:
    """``--section.name`` in ``config``; ``None`` if there is none."""
    for name in option.removeprefix("--").replace("-", "_").split("."):
        config = getattr(config, name, None)
    return config
