"""The model, its shapes, and what they cost."""

from deepseek.models.config import PRESETS, ModelConfig, model_config
from deepseek.models.transformer import LayerStats, Output, Transformer

__all__ = ["PRESETS", "LayerStats", "ModelConfig", "Output", "Transformer", "model_config"]
