"""``DeepseekHybridConfig``: our ``ModelConfig`` in the clothes of a ``transformers`` configuration."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from deepseek.config import from_dict, to_dict
from deepseek.models import ModelConfig
from deepseek.weights.convert import OURS, our_config_json


class DeepseekHybridConfig(PretrainedConfig):
    """Configuration of our own architecture.

    Args:
        model: the table that ``ModelConfig`` is made from; it alone decides the shape. The names other tools
        look for
            (``hidden_size``, ``num_hidden_layers``, ...) are derived from it.

    Raises:
        ConfigError: an unknown key or an impossible shape.
    """

    model_type = OURS
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, model: dict[str, Any] | None = None, **kwargs: Any) -> None:
        shape = from_dict(ModelConfig, model or {}, "model")
        derived = our_config_json(shape)
        derived["architectures"] = kwargs.get("architectures") or derived["architectures"]
        del derived["model_type"]
        use_cache = bool(kwargs.pop("use_cache", True))
        super().__init__(**{**kwargs, **derived})
        self.use_cache = use_cache

    @classmethod
    def of(cls, shape: ModelConfig, **kwargs: Any) -> DeepseekHybridConfig:
        """The configuration of a ``ModelConfig``."""
        return cls(model=to_dict(shape), **kwargs)

    @property
    def shape(self) -> ModelConfig:
        """The ``ModelConfig`` described."""
        return from_dict(ModelConfig, self.model, "model")
