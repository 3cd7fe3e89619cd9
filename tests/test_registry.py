from importlib.metadata import EntryPoint

import pytest

from deepseek import registry
from deepseek.errors import ConfigError
from deepseek.registry import backends, get_op, register_op


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ops", {})
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    monkeypatch.setattr(registry, "entry_points", lambda group: [])


def test_register_and_get() -> None:
    @register_op("add", "plain")
    def add(a: int, b: int) -> int:
        return a + b

    register_op("add", "plain")(add)  # the same function again is no conflict
    assert get_op("add", "plain")(1, 2) == 3
    assert backends("add") == ["plain"]
    assert backends("nothing") == []


def test_a_taken_name_and_an_unknown_name_are_refused() -> None:
    register_op("add", "plain")(lambda: 1)
    with pytest.raises(ConfigError, match="already has a backend 'plain'"):
        register_op("add", "plain")(lambda: 2)
    with pytest.raises(ConfigError, match=r"did you mean 'plain'.*it has: plain"):
        get_op("add", "plane")
    with pytest.raises(ConfigError, match="it has: none"):
        get_op("sub", "plain")


def test_a_plugin_is_loaded_once_when_a_name_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []

    class Plugin:
        name, value = "mine", "mine:all"

        def load(self) -> None:
            loads.append(1)
            register_op("add", "mine")(lambda: 7)

    monkeypatch.setattr(registry, "entry_points", lambda group: [Plugin()])
    assert get_op("add", "mine")() == 7
    get_op("add", "mine")
    with pytest.raises(ConfigError):
        get_op("add", "other")
    assert loads == [1]


def test_a_broken_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("broken", "no_such_module_here", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(ConfigError, match="plug-in 'broken'"):
        get_op("add", "other")
