"""Files in which query, key and value share one tensor, and gate and up another (Phi-3), as if each had its own.

The names are Llama's, so that the rest of the import, and an export, need to know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek.errors import WeightsError
from deepseek.models import ModelConfig
from deepseek.weights.hf_files import TensorFiles


class Rows(NamedTuple):
    """Rows ``first … last − 1`` of the ``total`` that the file's tensor ``name`` must have."""

    name: str
    first: int
    last: int
    total: int


class Unfused:
    """``TensorFiles`` with shared tensors taken apart; what is left of them has its own name and place."""

    copies = False

    def __init__(self, files: TensorFiles, config: ModelConfig) -> None:
        a, self._files = config.attention, files
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        parts = {
            "self_attn.qkv_proj.weight": {"q_proj": q, "k_proj": kv, "v_proj": kv},
            "mlp.gate_up_proj.weight": {"gate_proj": config.ffn, "up_proj": config.ffn},
        }
        self._rows: dict[str, Rows] = {}
        self.names: list[str] = []
        for name in files.names:
            shared = next((s for s in parts if name.endswith(f".{s}")), None)
            if shared is None:
                self.names.append(name)
                continue
            stem = name.removesuffix(shared) + shared.split(".")[0]
            self._rows |= {f"{stem}.{part}.weight": rows for part, rows in _cut(name, parts[shared].items())}
        self.names += self._rows

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """As ``TensorFiles.describe``. Raises ``WeightsError`` where the shared tensor has other rows."""
        rows = self._rows.get(name)
        if rows is None:
            return self._files.describe(name)
        dtype, shape = self._files.describe(rows.name)
        if len(shape) != 2 or shape[0] != rows.total:
            raise WeightsError(
                f"{rows.name} is {list(shape)} in the file; config.json asks for {rows.total} rows"
            )
        return dtype, (rows.last - rows.first, shape[1])

    def get(self, name: str) -> Tensor:
        """As ``TensorFiles.get``."""
        rows = self._rows.get(name)
        return self._files.get(name) if rows is None else self._files.get(rows.name)[rows.first : rows.last]


def _cut(name: str, parts: Iterable[tuple[str, int]]) -> list[tuple[str, Rows]]:
    """Where each part begins and ends, one after the other."""
    parts = list(parts)
    total, first, found = sum(size for _, size in parts), 0, []
    for part, size in parts:
        found.append((part, Rows(name, first, first + size, total)))
        first += size
    return found
