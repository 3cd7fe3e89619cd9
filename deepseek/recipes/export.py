"""A run as a directory that other tools read, and the proof that nothing changed on the way."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from deepseek.assemble import load
from deepseek.errors import MissingExtraError, WeightsError
from deepseek.events import emit
from deepseek.models import Transformer
from deepseek.weights.convert import load_hf, save_hf

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBE_TOKENS = 64


@dataclass(frozen=True)
class Export:
    """Where it lies, as which architecture and why not a better known one, and the largest logit difference after
    reading it back (``None``: not checked), by whom it was read."""

    path: Path
    model_type: str
    reason: str
    max_logit_difference: float | None
    loaded_with: str


def export(
    source: Path | str,
    target: Path | str | None = None,
    *,
    dtype: str = "fp32",
    family: str = "auto",
    check: bool = True,
) -> Export:
    """Write the model of a run (or checkpoint) as a Hugging Face directory, read it back and compare logits.

    Args:
        target: ``SOURCE/export`` when ``None``.
        dtype: of the weights in the files.
        family: see ``weights.convert.save_hf``.
        check: read it back with ``transformers`` where it is installed, else with our own reader.

    Raises:
        WeightsError: the target cannot be written, or fp32 weights came back different.
    """
    if dtype not in DTYPES:
        raise WeightsError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    loaded = load(source)
    directory = Path(target) if target is not None else loaded.path / "export"
    tokenizer = loaded.path / "tokenizer" if (loaded.path / "tokenizer").is_dir() else loaded.path
    has_tokenizer = tokenizer if (tokenizer / "tokenizer.json").is_file() else None
    done = save_hf(loaded.model, directory, has_tokenizer, dtype=DTYPES[dtype], family=family)
    difference, reader = compare(loaded.model, directory) if check else (None, "")
    if difference is not None and dtype == "fp32" and not difference <= 1e-4:
        raise WeightsError(
            f"{directory} was read back with logits that differ by {difference:.2g}: do not use it"
        )
    emit("export", loaded.step, path=directory, max_logit_difference=difference, loaded_with=reader)
    return Export(directory, done.model_type, done.reason, difference, reader)


@torch.no_grad()
def compare(model: Transformer, directory: Path) -> tuple[float, str]:
    """The largest difference of logits between ``model`` and what lies in ``directory``, and who read it."""
    random = torch.Generator().manual_seed(0)
    length = min(PROBE_TOKENS, model.config.max_length)
    tokens = torch.randint(0, model.config.vocab_size, (2, length), generator=random)
    model = model.eval().float()
    ours = model.logits(model(tokens).hidden)
    try:
        theirs, reader = _transformers_logits(directory, tokens), "transformers.AutoModelForCausalLM"
    except MissingExtraError:
        again = load_hf(directory, dtype=torch.float32)
        theirs, reader = again.logits(again(tokens).hidden), "deepseek.weights.load_hf"
    return float((ours - theirs).abs().max()), reader


def _transformers_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise MissingExtraError("transformers", "hf", "reading an export with transformers") from None
    import_module("deepseek.transformers")  # registers our architecture
    logging.disable_progress_bar()
    found = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return found.eval()(tokens).logits
