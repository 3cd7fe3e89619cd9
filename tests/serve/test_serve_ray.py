"""The Ray example without Ray: what it asks of Ray Serve, and the application that its builder makes."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from fake_client import KEY, FakeChat, FakeClient
from fake_replica import in_thread
from test_router_process import ask

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_ray.py"


@pytest.fixture
def example() -> Any:
    spec = importlib.util.spec_from_file_location("serve_ray", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeRay(types.ModuleType):
    """``ray.serve`` as its documentation has it, as far as the example uses it; keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("ray.serve")
        self.told: dict[str, Any] = {}

    def ingress(self, builder: Any) -> Any:
        assert isinstance(builder, types.FunctionType), "Ray takes only a plain function for a builder"
        self.told["builder"] = builder
        return lambda: types.new_class("Wrapper")

    def deployment(self, wrapped: type, **options: Any) -> Any:
        self.told["options"] = options
        return types.SimpleNamespace(bind=lambda: "application")

    def start(self, **options: Any) -> None:
        self.told["start"] = options

    def run(self, application: Any, **options: Any) -> None:
        self.told["run"] = (application, options)


@pytest.fixture
def told(example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    ray, fake = types.ModuleType("ray"), FakeRay()
    ray.serve = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.serve", fake)
    monkeypatch.setattr(sys, "argv", ["serve_ray.py", str(tmp_path), "--most", "4"])
    monkeypatch.setenv("DEEPSEEK_API_KEYS", f"me={KEY}")
    example.main()
    return fake.told


def test_what_ray_is_asked_for(told: dict[str, Any], tmp_path: Path) -> None:
    from deepseek.serve.server.config import ServerConfig

    options, limits = told["options"], ServerConfig()
    actor = options["ray_actor_options"]
    assert actor["num_gpus"] == 1
    assert actor["runtime_env"]["env_vars"] == {
        "DEEPSEEK_MODEL": str(tmp_path),
        "DEEPSEEK_API_KEYS": f"me={KEY}",
    }
    assert options["max_ongoing_requests"] > limits.max_running + limits.max_waiting, (
        "our 429, not a queue of Ray's"
    )
    assert options["graceful_shutdown_timeout_s"] > limits.drain
    assert options["autoscaling_config"]["max_replicas"] == 4
    assert options["autoscaling_config"]["target_ongoing_requests"] < limits.max_running
    assert told["run"] == ("application", {"name": "deepseek", "route_prefix": "/", "blocking": True})


def test_the_application_loads_serves_and_lets_go(
    example: Any, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek.serve.server import launch

    seen: list[str] = []

    class Client(FakeClient):
        async def __aenter__(self) -> Client:
            seen.append("loaded")
            return self

        async def __aexit__(self, *_: object) -> None:
            seen.append("closed")

    made = Client()
    monkeypatch.setattr(example, "client", lambda: made)
    monkeypatch.setattr(launch, "load_texts", lambda path: (made.tokenizer, FakeChat()))
    app = told["builder"]()
    assert seen == []
    with in_thread(app, lifespan="on") as server:
        port = server.servers[0].sockets[0].getsockname()[1]
        assert ask(port, "GET", "/ready")[0] == 200
        assert ask(port, "GET", "/v1/models")[0] == 401
        assert seen == ["loaded"]
        server.should_exit = True
        with contextlib.suppress(OSError):
            for _ in range(100):
                ask(port, "GET", "/health")
    assert seen == ["loaded", "closed"]


def test_no_keys_no_server(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DEEPSEEK_API_KEYS", raising=False)
    monkeypatch.setattr(sys, "argv", ["serve_ray.py", "runs/mine"])
    with pytest.raises(SystemExit):
        example.main()
    assert "DEEPSEEK_API_KEYS" in capsys.readouterr().err
