"""A foreign model that is open: its shape, and our tensors, each put together from the parts in its files.

Whatever the format, reading comes down to two questions to the files (type and shape of a tensor; the tensor) and
a table that says which part of ours each of theirs is. Everything is checked against the shape before the first
tensor is read.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from deepseek.errors import WeightsError
from deepseek.models import ModelConfig, Transformer
from deepseek.weights.families import Slot

#: Statistics, not weights: too fine for bf16.
KEPT_FLOAT32 = ("router.bias", "default_EC", "drift.moments_ED", "drift.watch")


class Files(Protocol):
    """Tensors by name: ``hf_files.TensorFiles``, ``gguf_model.GGUFTensors``.

    ``copies``: what ``get`` returns shares no memory with the file.
    """

    copies: bool

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]: ...

    def get(self, name: str) -> Tensor: ...

    def __exit__(self, *_: object) -> None: ...


class ForeignModel:
    """One open model. A context manager; closing it closes its files.

    Args:
        model: one of its shape, from ``empty``. slots: every tensor of ``files``. asked_by: who says the shapes.

    Attributes:
        config: its shape. dtypes: of our tensors as the files have them; wider where parts differ.
        shapes: of our tensors.
    """

    def __init__(self, model: Transformer, slots: dict[str, Slot], files: Files, asked_by: str) -> None:
        self.config, self._files, self._empty = model.config, files, model
        self.shapes = {name: tensor.shape for name, tensor in self._empty.state_dict().items()}
        self._parts: dict[str, dict[str, Slot]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for theirs, slot in slots.items():
            dtype, shape = files.describe(theirs)
            if not dtype.is_floating_point or dtype.itemsize < 2:
                raise WeightsError(
                    f"{theirs} is {dtype}; quantised weights are not supported: dequantise them first"
                )
            want = slot.view(torch.empty(self.shapes[slot.name], device="meta")).shape
            if shape != want:
                raise WeightsError(f"{theirs} is {list(shape)} in the file; {asked_by} asks for {list(want)}")
            self._parts.setdefault(slot.name, {})[theirs] = slot
            self.dtypes[slot.name] = torch.promote_types(self.dtypes.get(slot.name, dtype), dtype)
        for name in self.shapes.keys() - self._parts.keys():
            self.dtypes[name] = torch.float32  # a statistic that starts at zero

    def __enter__(self) -> ForeignModel:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()

    def dtype_of(self, name: str, dtype: torch.dtype | None) -> torch.dtype:
        """The type of our tensor ``name`` when ``dtype`` is asked for; ``None`` keeps that of the files."""
        kept = dtype is None or name.endswith(KEPT_FLOAT32) or name not in self._parts
        return self.dtypes[name] if dtype is None or kept else dtype

    def tensor(
        self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Our tensor ``name``, read now. Raises ``WeightsError`` when a file is damaged."""
        whole = [theirs for theirs, slot in self._parts.get(name, {}).items() if slot == Slot(name)]
        if whole and self._files.copies:
            return self._files.get(whole[0]).to(device, self.dtype_of(name, dtype))
        make = torch.empty if name in self._parts else torch.zeros
        made = make(self.shapes[name], dtype=self.dtype_of(name, dtype), device=device)
        for theirs, slot in self._parts.get(name, {}).items():
            slot.view(made).copy_(self._files.get(theirs))
        return made

    def load(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Transformer:
        """The whole model, in evaluation mode; memory peaks at the weights plus one tensor. Once only."""
        model = self._empty
        state = {name: self.tensor(name, dtype, device) for name in self.shapes}
        for name, buffer in model.named_buffers():
            if name not in state:
                parent, _, leaf = name.rpartition(".")
                zeros = torch.zeros(buffer.shape, dtype=torch.float32, device=device)
                setattr(model.get_submodule(parent), leaf, zeros)
        model.load_state_dict(state, assign=True)
        return model.eval()


def empty(config: ModelConfig, where: str) -> Transformer:
    """A model of this shape without memory. Raises ``WeightsError`` when there can be none."""
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (RuntimeError, OverflowError) as error:
        raise WeightsError(f"{where}: no model has this shape: {str(error).splitlines()[0]}") from None
