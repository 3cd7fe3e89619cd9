"""Hugging Face model directories in and out (the families of ``families``, and our own); GGUF in.

A directory that plain ``transformers`` loads is written wherever one of its families says exactly what the
model does; everything else is written as our own architecture, which ``import deepseek.transformers``
registers. A family is a row in ``families``, so this file is only: read the config, fill the tensors, write
both out.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek.config import from_dict, to_dict
from deepseek.data.foreign_text import MORE_TEMPLATES
from deepseek.errors import CheckpointError, ConfigError, WeightsError
from deepseek.events import emit
from deepseek.files import staged
from deepseek.models import ModelConfig, Transformer
from deepseek.weights.families import FAMILIES, Family, Slot, family_of, slots
from deepseek.weights.family_config import from_hf, matching_family, obstacle, to_hf
from deepseek.weights.foreign import KEPT_FLOAT32, ForeignModel, empty
from deepseek.weights.gguf_model import GGUFTensors, checked_slots
from deepseek.weights.gguf_parts import model_name
from deepseek.weights.hf_files import (
    INDEX,
    SHARD,
    SINGLE,
    TensorFiles,
    listed,
    model_directory,
    read_json,
    write_json,
    write_weights,
)
from deepseek.weights.hf_tokenizer import TOKENIZER_FILES, TokenIds, write_tokenizer
from deepseek.weights.shards import SHARD_BYTES
from deepseek.weights.unfused import GGUF_NAMES, HF_NAMES, Unfused

OURS = "deepseek_hybrid"
ARCHITECTURE = "DeepseekHybridForCausalLM"
IGNORED = ("rotary_emb.inv_freq",)  # a constant that old Llama directories carry


class Exported(NamedTuple):
    """What ``save_hf`` wrote and where; ``reason`` says why it is our own architecture, or is empty."""

    model_type: str
    reason: str
    directory: Path


def read_config(directory: Path | str) -> ModelConfig:
    """The shape of the model in a Hugging Face directory.

    Raises:
        WeightsError: not a model directory, or an architecture or option that our layers cannot express.
    """
    return _read(model_directory(directory))[1]


def load_hf(
    directory: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """The model in a Hugging Face directory, in evaluation mode.

    Tensors are read one at a time straight into their places, so memory peaks at the weights plus one tensor.

    Args:
        dtype: of the weights; ``None`` keeps each as it is in the files.

    Raises:
        WeightsError: as ``read_config``; or a file is damaged, a tensor missing, left over or misshapen.
    """
    with open_directory(directory) as found:
        return found.load(dtype, device)


def open_directory(directory: Path | str) -> ForeignModel:
    """The model in a Hugging Face directory, to be read tensor by tensor. Raises as ``load_hf``."""
    directory = model_directory(directory)
    family, config = _read(directory)
    with ExitStack() as held:
        opened = held.enter_context(TensorFiles(directory))
        files = Unfused(opened, config, HF_NAMES) if family is not None and family.fused else opened
        model = empty(config, str(directory))
        names = tensor_slots(model, family, files.names)
        _check_names(directory, names, files, config)
        found = ForeignModel(model, names, files, "config.json")
        held.pop_all()
    return found


def open_gguf(path: Path | str) -> ForeignModel:
    """The model in a GGUF file (or any of its parts), to be read tensor by tensor; quantised tensors come out as fp32.

    Raises:
        WeightsError: the file is damaged, a tensor missing, left over or misshapen, or our layers cannot express
            what it asks for.
    """
    with ExitStack() as held:
        opened = held.enter_context(GGUFTensors(Path(path)))
        files = Unfused(opened, opened.config, GGUF_NAMES) if opened.fused else opened
        slots = checked_slots(opened.config, files.names, str(opened.file.path))
        found = ForeignModel(empty(opened.config, str(path)), slots, files, f"the metadata of {path}")
        held.pop_all()
    return found


def open_model(path: Path | str) -> ForeignModel:
    """``open_gguf`` or ``open_directory``, as ``path`` is a GGUF file (or a directory with one) or not."""
    file = gguf_file(path)
    return open_gguf(file) if file is not None else open_directory(path)


def gguf_file(path: Path | str) -> Path | None:
    """The GGUF file that ``path`` is, or the only model in that directory without ``config.json``; else ``None``.

    Of a model in parts it is one of them.

    Raises:
        WeightsError: a directory with several.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.is_dir() or any((path / name).exists() for name in ("config.json", "config.toml")):
        return None
    held = sorted(path.glob("*.gguf"))
    if len({model_name(p) for p in held}) > 1:
        raise WeightsError(f"{path} holds {len(held)} GGUF files; name one: {listed(p.name for p in held)}")
    return held[0] if held else None


