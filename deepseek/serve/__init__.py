"""Using a model: the engine, its server, sampling, generation.

Names are imported when they are asked for: the router, which is below this package, needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek.serve.engine import Engine
    from deepseek.serve.engine_config import EngineConfig
    from deepseek.serve.generate import Completion, LanguageModel, Message, load
    from deepseek.serve.request import Output, Request
    from deepseek.serve.sampler import Sampler, SamplingConfig

#: Where each name lives.
_HOMES = {
    "Completion": "deepseek.serve.generate",
    "Engine": "deepseek.serve.engine",
    "EngineConfig": "deepseek.serve.engine_config",
    "LanguageModel": "deepseek.serve.generate",
    "Message": "deepseek.serve.generate",
    "Output": "deepseek.serve.request",
    "Request": "deepseek.serve.request",
    "load": "deepseek.serve.generate",
    "Sampler": "deepseek.serve.sampler",
    "SamplingConfig": "deepseek.serve.sampler",
}

__all__ = [
    "Completion", "Engine", "EngineConfig", "LanguageModel", "Message", "Output", "Request", "Sampler",
    "SamplingConfig", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value
