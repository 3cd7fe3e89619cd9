"""The library ``transformers``, both ways.

Importing this package registers our architecture, so that
``transformers.AutoModelForCausalLM.from_pretrained`` loads what ``deepseek export`` wrote, without
``trust_remote_code``. (The library has no plug-in mechanism; the import is the way.) And
``AutoModelForCausalLM`` here runs Llama, Mistral, Qwen and Mixtral models on our layers.
"""

from importlib.util import find_spec
from typing import Any

from deepseek.errors import MissingExtraError

if find_spec("transformers") is None:
    raise MissingExtraError("transformers", "hf", "deepseek.transformers")

import transformers as _hf
from transformers import AutoConfig, AutoTokenizer

from deepseek.transformers.auto import AutoModelForCausalLM
from deepseek.transformers.configuration import DeepseekHybridConfig
from deepseek.transformers.modeling import DeepseekHybridForCausalLM

__all__ = [
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "DeepseekHybridConfig",
    "DeepseekHybridForCausalLM",
]


def _register() -> None:
    AutoConfig.register(DeepseekHybridConfig.model_type, DeepseekHybridConfig, exist_ok=True)
    _hf.AutoModelForCausalLM.register(DeepseekHybridConfig, DeepseekHybridForCausalLM, exist_ok=True)


def __getattr__(name: str) -> Any:
    known = ", ".join(__all__)
    hint = f"; the library has it: from transformers import {name}" if hasattr(_hf, name) else ""
    raise AttributeError(f"deepseek.transformers has no '{name}'; it has: {known}{hint}")


_register()
