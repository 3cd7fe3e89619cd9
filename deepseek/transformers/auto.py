"""``from_pretrained`` by name: our layers where they express the model exactly, the library ``transformers``
otherwise.

Which of the two runs is said, never guessed: the attribute ``runs_on`` of the model, and an event ``load``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from deepseek.errors import WeightsError
from deepseek.events import emit
from deepseek.transformers.configuration import DeepseekHybridConfig
from deepseek.transformers.modeling import DeepseekHybridForCausalLM
from deepseek.weights.convert import load_hf, read_config
from deepseek.weights.hf_files import model_directory, read_json

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


class AutoModelForCausalLM:
    """A causal language model from a directory or, through the library's own cache and hub client, a model
    name.
    """

    @staticmethod
    def from_pretrained(
        name: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **hub: Any,
    ) -> Any:
        """A model in evaluation mode, with ``generate``.

        Args:
            dtype: of the weights; ``None`` keeps what the files have.
            hub: ``revision``, ``cache_dir``, ``token``, ``local_files_only``: where a name is looked up.

        Returns:
            ``DeepseekHybridForCausalLM`` where our layers express the model, else the class of
            ``transformers``. Its ``runs_on`` is 'deepseek', or 'transformers' and the reason.

        Raises:
            WeightsError: no such model, or its files are damaged.
        """
        directory = _local(name, hub)
        try:
            shape = read_config(directory)
        except WeightsError as error:
            model, runs_on = _foreign(directory, dtype, device, str(error)), f"transformers: {error}"
        else:
            model, runs_on = (
                _wrap(load_hf(directory, dtype, device), DeepseekHybridConfig.of(shape)),
                "deepseek",
            )
            if (directory / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(directory)
        model.runs_on = runs_on
        emit("load", model=str(name), runs_on=runs_on)
        return model


def _wrap(model: Any, config: DeepseekHybridConfig) -> DeepseekHybridForCausalLM:
    with torch.device("meta"):
        wrapped = DeepseekHybridForCausalLM(config)
    wrapped.model = model
    return wrapped.eval()


def _foreign(directory: Path, dtype: torch.dtype | None, device: torch.device | str, reason: str) -> Any:
    """The model on the layers of ``transformers``, or the reason why neither can."""
    if read_json(directory / "config.json").get("model_type") == DeepseekHybridConfig.model_type:
        raise WeightsError(reason)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or "auto")
    except (ValueError, OSError, KeyError, RuntimeError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{reason}; and transformers says: {first}") from None
    return model.to(device).eval()


def _local(name: str | Path, hub: dict[str, Any]) -> Path:
    """The directory of ``name``: itself, or a snapshot that the hub client finds or fetches."""
    path = Path(name)
    if (
        path.exists()
        or isinstance(name, Path)
        or str(name).count("/") > 1
        or str(name).startswith((".", "/", "~"))
    ):
        return model_directory(path)
    from huggingface_hub import snapshot_download

    try:
        return model_directory(snapshot_download(str(name), allow_patterns=list(HUB_FILES), **hub))
    except WeightsError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{name!r} is neither a directory nor a model that could be fetched: {first}"
        ) from None
