"""From a config, or from what lies on the disk, to a ready model: the one place where the parts meet.

run/config.toml    the exact config, written before the first step
    tokenizer/     tokenizer.json and its config
    events.jsonl   what happened
    step-000500/   checkpoints (weights.checkpoint)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from deepseek.config import load_toml
from deepseek.data import Tokenizer
from deepseek.errors import CheckpointError, ConfigError, RunError, did_you_mean
from deepseek.files import holder
from deepseek.models import ModelConfig, Transformer, model_config
from deepseek.weights import checkpoint
from deepseek.weights.convert import gguf_file, open_model
from deepseek.weights.gguf_tokenizer import load_gguf_tokenizer

TRAINER = ".training"  #: the file in a run directory that its one trainer holds


@dataclass(frozen=True)
class Run:
    """A run directory: one stage of a model's life."""

    path: Path

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """An existing run; ``NAME`` is also looked for in ``runs/``. Raises ``RunError`` for anything else."""
        path = Path(path)
        if not path.exists() and not path.is_absolute() and (Path("runs") / path).exists():
            path = Path("runs") / path
        if not path.exists():
            siblings = [p.name for p in path.parent.glob("*/")] if path.parent.is_dir() else []
            names = siblings + [p.name for p in Path("runs").glob("*/")]
            raise RunError(f"no run at {path}{did_you_mean(path.name, names)}; `deepseek runs` lists them")
        if not (path / "config.toml").is_file():
            raise RunError(
                f"{path} is not a run directory: it has no config.toml; `deepseek runs` lists the runs"
            )
        return cls(path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config_path(self) -> Path:
        return self.path / "config.toml"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer"

    def trainer(self) -> str | None:
        """The id of the process that trains in it now, ``None`` if there is none."""
        return holder(self.path / TRAINER)

    def model_config(self) -> ModelConfig:
        """The shape written in ``config.toml``."""
        table: Any = load_toml(self.config_path).get("model")
        if not isinstance(table, dict):
            raise RunError(f"{self.config_path} has no [model] table")
        return model_config(table)


@dataclass(frozen=True)
class Loaded:
    """A model ready to use, its tokenizer (``None`` if the directory has none), where from, and at which step."""

    model: Transformer
    tokenizer: Tokenizer | None
    path: Path
    step: int | None


def build(config: ModelConfig, device: torch.device | str = "cpu", seed: int | None = None) -> Transformer:
    """A fresh model with fp32 weights; ``seed`` makes its weights a function of the config."""
    if seed is not None:
        torch.manual_seed(seed)
    return Transformer(config).to(device)


def load(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | Literal["kept"] | None = None,
) -> Loaded:
    """The model of a run (its newest checkpoint), of one checkpoint, of a Hugging Face directory, or of a GGUF file
    (or a directory that holds one).

    Args:
        dtype: of the weights; 'kept': as they are in the files, quantised ones as fp32. ``None``: fp32 for foreign
            models, 'kept' for runs. Statistics stay fp32.

    Raises:
        RunError, CheckpointError, WeightsError: what was found instead, and what to do.
    """
    path = Path(path)
    wanted = None if dtype == "kept" else dtype
    file = gguf_file(path)
    if file is not None or (path / "config.json").is_file():
        wide = torch.float32 if dtype is None else wanted
        with open_model(path) as found:
            tokenizer = _foreign_tokenizer(file or path)
            return Loaded(found.load(wide, device), tokenizer, path, None)
    inside = path.name.startswith("step-") and (path.parent / "config.toml").is_file()
    run = Run.open(path.parent if inside else path)
    if not inside and checkpoint.latest(run.path) is None:
        raise RunError(f"{run.path} has no checkpoint yet; start it again with `deepseek pretrain`")
    at = checkpoint.load(path if inside else run.path, groups=("model",))
    with torch.device("meta"):
        model = Transformer(run.model_config())
    load_weights(model, at, assign=True)
    _fill_meta(model)
    _cast(model, wanted)
    tokenizer = Tokenizer.load(run.tokenizer_path) if run.tokenizer_path.exists() else None
    return Loaded(model.to(device).eval(), tokenizer, run.path, at.step)


def load_tokenizer(path: Path | str) -> Tokenizer | None:
    """The tokenizer that ``load`` would give, without the weights; ``None`` if there is none.

    Raises:
        RunError, DataError, WeightsError: what was found instead.
    """
    path = Path(path)
    file = gguf_file(path)
    if file is not None or (path / "config.json").is_file():
        return _foreign_tokenizer(file or path)
    inside = path.name.startswith("step-") and (path.parent / "config.toml").is_file()
    run = Run.open(path.parent if inside else path)
    return Tokenizer.load(run.tokenizer_path) if run.tokenizer_path.exists() else None


def _foreign_tokenizer(path: Path) -> Tokenizer | None:
    if path.is_file():
        return load_gguf_tokenizer(path)
    return Tokenizer.load(path) if (path / "tokenizer.json").is_file() else None


def _cast(model: Transformer, dtype: torch.dtype | None) -> None:
    """Weights to ``dtype``, one at a time; ``None`` leaves them."""
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)


def load_weights(model: Transformer, found: checkpoint.Checkpoint, assign: bool = False) -> None:
    """Fill ``model`` from a checkpoint. Raises ``CheckpointError`` naming what is missing, left over or misshapen."""
    wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - found.model.keys()), sorted(found.model.keys() - wanted.keys())
    wrong = [n for n, t in found.model.items() if n in wanted and t.shape != wanted[n].shape]
    if missing or extra or wrong:
        kinds = ((missing, "tensors missing"), (extra, "left over"), (wrong, "of another shape"))
        parts = [f"{len(names)} {what} (first: {names[0]})" for names, what in kinds if names]
        raise CheckpointError(
            f"{found.path} does not fit this model: {', '.join(parts)}; was config.toml changed?"
        )
    model.load_state_dict(found.model, assign=assign)


def _fill_meta(model: Transformer) -> None:
    """Give memory to the buffers that no checkpoint holds; all of them start at zero."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def pick_device(name: str) -> torch.device:
    """'auto' is the accelerator if there is one, else the CPU; one with a number becomes the current one, on which
    kernels of ours start. Raises ``ConfigError`` for a device that is absent."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"train.device={name!r} is not a device; try 'auto', 'cpu' or 'cuda'") from None
    if device.type not in ("cpu", accelerator.type if accelerator else "cpu"):
        have = (
            f"this machine has {accelerator.type} and cpu" if accelerator else "this machine has only 'cpu'"
        )
        raise ConfigError(f"train.device={name!r} is not available: {have}")
    if device.type != "cpu" and (device.index or 0) >= torch.accelerator.device_count():
        have = f"this machine has {torch.accelerator.device_count()} of type {device.type}, counted from 0"
        raise ConfigError(f"train.device={name!r} is not available: {have}")
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device.index)
    return device
