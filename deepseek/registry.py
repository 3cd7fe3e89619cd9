"""Tables where outsiders add rows: ``@register_op("attention", "mine")`` and entry-point plug-ins.

Inside the package, plain imports do. A table exists only where somebody else's code has to be found by name:
an operation with several implementations, each beside a plain-torch reference.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from deepseek.errors import ConfigError, did_you_mean

F = TypeVar("F", bound=Callable[..., Any])

ENTRY_POINT_GROUP = "deepseek.plugins"

_ops: dict[str, dict[str, Callable[..., Any]]] = {}
_plugins_loaded = False


def register_op(op: str, backend: str) -> Callable[[F], F]:
    """Register a function as the implementation ``backend`` of operation ``op``.

    Raises:
        ConfigError: the pair is taken by another function.
    """

    def add(function: F) -> F:
        row = _ops.setdefault(op, {})
        if row.get(backend, function) is not function:
            raise ConfigError(f"operation '{op}' already has a backend '{backend}': {row[backend]!r}")
        row[backend] = function
        return function

    return add


def get_op(op: str, backend: str) -> Callable[..., Any]:
    """The implementation ``backend`` of ``op``; unknown names raise ``ConfigError`` with the known ones."""
    backends = _ops.get(op, {})
    if backend not in backends:
        load_plugins()
        backends = _ops.get(op, {})
    if backend not in backends:
        raise ConfigError(
            f"operation '{op}' has no backend '{backend}'{did_you_mean(backend, backends)}; "
            f"it has: {', '.join(sorted(backends)) or 'none'}"
        )
    return backends[backend]


def backends(op: str) -> list[str]:
    """The names registered for ``op``, sorted."""
    return sorted(_ops.get(op, {}))


def load_plugins() -> None:
    """Import every installed entry point of the group ``deepseek.plugins``, once.

    Raises:
        ConfigError: a plug-in fails to import.
    """
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True
        for point in entry_points(group=ENTRY_POINT_GROUP):
            try:
                point.load()
            except Exception as error:
                what = f"the plug-in '{point.name}' ({point.value}) cannot be loaded: {error!r}"
                raise ConfigError(f"{what}; fix or uninstall it") from error
