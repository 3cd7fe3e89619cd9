"""``import deepseek as ds``: the checked list of what a user finds there, and the source documents' own snippets."""

import subprocess
import sys

import pytest
import torch

import deepseek as ds

NAMES = [
    "AttentionConfig",
    "Batch",
    "CheckpointConfig",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DeepseekError",
    "Engine",
    "EngineConfig",
    "EvaluateConfig",
    "LanguageModel",
    "Message",
    "MissingExtraError",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PretrainConfig",
    "RunError",
    "SamplingConfig",
    "ScheduleConfig",
    "SourceConfig",
    "Tokenizer",
    "TrainingConfig",
    "TrainingError",
    "Transformer",
    "WeightsError",
    "__version__",
    "activation_checkpoint",
    "data",
    "emit",
    "evaluate",
    "events",
    "export",
    "fit",
    "jit",
    "load",
    "math",
    "models",
    "monitor",
    "nn",
    "prepare",
    "pretrain",
    "read_config",
    "register_op",
    "resume",
    "train_tokenizer",
]


def test_the_list_is_the_front_door() -> None:
    assert sorted(ds.__all__) == sorted(NAMES)
    assert dir(ds) == sorted(ds.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name: str) -> None:
    assert getattr(ds, name) is not None


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(AttributeError, match="did you mean 'pretrain'"):
        _ = ds.pretain  # type: ignore[attr-defined]


def test_importing_is_cheap() -> None:
    """Neither torch nor anything else heavy is imported before it is asked for."""
    code = "import sys, deepseek; print([m for m in ('torch', 'numpy', 'transformers', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_engine_starts_without_a_compiler() -> None:
    """torch's compiler and Triton take over a second to import."""
    code = "import sys, deepseek.serve.engine; print([m for m in ('torch._dynamo', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_training_config_as_the_source_writes_it() -> None:
    config = ds.TrainingConfig(precision_mode="auto", loss_scaling_factor=128, grad_clip_threshold=1.0)
    assert (config.precision_mode, config.loss_scaling_factor, config.grad_clip_threshold) == (
        "auto",
        128,
        1.0,
    )
    with pytest.raises(ds.ConfigError, match="did you mean 'grad_clip_threshold'"):
        ds.TrainingConfig(grad_clip_treshold=1.0)  # type: ignore[call-arg]


def test_the_source_s_layer_names() -> None:
    """S4 §1 and §3.2: ``layer_norm`` without a shape, ``ds.nn.Module``, ``ds.nn.functional``."""
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    product = ds.math.gelu(x) * ds.nn.layer_norm(y)
    expected = (
        torch.nn.functional.gelu(x)
        * (y - y.mean(-1, keepdim=True))
        / (y.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    )
    torch.testing.assert_close(product, expected)

    class WeightedLoss(ds.nn.Module):
        def forward(
            self, pred: torch.Tensor, target: torch.Tensor, attention_map: torch.Tensor
        ) -> torch.Tensor:
            loss = ds.nn.functional.cross_entropy(pred, target, reduction="none")
            return (loss * attention_map).mean()

    pred, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    ones = WeightedLoss()(pred, target, torch.ones(5))
    torch.testing.assert_close(ones, torch.nn.CrossEntropyLoss()(pred, target))