def tensor_slots(
    model: Transformer, family: Family | None, present: list[str] | None = None
) -> dict[str, Slot]:
    """Every tensor name of a ``family`` directory (``None``: our own) and the part of ours that it is."""
    if family is None:
        return {f"model.{name}": Slot(name) for name in model.state_dict()}
    return slots(family, model.config, set(present or ()))


def save_hf(
    model: Transformer,
    directory: Path | str,
    tokenizer_dir: Path | str | None = None,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
    family: str = "auto",
    generation: dict[str, Any] | None = None,
    chat_template: str | None = None,
) -> Exported:
    """Write a Hugging Face directory; it appears whole or not at all, and replaces an earlier export.

    Args:
        tokenizer_dir: where ``tokenizer.json`` is; ``None`` writes no tokenizer.
        max_shard_bytes: larger weights are cut into shards with an index.
        dtype: of the weights in the files; ``None`` keeps each as it is.
        family: 'auto' (a family of ``transformers`` where it says exactly what the model does, else our own),
            the name of one, or 'deepseek_hybrid'.
        generation: keys for ``generation_config.json``, over those that follow from the tokenizer.
        chat_template: Jinja text instead of ours.

    Raises:
        WeightsError: the family cannot express the model, the target holds something else, or writing failed.
    """
    directory = Path(directory)
    source = Path(tokenizer_dir) if tokenizer_dir is not None else None
    chosen, reason = _choose(model, family, source)
    _check_target(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with staged(directory) as temp:
            ids = write_tokenizer(source, temp, model.config, chat_template) if source else TokenIds()
            _write_weights(model, chosen, temp, max_shard_bytes, dtype)
            write_json(temp / "config.json", _config_json(model, chosen, dtype, ids))
            write_json(temp / "generation_config.json", {**ids.generation(), **(generation or {})})
    except (OSError, CheckpointError) as error:
        raise WeightsError(f"cannot write {directory}: {error}") from None
    exported = Exported(chosen.model_type if chosen else OURS, reason, directory)
    emit("export", model_type=exported.model_type, reason=reason, directory=str(directory))
    return exported


def _read(directory: Path) -> tuple[Family | None, ModelConfig]:
    values = read_json(directory / "config.json")
    if values.get("model_type") != OURS:
        family = family_of(values)
        return family, from_hf(values, family)
    shape = values.get("model")
    if not isinstance(shape, dict):
        raise WeightsError(
            f"{directory / 'config.json'} lacks 'model', the table that describes our architecture"
        )
    try:
        return None, from_dict(ModelConfig, shape, "model")
    except ConfigError as error:
        raise WeightsError(f"{directory / 'config.json'}: {error}") from None


def _check_names(
    directory: Path, names: dict[str, Slot], files: TensorFiles | Unfused, config: ModelConfig
) -> None:
    """Every tensor is there and none is left over."""
    held = set(files.names)
    missing = [name for name in names if name not in held]
    extra = [n for n in files.names if n not in names and not n.endswith(IGNORED)]
    if config.tie_embeddings and "lm_head.weight" in extra and not missing:
        if not torch.equal(files.get("lm_head.weight"), files.get("model.embed_tokens.weight")):
            raise WeightsError(
                f"{directory}: tie_word_embeddings is true, but lm_head.weight is not the embedding"
            )
        extra.remove("lm_head.weight")
    if missing or extra:
        parts = [f"{len(missing)} missing ({listed(missing)})"] if missing else []
        parts += [f"{len(extra)} without a place ({listed(extra)})"] if extra else []
        raise WeightsError(f"{directory}: tensors and config.json do not match: {'; '.join(parts)}")


def _choose(model: Transformer, wanted: str, tokenizer: Path | None) -> tuple[Family | None, str]:
    """The family to write and, for our own architecture, why."""
    if wanted == OURS:
        return None, "asked for"
    if wanted != "auto" and wanted not in FAMILIES:
        raise WeightsError(f"family {wanted!r} is unknown; choose auto, {OURS}, {', '.join(FAMILIES)}")
    family, reason = matching_family(model.config) if wanted == "auto" else (FAMILIES[wanted], "")
    if family is not None:
        reason = (
            obstacle(model.config, family) or _weight_obstacle(model) or _text_obstacle(family, tokenizer)
        )
    if reason and wanted != "auto":
        raise WeightsError(f"family {wanted!r} cannot hold this model: {reason}; use 'auto' or {OURS!r}")
    return (None if reason else family), reason


def _weight_obstacle(model: Transformer) -> str:
    biased = [str(i) for i, moe in model.moe_layers().items() if bool(moe.router.bias.any())]
    return f"the router's selection bias is not zero in layers {listed(biased)}" if biased else ""


def _text_obstacle(family: Family, tokenizer: Path | None) -> str:
    if not family.tokenizer or tokenizer is None:
        return ""
    path = tokenizer / "tokenizer_config.json"
    named = read_json(path).get("tokenizer_class") if path.is_file() else None
    if isinstance(named, str) and named.removesuffix("Fast") == family.tokenizer:
        return ""
    return f"AutoTokenizer would read a {family.model_type} directory with {family.tokenizer}, other ids"


def _check_target(directory: Path) -> None:
    """Never replace what is not an earlier export."""
    if directory.exists() and not directory.is_dir():
        raise WeightsError(f"{directory} is a file; name a directory to write")
    held = {p.name for p in directory.iterdir()} if directory.is_dir() else set()
    known = {"config.json", "generation_config.json", SINGLE, INDEX, MORE_TEMPLATES, *TOKENIZER_FILES}
    foreign = sorted(name for name in held - known if not SHARD.fullmatch(name))
    if held and ("config.json" not in held or foreign):
        raise WeightsError(
            f"{directory} exists and is not an earlier export: it holds {listed(foreign or sorted(held))}"
        )


def _write_weights(
    model: Transformer, family: Family | None, directory: Path, limit: int, dtype: torch.dtype | None
) -> None:
    state = model.state_dict()
    names = tensor_slots(model, family)

    def cast(name: str, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if dtype is None or name.endswith(KEPT_FLOAT32) else dtype

    write_weights(directory, {name: slot.view(state[slot.name]) for name, slot in names.items()}, limit, cast)


def _config_json(
    model: Transformer, family: Family | None, dtype: torch.dtype | None, ids: TokenIds
) -> dict[str, Any]:
    stored = str(dtype or model.embedding.weight.dtype).removeprefix("torch.")
    values = to_hf(model.config, family) if family else our_config_json(model.config)
    return {**values, "dtype": stored, **ids.config()}


def our_config_json(config: ModelConfig) -> dict[str, Any]:
    """``config.json`` of our own architecture: the table ``model`` counts, the rest is for other tools."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": OURS,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.attention.heads,
        "num_key_value_heads": config.attention.kv_heads,
        "head_dim": config.attention.head_dim,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings,
        "model": to_dict(config),
    }
