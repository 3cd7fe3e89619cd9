"""A model from elsewhere as a run of ours: ``deepseek import SmolLM2.gguf`` makes ``runs/SmolLM2``.

    config.toml          its shape, and its tokenizer for data to come
    tokenizer/           with chat template and end tokens
    step-000000/         its weights, as our checkpoints are
    events.jsonl         where it came from

Weights go from file to file one tensor at a time, so memory holds one tensor of ours and one of theirs, whatever the
model's size. The run appears whole or not at all. ``resume`` goes on from it as from a run's own beginning.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepseek.config import replace, to_dict, to_toml
from deepseek.data import DataConfig
from deepseek.data.foreign_text import MORE_TEMPLATES, end_ids
from deepseek.errors import CheckpointError, RunError, WeightsError
from deepseek.events import Event, JsonlSink, emit
from deepseek.files import clean, staged, write_file
from deepseek.models import ModelConfig, count
from deepseek.recipes.plan import PretrainConfig
from deepseek.recipes.pretrain import IMPORTED
from deepseek.weights import checkpoint
from deepseek.weights.convert import gguf_file, open_model
from deepseek.weights.foreign import ForeignModel
from deepseek.weights.gguf_parts import model_name, part_paths
from deepseek.weights.gguf_tokenizer import load_gguf_tokenizer
from deepseek.weights.hf_tokenizer import TOKENIZER_FILES
from deepseek.weights.shards import Pending

DTYPES = {"kept": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MARGIN = 64 << 20  #: bytes of disk beyond the weights


@dataclass(frozen=True)
class Imported:
    """The new run, what kind of files it came from ('gguf', 'hf'), and the size of its checkpoint."""

    run: Path
    format: str
    parameters: int
    bytes: int
    dtype: str
    seconds: float


def import_model(source: Path | str, run: Path | str = "", *, dtype: str = "kept") -> Imported:
    """Make a run of a Hugging Face directory or a GGUF file.

    Args:
        run: its directory; ``runs/NAME`` of the source unless told.
        dtype: of the weights: 'kept' (quantised ones become fp32, which changes no value), 'fp32', 'bf16', 'fp16'.

    Raises:
        WeightsError: the source cannot be read, or our layers cannot express it. RunError: ``run`` is taken, or there
            is no room for it.
    """
    if dtype not in DTYPES:
        raise WeightsError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    source, began = Path(source), time.perf_counter()
    file = gguf_file(source)
    final = Path(run) if str(run) else Path("runs") / (model_name(file) if file else source.resolve().name)
    _check_new(final)
    with open_model(source) as model:
        tensors = _pending(model, DTYPES[dtype])
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            clean(final.parent)
            _check_space(final, size)
            with staged(final) as temp:
                told = _provenance(source, file, model, dtype)
                config = _config(model.config, final, _write_tokenizer(file or source, temp / "tokenizer"))
                write_file(temp / "config.toml", [to_toml(config).encode()])
                state = {IMPORTED: told, "config": to_dict(config)}
                size = checkpoint.write_first(temp / "step-000000", tensors, state)
                _write_events(temp / "events.jsonl", told, time.perf_counter() - began)
                _leave_room(final)
        except (OSError, CheckpointError) as error:
            raise RunError(f"cannot write {final}: {getattr(error, 'strerror', None) or error}") from None
    parameters = count.parameters(model.config).total
    done = Imported(final, told["format"], parameters, size, dtype, time.perf_counter() - began)
    emit("import", 0, path=str(final), **told)
    return done


def _check_new(final: Path) -> None:
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise RunError(f"{final} is there already; choose another --run")


def _leave_room(final: Path) -> None:
    """An empty directory of that name gives way; nothing else does."""
    if final.exists():
        final.rmdir()


def _check_space(final: Path, size: int) -> None:
    free = shutil.disk_usage(final.parent).free
    if size + MARGIN > free:
        raise RunError(
            f"{final} needs {(size + MARGIN) / 1e9:.2f} GB and {final.parent} has {free / 1e9:.2f} GB free; free "
            "some, choose another place with --run, or --dtype=bf16"
        )


def _pending(model: ForeignModel, dtype: torch.dtype | None) -> dict[str, Pending]:
    return {
        name: Pending(model.dtype_of(name, dtype), shape, partial(model.tensor, name, dtype))
        for name, shape in model.shapes.items()
    }


def _config(model: ModelConfig, final: Path, has_tokenizer: bool) -> PretrainConfig:
    """What a run of this model is: everything else as a new run has it."""
    data = DataConfig(tokenizer=str((final / "tokenizer").absolute())) if has_tokenizer else DataConfig()
    config = PretrainConfig(model=model, data=data)
    length = min(config.train.length, model.max_length)
    return replace(config, train=replace(config.train, length=length))


def _write_tokenizer(source: Path, target: Path) -> bool:
    """The files of the tokenizer, as they are where they are files; whether there was one."""
    if source.is_file():
        tokenizer = load_gguf_tokenizer(source)
        if tokenizer is not None:
            tokenizer.save(target)
        return tokenizer is not None
    if not (source / "tokenizer.json").is_file():
        return False
    target.mkdir()
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (source / "generation_config.json").is_file() and (ends := end_ids(source)):
        write_file(target / "generation_config.json", [json.dumps({"eos_token_id": list(ends)}).encode()])
    for path in (source / MORE_TEMPLATES).glob("*.jinja"):
        (target / MORE_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, target / MORE_TEMPLATES / path.name)
    return True


def _provenance(source: Path, file: Path | None, model: ForeignModel, dtype: str) -> dict[str, Any]:
    """Where the model came from: every file with weights, its size and time."""
    files = part_paths(file) if file is not None else sorted(source.glob("*.safetensors"))
    return {
        "source": str((file or source).absolute()),
        "format": "gguf" if file is not None else "hf",
        "dtype": dtype,
        "parameters": count.parameters(model.config).total,
        "files": {p.name: {"bytes": p.stat().st_size, "modified": p.stat().st_mtime} for p in files},
        "code_version": checkpoint.code_version(),
    }


def _write_events(path: Path, told: dict[str, Any], seconds: float) -> None:
    sink = JsonlSink(path)
    sink.write(Event("import", 0, told))
    sink.write(Event("done", 0, {"seconds": seconds}))
    sink.close()
