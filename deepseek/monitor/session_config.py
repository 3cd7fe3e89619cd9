"""The options of a run of somebody's own loop: a dictionary whose keys are attributes, too, kept in ``config.toml``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from deepseek.errors import RunError
from deepseek.files import write_atomic


class Config(MutableMapping[str, Any]):
    """A run's options: ``config["lr"]`` or ``config.lr``; every change is written to ``config.toml`` at once."""

    def __init__(self, path: Path | None, values: Mapping[str, Any]) -> None:
        self.__dict__["_path"], self.__dict__["_values"] = path, dict(values)
        if values:
            self._save()

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value
        self._save()

    def __delitem__(self, key: str) -> None:
        del self._values[key]
        self._save()

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self._values:
            raise AttributeError(f"the config has no '{name}'")
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __repr__(self) -> str:
        return f"Config({self._values})"

    def update(self, *args: Any, allow_val_change: bool = True, **values: Any) -> None:
        """Set several options; ``allow_val_change`` is taken for compatibility, changes are always allowed."""
        self._values.update(options_of(args[0]) if args else {}, **values)
        self._save()

    def _save(self) -> None:
        import tomli_w

        if self._path is not None:
            write_atomic(self._path, tomli_w.dumps(_toml(self._values)))


def options_of(config: Any) -> dict[str, Any]:
    """A config of any form (a mapping, a namespace, a dataclass) as a dictionary.

    Raises:
        RunError: it is none of these.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "__dataclass_fields__"):
        from dataclasses import asdict

        return asdict(config)
    if hasattr(config, "__dict__"):
        return dict(vars(config))
    raise RunError(f"a config is a dictionary, a namespace or a dataclass, not a {type(config).__name__}")


def _toml(value: Any) -> Any:
    """What TOML can hold: no ``None``, text for what it does not know."""
    if isinstance(value, Mapping):
        return {_text(k): _toml(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple, set)):
        return [_toml(v) for v in value if v is not None]
    return value if isinstance(value, (bool, int, float)) else _text(value)


def _text(value: Any) -> str:
    """A file holds no half of a surrogate pair."""
    return str(value).encode("utf-8", "replace").decode()
