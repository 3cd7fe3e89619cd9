"""Our key/value cache with the methods that ``generate`` calls.

Rows without padding share one batched cache. A padded batch gets one cache per row, because rows of different
length stand at different positions of their windows and pooled blocks: it is exact, and as slow as decoding
the rows one by one.

Shape letters: B rows, T new columns, C hidden size.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from deepseek.errors import ConfigError
from deepseek.models import Output, Transformer
from deepseek.nn.cache import Cache


class GenerationCache:
    """Keys and values of the columns seen so far, padding left out."""

    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        self.columns = 0  #: columns of the batch seen, padding included
        self._shared: Cache | None = None
        self._rows: list[Cache] | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order beam search chose."""
        if self._shared is not None:
            self._shared.select(beam_idx)
        elif self._rows is not None:
            self._rows = [copy.deepcopy(self._rows[i]) for i in beam_idx.tolist()]

    def crop(self, *_: object) -> None:
        raise ConfigError("assisted decoding is not supported: pooled keys and values cannot be taken back")

    activate_past_recording = crop

    def run(
        self, model: Transformer, tokens_BT: Tensor, real_BT: Tensor | None
    ) -> tuple[Tensor, list[Output]]:
        """The hidden states ``[B, T, C]`` of new columns; columns that are not ``real`` give zeros."""
        padded = real_BT is not None and not bool(real_BT.all())
        self.columns += tokens_BT.shape[1]
        if self._rows is None and not padded:
            self._shared = self._shared or model.new_cache()
            output = model(tokens_BT, cache=self._shared)
            return output.hidden, [output]
        if self._rows is None:
            if self._shared is not None:
                raise ConfigError(
                    "padding after the first call is not supported; pad the prompt, on the left"
                )
            self._rows = [model.new_cache() for _ in range(tokens_BT.shape[0])]
        real_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if real_BT is None else real_BT
        hidden = model.embedding.weight.new_zeros(*tokens_BT.shape, model.config.hidden)
        outputs = []
        for row, (tokens, real, cache) in enumerate(zip(tokens_BT, real_BT, self._rows)):
            if bool(real.any()):
                outputs.append(model(tokens[real][None], cache=cache))
                hidden[row, real] = outputs[-1].hidden[0].to(hidden.dtype)
        return hidden, outputs
