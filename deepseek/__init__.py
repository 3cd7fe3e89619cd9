"""deepseek-framework: the whole life of sparse hybrid-attention language models, as one readable package.

An independent implementation of a published description; no ties to the company of that name.

    import deepseek as ds
    ds.pretrain(ds.PretrainConfig(), run="runs/mine")
    print(ds.load("runs/mine").generate("def main("))

This is the front door: everything a user needs by one name. Nothing heavy is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deepseek import data, events, math, models, monitor, nn
    from deepseek.batch import Batch
    from deepseek.data import DataConfig, SourceConfig, Tokenizer, prepare, train_tokenizer
    from deepseek.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        DeepseekError,
        MissingExtraError,
        RunError,
        TrainingError,
        WeightsError,
    )
    from deepseek.events import emit
    from deepseek.models import ModelConfig, Transformer
    from deepseek.nn.attention import AttentionConfig
    from deepseek.nn.moe import MoEConfig
    from deepseek.ops.jit import jit
    from deepseek.parallel.memory import activation_checkpoint
    from deepseek.parallel.plan import ParallelConfig
    from deepseek.recipes.evaluate import evaluate_run as evaluate
    from deepseek.recipes.export import export
    from deepseek.recipes.plan import EvaluateConfig, PretrainConfig, read_config
    from deepseek.recipes.pretrain import pretrain
    from deepseek.recipes.pretrain import resume_run as resume
    from deepseek.registry import register_op
    from deepseek.serve import Completion, Engine, EngineConfig, LanguageModel, Message, SamplingConfig, load
    from deepseek.train import OptimConfig, ScheduleConfig, TrainingConfig, fit
    from deepseek.weights.checkpoint import CheckpointConfig

#: Where each name of the front door lives: ``name -> module`` or ``module:attribute``.
_HOMES = {
    "AttentionConfig": "deepseek.nn.attention",
    "Batch": "deepseek.batch",
    "CheckpointConfig": "deepseek.weights.checkpoint",
    "CheckpointError": "deepseek.errors",
    "Completion": "deepseek.serve",
    "ConfigError": "deepseek.errors",
    "DataConfig": "deepseek.data",
    "DataError": "deepseek.errors",
    "DeepseekError": "deepseek.errors",
    "Engine": "deepseek.serve",
    "EngineConfig": "deepseek.serve",
    "EvaluateConfig": "deepseek.recipes.plan",
    "LanguageModel": "deepseek.serve",
    "Message": "deepseek.serve",
    "MissingExtraError": "deepseek.errors",
    "MoEConfig": "deepseek.nn.moe",
    "ModelConfig": "deepseek.models",
    "OptimConfig": "deepseek.train",
    "ParallelConfig": "deepseek.parallel.plan",
    "PretrainConfig": "deepseek.recipes.plan",
    "RunError": "deepseek.errors",
    "SamplingConfig": "deepseek.serve",
    "ScheduleConfig": "deepseek.train",
    "SourceConfig": "deepseek.data",
    "Tokenizer": "deepseek.data",
    "TrainingConfig": "deepseek.train",
    "TrainingError": "deepseek.errors",
    "Transformer": "deepseek.models",
    "WeightsError": "deepseek.errors",
    "activation_checkpoint": "deepseek.parallel.memory",
    "emit": "deepseek.events",
    "evaluate": "deepseek.recipes.evaluate:evaluate_run",
    "export": "deepseek.recipes.export",
    "fit": "deepseek.train",
    "jit": "deepseek.ops.jit",
    "load": "deepseek.serve",
    "prepare": "deepseek.data",
    "pretrain": "deepseek.recipes.pretrain",
    "read_config": "deepseek.recipes.plan",
    "register_op": "deepseek.registry",
    "resume": "deepseek.recipes.pretrain:resume_run",
    "train_tokenizer": "deepseek.data",
}
_PACKAGES = ("data", "events", "math", "models", "monitor", "nn")

__all__ = [
    "AttentionConfig", "Batch", "CheckpointConfig", "CheckpointError", "Completion", "ConfigError", "DataConfig",
    "DataError", "DeepseekError", "Engine", "EngineConfig", "EvaluateConfig", "LanguageModel", "Message",
    "MissingExtraError", "MoEConfig", "ModelConfig", "OptimConfig", "ParallelConfig", "PretrainConfig", "RunError",
    "SamplingConfig", "ScheduleConfig", "SourceConfig", "Tokenizer", "TrainingConfig", "TrainingError",
    "Transformer", "WeightsError", "__version__", "activation_checkpoint", "data", "emit", "evaluate", "events",
    "export", "fit", "jit", "load", "math", "models", "monitor", "nn", "prepare", "pretrain", "read_config",
    "register_op", "resume", "train_tokenizer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"deepseek.{name}")
    if name not in _HOMES:
        from deepseek.errors import did_you_mean

        raise AttributeError(f"deepseek has no '{name}'{did_you_mean(name, __all__)}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
