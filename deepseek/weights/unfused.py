"""Files in which query, key and value share one tensor, and gate and up another (Phi-3), as if each had its own.

The names are those of the plain layer, so that the rest of the import, and an export, need to know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deepseek.errors import WeightsError
from deepseek.models import ModelConfig
from deepseek.weights.foreign import Files


class NamedFiles(Files, Protocol):
    """``hf_files.TensorFiles`` and ``gguf_model.GGUFTensors``."""

    @property
    def names(self) -> list[str]: ...


class Rows(NamedTuple):
    """Rows ``first … last − 1`` of the ``total`` that the file's tensor ``name`` must have."""

    name: str
    first: int
    last: int
    total: int


#: Names in a layer of a Hugging Face directory and of a GGUF file: what is shared, and what of it is whose.
HF_NAMES = {
    "self_attn.qkv_proj.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "mlp.gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
}
GGUF_NAMES = {
    "attn_qkv.weight": [f"attn_{part}.weight" for part in "qkv"],
    "ffn_up.weight": ["ffn_gate.weight", "ffn_up.weight"],
}


class Unfused:
    """The tensors of ``files`` with shared ones taken apart.

    Args:
        layout: ``HF_NAMES`` or ``GGUF_NAMES``.
    """

    def __init__(self, files: NamedFiles, config: ModelConfig, layout: Mapping[str, list[str]]) -> None:
        a, self._files, self.copies = config.attention, files, files.copies
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        sizes = dict(zip(layout, ((q, kv, kv), (config.ffn, config.ffn))))
        self._rows: dict[str, Rows] = {}
        self.names: list[str] = []
        for name in files.names:
            shared = next((s for s in layout if name.endswith(f".{s}")), None)
            if shared is None:
                self.names.append(name)
            else:
                self._rows |= _cut(name, name.removesuffix(shared), zip(layout[shared], sizes[shared]))
        self.names += self._rows

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of a tensor. Raises ``WeightsError`` where the shared one has other rows."""
        rows = self._rows.get(name)
        if rows is None:
            return self._files.describe(name)
        dtype, shape = self._files.describe(rows.name)
        if len(shape) != 2 or shape[0] != rows.total:
            raise WeightsError(
                f"{rows.name} is {list(shape)} in the file; its config asks for {rows.total} rows"
            )
        return dtype, (rows.last - rows.first, shape[1])

    def get(self, name: str) -> Tensor:
        """One tensor; memory of its own where ``files`` give such."""
        rows = self._rows.get(name)
        if rows is None:
            return self._files.get(name)
        part = self._files.get(rows.name)[rows.first : rows.last]
        return part.clone() if self.copies else part


def _cut(name: str, stem: str, parts: Iterable[tuple[str, int]]) -> dict[str, Rows]:
    """Where each part begins and ends, one after the other."""
    parts = list(parts)
    total, first, found = sum(size for _, size in parts), 0, {}
    for part, size in parts:
        found[stem + part] = Rows(name, first, first + size, total)
        first += size
    return found
