"""Using a model: sampling, generation."""

from deepseek.serve.generate import Completion, LanguageModel, Message, load
from deepseek.serve.sampler import Sampler, SamplingConfig

__all__ = ["Completion", "LanguageModel", "Message", "Sampler", "SamplingConfig", "load"]
