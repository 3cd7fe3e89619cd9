"""``Opened``: one checkpoint in memory, the text it is looked at with, and what was found in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepseek.assemble import Loaded
from deepseek.batch import Batch
from deepseek.errors import ConfigError
from deepseek.models import Transformer
from deepseek.monitor.inspect.ablate import Replay
from deepseek.monitor.inspect.examine import attentions, evaluating
from deepseek.monitor.inspect.held_out import HeldOut, long_row
from deepseek.monitor.inspect.view import AttentionView

T = TypeVar("T")

INPUT_BYTES = 2**28  #: layer inputs of the long row are kept up to this size, else one layer at a time


class Opened:
    """A loaded model with its held-out batch; ``once`` remembers answers, ``view`` opens a layer on the long row."""

    def __init__(self, loaded: Loaded, held: HeldOut, text: Path | str | None) -> None:
        self.loaded, self.held, self.text = loaded, held, text
        self.batch: Batch = held.batch.to(next(loaded.model.parameters()).device)
        self._found: dict[str, Any] = {}
        self._row: Tensor | None = None
        self._inputs: dict[int, Tensor] = {}
        self._view: tuple[int, AttentionView] | None = None

    def once(self, key: str, work: Callable[[], T]) -> T:
        if key not in self._found:
            self._found[key] = work()
        return self._found[key]

    def replay(self) -> Replay:
        return self.once("replay", lambda: Replay(self.loaded.model, self.batch))

    @property
    def row(self) -> Tensor:
        """int64 ``[1, T]``: one document as long as the model takes."""
        if self._row is None:
            self._row = long_row(self.loaded, self.text).to(self.batch.tokens.device)
        return self._row

    def tokens(self, start: int, size: int) -> list[dict[str, Any]]:
        ids = self.row[0, start : start + size].tolist()
        tokenizer = self.loaded.tokenizer
        if tokenizer is None:
            return [{"id": i, "text": str(i)} for i in ids]
        texts = [tokenizer.piece(i, skip_special=False).decode("utf-8", "replace") for i in ids]
        return [{"id": i, "text": text} for i, text in zip(ids, texts)]

    def view(self, layer: int) -> AttentionView:
        model = self.loaded.model
        if not 0 <= layer < len(model.blocks):
            raise ConfigError(f"no layer {layer}: the model has layers 0 to {len(model.blocks) - 1}")
        if self._view is None or self._view[0] != layer:
            if layer not in self._inputs:
                self._inputs = _layer_inputs(model, self.row, layer)
            self._view = layer, AttentionView(attentions(model)[layer], self._inputs[layer])
        return self._view[1]


def written(path: Path) -> int:
    """When a checkpoint was written: a run that went back may write the same step again."""
    manifest = path / "manifest.json"
    return manifest.stat().st_mtime_ns if manifest.exists() else 0


@torch.no_grad()
def _layer_inputs(model: Transformer, row: Tensor, wanted: int) -> dict[int, Tensor]:
    """The inputs of the attention layers for one row: all of them where they are small, else the wanted one's."""
    size = row.numel() * model.config.hidden * 4 * len(model.blocks)
    layers = range(len(model.blocks)) if size <= INPUT_BYTES else (wanted,)
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            found[index] = args[0]

        return hook

    handles = [attentions(model)[i].register_forward_pre_hook(keep(i)) for i in layers]
    try:
        with evaluating(model):
            model(row)
    finally:
        for handle in handles:
            handle.remove()
    return found
